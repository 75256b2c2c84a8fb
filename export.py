"""Writes a checkpoint as Hugging Face GPT-2: python export.py --checkpoint_path P --out DIR

Our tensors and those of transformers' GPT2LMHeadModel differ in name, and its linear layers
(Conv1D) hold the transpose of ours. A model without biases is exported with biases of zero.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from jsonargparse import auto_cli
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import Checkpoint
from configuration import Configuration
from errors import UserError, command, short
from model import GPTConfig
from resume import model_config, with_model

INDEX = "model.safetensors.index.json"  # the name transformers looks for
END_OF_TEXT = "<|endoftext|>"
BLOCK = {
    "ln_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}
ENDS = {"embedding.tokens": "wte", "embedding.positions": "wpe", "norm": "ln_f"}


OF_GPT2 = {  # what a GPT-2 has that this model can be
    "model_type": ["gpt2"],
    "activation_function": ["gelu", "gelu_new"],
    "layer_norm_epsilon": [1e-5],
    "n_inner": [None],
    "tie_word_embeddings": [True],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "quantization_config": [None],
}


def hugging_face_name(name: str) -> str:
    """decoder.3.attn.qkv.weight -> transformer.h.3.attn.c_attn.weight"""
    module, kind = name.rsplit(".", 1)
    if block := re.fullmatch(r"decoder\.(\d+)\.(.+)", module):
        return f"transformer.h.{block[1]}.{BLOCK[block[2]]}.{kind}"
    return f"transformer.{ENDS[module]}.{kind}"


def is_transposed(name: str) -> bool:
    """Whether the other side holds the transpose of this tensor."""
    return re.search(r"(attn|mlp)\.\w+\.weight$", name) is not None


def hugging_face_config(config: GPTConfig):
    """The GPT2Config of a model."""
    from transformers import GPT2Config

    end_of_text = 50256 if config.vocab_size > 50256 else None  # in GPT-2's vocabulary
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.width,
        n_layer=config.depth,
        n_head=config.heads,
        activation_function=config.activation,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        initializer_range=config.init_std,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        architectures=["GPT2LMHeadModel"],
    )


def hugging_face_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """(their name, tensor), one at a time."""
    for name in checkpoint.tensors:
        if name.startswith("exp_avg"):
            continue
        try:
            theirs = hugging_face_name(name)
        except (KeyError, ValueError):
            raise UserError(f"{short(name)} of {checkpoint.path} has no place in GPT-2") from None
        tensor = checkpoint.read(name)
        yield theirs, tensor.T.contiguous() if is_transposed(name) else tensor
        if not checkpoint.config.get("bias", True) and not name.startswith("embedding"):
            yield theirs.removesuffix("weight") + "bias", tensor.new_zeros(tensor.shape[0])


def read_hugging_face(config: Configuration) -> tuple[Configuration, Callable]:
    """The run of `config` with the model of its init_from, a folder or hub name of Hugging Face
    GPT-2, and `read(our name, rows)` over its weights."""
    from transformers import AutoConfig, GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    source = config.init_from
    try:
        theirs = AutoConfig.from_pretrained(source, trust_remote_code=False)
        for key, values in OF_GPT2.items():
            if (value := getattr(theirs, key, None)) not in values:
                raise ValueError(f"this model can't be it, as its {key} is {str(value)[:100]}")
        config = with_model(config, _model_of(theirs, config))  # refuses what none can lay out
        disable_progress_bar()
        kind = {"dtype": torch.float32, "attn_implementation": "eager"}  # theirs can name a program
        theirs_model, report = GPT2LMHeadModel.from_pretrained(
            source, **kind, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
        if report["missing_keys"]:
            raise ValueError(f"it lacks {sorted(report['missing_keys'])[0]}")
    except Exception as error:  # transformers raises no narrower one for what a file can hold
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"init_from: {source}: {reason}") from None

    state = theirs_model.state_dict()

    def read(name: str, rows: slice | None = None) -> Tensor:
        tensor = state[hugging_face_name(name)]
        return (tensor.T if is_transposed(name) else tensor)[rows or slice(None)]

    return config, read


def _model_of(theirs, config: Configuration) -> GPTConfig:
    """The shape of their model."""
    return GPTConfig(
        width=theirs.n_embd,
        depth=theirs.n_layer,
        heads=theirs.n_head,
        vocab_size=theirs.vocab_size,
        max_position_embeddings=theirs.n_positions,
        dropout=config.dropout,
        init_std=config.init_std,
        activation=theirs.activation_function,
    )


def load_tokenizer(checkpoint: Checkpoint):
    """The transformers tokenizer of a checkpoint; raises UserError where it carries none."""
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.path} has no tokenizer.json: its dataset had none")
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint.tokenizer))
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(f"{checkpoint.path}/tokenizer.json is not a tokenizer: {error}") from None
    most = checkpoint.config.get("vocab_size", GPTConfig.vocab_size)
    if max(tokenizer.get_vocab().values(), default=0) >= most:
        raise UserError(
            f"{checkpoint.path}/tokenizer.json has ids above the model's vocab_size {most:,}: it "
            f"is of another model"
        )
    if END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})
    return tokenizer


def encode(tokenizer, prompt: str) -> torch.Tensor:
    """The ids (1, n) of a prompt; UserError where the vocabulary lacks one of its characters."""
    try:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(
            f"the prompt has a character that the checkpoint's vocabulary lacks ({error})"
        ) from None
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty; give at least one character")
    return ids


def load_model(checkpoint: Checkpoint):
    """The checkpoint as transformers' GPT2LMHeadModel, on a GPU if there is one."""
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = hugging_face_config(model_config(checkpoint))
    weights = dict(hugging_face_tensors(checkpoint))
    model = GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=weights).eval()
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        model = model.to("cuda", torch.bfloat16 if bf16 else torch.float32)
    return model


def export(checkpoint_path: str, out: Path) -> None:
    """Write a checkpoint as Hugging Face GPT-2, holding one unit at a time.

    Args:
        checkpoint_path: a checkpoint
        out: the folder to write configuration, tokenizer and weights into; new or empty
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; take another --out")
    checkpoint = Checkpoint(checkpoint_path)
    config = model_config(checkpoint)
    hugging_face_config(config).save_pretrained(out)
    if checkpoint.tokenizer is not None:
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(out)
    units = groupby(hugging_face_tensors(checkpoint), key=lambda item: unit_of(item[0]))
    weight_map, total = {}, 0
    for unit, members in tqdm(units, total=config.depth + 2, unit="unit", disable=None):
        tensors = dict(members)
        try:
            save_file(tensors, out / f"{unit}.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{out} could not be written ({error}); free some space") from None
        weight_map |= dict.fromkeys(tensors, f"{unit}.safetensors")
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=1))
    print(f"wrote {out}")


def unit_of(name: str) -> str:
    """transformer.h.3.mlp.c_fc.weight -> transformer.h.3; wte and wpe belong together."""
    parts = name.split(".")
    if parts[1] == "h":
        return ".".join(parts[:3])
    return "transformer.norm" if parts[1] == "ln_f" else "transformer.embedding"


def main() -> None:
    auto_cli(export, as_positional=False, allow_abbrev=False, exit_on_error=False)


if __name__ == "__main__":
    command(main)
