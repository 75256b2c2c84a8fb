"""Our model and Hugging Face's GPT-2: names, weights both ways, tokenizers.

Our tensors and those of transformers' GPT2LMHeadModel differ in name, and its linear layers
(Conv1D) hold the transpose of ours. A model without biases gets biases of zero there.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from configuration import Configuration
from model import GPT, GPTConfig
from planner.machine import host_memory
from runtime.checkpoint import Checkpoint
from runtime.console import UserError, short, warn
from runtime.tokens import Tokens

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


OF_GPT2 = {  # the values of their configuration that model.py can compute
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


class NotGPT2(UserError):
    """The model is not one that transformers' GPT-2 can be."""


def hugging_face_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Their name of each weight, by ours; NotGPT2 where GPT-2 has none."""
    try:
        return {name: hugging_face_name(name) for name in checkpoint.weights}
    except (KeyError, ValueError) as error:
        where = f"{short(error.args[0])} of {checkpoint.path}"
        raise NotGPT2(f"{where} has no place in transformers' GPT-2") from None


def hugging_face_tensors(checkpoint: Checkpoint, layer: str = "") -> Iterator[tuple[str, Tensor]]:
    """(their name, tensor), one at a time: of a layer, or of all."""
    for name, theirs in hugging_face_names(checkpoint).items():
        if not name.startswith(layer):
            continue
        tensor = checkpoint.read(name)
        yield theirs, tensor.T.contiguous() if is_transposed(name) else tensor
        if not checkpoint.config.bias and not name.startswith("embedding"):
            yield theirs.removesuffix("weight") + "bias", tensor.new_zeros(tensor.shape[0])


@torch.no_grad()
def check_gpt2(checkpoint: Checkpoint, config: GPTConfig, positions: int) -> None:
    """Raises NotGPT2 where transformers' GPT-2 computes something else from a checkpoint's weights
    than model.py does. Each layer of both is given the same input, at first `positions` random ids;
    no more than a layer is in memory."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    theirs_config = hugging_face_config(config)
    theirs_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model, block = GPT(config).eval(), GPT2Block(theirs_config, 0).eval()
    ids = torch.randint(config.vocab_size, (1, positions), generator=torch.Generator())

    def load(layer: str) -> dict[str, Tensor]:
        """Loads a layer of ours, and returns their tensors."""
        module = model.get_submodule(layer)
        names = [name for name, _ in module.named_parameters()]
        assign(module, ((name, checkpoint.read(f"{layer}.{name}")) for name in names))
        tensors = hugging_face_tensors(checkpoint, f"{layer}.")
        return {name.split(".", 1)[1]: tensor for name, tensor in tensors}

    def compare(layer: str, ours: Tensor, theirs: Tensor, x: Tensor | float = 0.0) -> Tensor:
        """Compares what a layer made of x; returns ours."""
        x = torch.as_tensor(x)
        tolerance = 1e-4 * (ours - x).norm() + 1e-6 * x.norm()  # the second is fp32's rounding
        if not (ours - theirs).norm() <= tolerance:
            raise NotGPT2(f"{layer} of model.py differs from transformers' GPT-2")
        return ours

    theirs = load("embedding")
    embedded = theirs["wte.weight"][ids] + theirs["wpe.weight"][:positions]
    x = compare("embedding", model.embed(ids), embedded)
    blocks = tqdm(model.decoder, "comparing", unit="block", disable=None, leave=False)
    for i, ours in enumerate(blocks):
        theirs = load(f"decoder.{i}")
        assign(block, ((name.split(".", 2)[2], tensor) for name, tensor in theirs.items()))
        output = block(x)
        output = output[0] if isinstance(output, tuple) else output  # before transformers 5
        x = compare(f"decoder.{i}", ours(x), output, x)
        ours.to("meta")
    theirs, x = load("norm"), x[:, -64:]  # of few positions: their logits are large
    normed = F.layer_norm(x, x.shape[-1:], theirs["ln_f.weight"], theirs["ln_f.bias"])
    compare("head", model.head(x), F.linear(normed, model.embedding.tokens.weight))


def assign(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Makes these the module's parameters, one at a time; NotGPT2 where a shape is another."""
    for name, tensor in tensors:
        path, _, attribute = name.rpartition(".")
        if (shape := module.get_parameter(name).shape) != tensor.shape:
            raise NotGPT2(f"{name} has shape {list(tensor.shape)}, GPT-2's is {list(shape)}")
        setattr(module.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=False))


def read_hugging_face(config: Configuration) -> tuple[Configuration, Callable]:
    """The run of `config` with the model of its init_from, a folder or hub name of Hugging Face
    GPT-2, and `read(our name, rows)` over its weights, which stay in their files."""
    from transformers import AutoConfig

    source = config.init_from
    try:
        theirs = AutoConfig.from_pretrained(source, trust_remote_code=False)
        for key, values in OF_GPT2.items():
            if (value := getattr(theirs, key, None)) not in values:
                raise ValueError(f"its {key} is {str(value)[:100]}, which model.py can't compute")
        config = config.with_model(_model_of(theirs, config))
        places = _places(source)
        with torch.device("meta"):
            model = GPT(config)
        for name, parameter in model.named_parameters():
            shape = list(parameter.T.shape if is_transposed(name) else parameter.shape)
            if (key := hugging_face_name(name)) not in places:
                raise ValueError(f"it lacks {key}")
            if places[key][2] != shape:
                raise ValueError(f"{key} has shape {places[key][2]}, its config.json's is {shape}")
    except Exception as error:  # transformers raises no narrower one for what a file can hold
        raise _not_loaded(source, error) from None

    def read(name: str, rows: slice | None = None) -> Tensor:
        file, key, _ = places[hugging_face_name(name)]
        with safe_open(file, "pt") as opened:
            tensor, rows = opened.get_slice(key), rows or slice(None)
            return (tensor[:, rows].T if is_transposed(name) else tensor[rows]).float()

    return config, read


def _not_loaded(source: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"init_from: {source}: {reason}")


def _places(source: str) -> dict[str, tuple[str, str, list[int]]]:
    """The file, the name in it and the shape of each tensor of a folder or hub name, by its full
    name."""
    index, names = find_file(source, INDEX), ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_bytes())["weight_map"].values()))
    places = {}
    for name in names:
        if Path(name).name != name or (file := find_file(source, name)) is None:
            raise ValueError(f"it has no {short(name)}")
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                place = (file, key, opened.get_slice(key).get_shape())
                places[f"transformer.{key.removeprefix('transformer.')}"] = place
    return places


def find_file(source: str, name: str) -> str | None:
    """A file of a folder or hub name, fetched if need be; None where it has none of this name."""
    from transformers.utils import cached_file

    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def check_vocabulary(source: str, tokens: Tokens) -> None:
    """Refuses data whose token ids stand for other text than those of Hugging Face weights."""
    try:
        if file := find_file(source, "tokenizer.json"):
            theirs = Tokenizer.from_file(file).get_vocab()
        elif file := find_file(source, "vocab.json"):
            theirs = json.loads(Path(file).read_bytes())
        ours = tokens.tokenizer and Tokenizer.from_str(tokens.tokenizer.decode()).get_vocab()
    except Exception as error:  # tokenizers raises no narrower one
        raise _not_loaded(source, error) from None
    if file is None or ours is None:
        lacking = source if file is None else tokens.path.parent
        warn(f"{lacking} has no tokenizer: make sure that both use the same")
    elif ours != theirs:
        raise UserError(
            f"init_from: {source} has another tokenizer than {tokens.path.parent}; prepare the "
            f"data with the tokenizer of these weights"
        )


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
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(f"{checkpoint.path}/tokenizer.json is not a tokenizer: {error}") from None
    most = checkpoint.config.vocab_size
    if max(tokenizer.get_vocab().values(), default=0) >= most:
        raise UserError(
            f"{checkpoint.path}/tokenizer.json has ids above the model's vocab_size {most:,}: it "
            f"belongs to another model"
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


def check_memory(checkpoint: Checkpoint) -> tuple[str, torch.dtype]:
    """The device that a checkpoint's model is to be held on, a GPU if there is one, and its dtype.
    Raises UserError where it does not fit."""
    device, dtype, has = "cpu", torch.float32, host_memory()
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device, dtype = "cuda", torch.bfloat16 if bf16 else torch.float32
        has = torch.cuda.mem_get_info()[0]
    sizes = [prod(checkpoint.tensors[name]["shape"]) for name in checkpoint.weights]
    needs = sum(sizes) * dtype.itemsize + 2 * 4 * max(sizes, default=0)  # one on its way, twice
    if needs > has:
        raise UserError(
            f"{checkpoint.path} does not fit: its model needs {needs / 1e9:,.1f} GB of memory, and "
            f"{has / 1e9:,.1f} GB are free; use a larger machine"
        )
    return device, dtype


def load_model(checkpoint: Checkpoint, config: GPTConfig, device: str, dtype: torch.dtype):
    """The checkpoint as transformers' GPT2LMHeadModel."""
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(hugging_face_config(config)).eval()
    tensors = hugging_face_tensors(checkpoint)
    assign(model, ((name, tensor.to(device, dtype)) for name, tensor in tensors))
    model.lm_head.weight = model.transformer.wte.weight
    return model
