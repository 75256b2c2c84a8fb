"""Checkpoints and models of Hugging Face's transformers: weights both ways, tokenizers."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from configuration import Configuration
from model import GPT, GPTConfig
from runtime.checkpoint import Checkpoint
from runtime.console import UserError, short, warn
from runtime.families import FAMILIES, Family, NotInTransformers, family_of
from runtime.tokens import Tokens, end_of_text

INDEX = "model.safetensors.index.json"  # the name transformers looks for


def hugging_face_tensors(
    checkpoint: Checkpoint, config: GPTConfig, layer: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """(their name, tensor), one of ours at a time: of a layer, or of all."""
    family = family_of(config)
    for name in checkpoint.weights:
        if name.startswith(layer):
            yield from family.split(name, checkpoint.read(name), config)


@torch.no_grad()
def check_same(checkpoint: Checkpoint, config: GPTConfig, positions: int) -> None:
    """Raises NotInTransformers where a model of transformers computes something else from a
    checkpoint's weights than model.py does. Each layer of both is given the same input, at first
    `positions` random ids; no more than a layer is in memory."""
    family = family_of(config)
    theirs_config = family.theirs(config)
    theirs_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = GPT(config).eval()
    block, run = family.block(theirs_config)
    ids = torch.randint(config.vocab_size, (1, positions), generator=torch.Generator())

    def load(layer: str) -> dict[str, Tensor]:
        """Loads a layer of ours, and returns their tensors by ours or, in a block, their names."""
        module = model.get_submodule(layer)
        names = [f"{layer}.{name}" for name, _ in module.named_parameters()]
        if unknown := set(names) - set(checkpoint.weights):
            raise NotInTransformers(f"{checkpoint.path} lacks {min(unknown)}")
        ours = {name: checkpoint.read(name) for name in names}
        assign(module, ((name.removeprefix(f"{layer}."), t) for name, t in ours.items()))
        if not layer.startswith("decoder."):
            return ours
        start = f"{family.prefix}{family.blocks}.{layer.split('.')[1]}."
        theirs = hugging_face_tensors(checkpoint, config, f"{layer}.")
        return {name.removeprefix(start): tensor for name, tensor in theirs}

    def compare(layer: str, ours: Tensor, theirs: Tensor, x: Tensor | float = 0.0) -> Tensor:
        """Compares what a layer made of x; returns ours."""
        x = torch.as_tensor(x)
        tolerance = 1e-4 * (ours - x).norm() + 1e-6 * x.norm()  # the second is fp32's rounding
        if not (ours - theirs).norm() <= tolerance:
            raise NotInTransformers(
                f"{layer} of model.py differs from transformers' {family.title}"
            )
        return ours

    embedding = load("embedding")
    embedded = embedding["embedding.tokens.weight"][ids]
    if "embedding.positions.weight" in embedding:
        embedded += embedding["embedding.positions.weight"][:positions]
    x = compare("embedding", model.embed(ids), embedded)
    blocks = tqdm(model.decoder, "comparing", unit="block", disable=None, leave=False)
    for i, ours in enumerate(blocks):
        assign(block, load(f"decoder.{i}").items())
        x = compare(f"decoder.{i}", ours(x), run(x), x)
        ours.to("meta")
    norm, x = load("norm"), x[:, -64:]  # of few positions: their logits are large
    name = "embedding.tokens.weight" if config.tied_head else "lm_head.weight"
    head = (embedding if config.tied_head else load("lm_head"))[name]
    compare("head", model.head(x), F.linear(family.normed(x, norm, config), head))


def assign(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Makes these the module's parameters, one at a time; NotInTransformers where a shape is
    another."""
    for name, tensor in tensors:
        path, _, attribute = name.rpartition(".")
        if (shape := module.get_parameter(name).shape) != tensor.shape:
            raise NotInTransformers(
                f"{name} has shape {list(tensor.shape)}, transformers' is {list(shape)}"
            )
        setattr(module.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=False))


def read_hugging_face(config: Configuration) -> tuple[Configuration, Callable]:
    """The run of `config` with the model of its init_from, a folder or hub name of a Hugging Face
    model, and `read(our name, rows)` over its weights, which stay in their files."""
    from transformers import AutoConfig

    source = config.init_from
    try:
        theirs = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if (family := FAMILIES.get(theirs.model_type)) is None:
            raise ValueError(
                f"its model_type is {short(theirs.model_type)}; known are {', '.join(FAMILIES)}"
            )
        for key, values in family.required.items():
            if (value := getattr(theirs, key, None)) not in values:
                raise ValueError(f"its {key} is {str(value)[:100]}, which model.py can't compute")
        keys = {"dropout": config.dropout, "init_std": config.init_std}
        config = config.with_model(GPTConfig(**keys | family.ours(theirs)))
        places = _places(source, family)
        with torch.device("meta"):
            model = GPT(config)
        for name, parameter in model.named_parameters():
            _check_shapes(places, family, name, parameter.shape, config)
    except Exception as error:  # transformers raises no narrower one for what a file can hold
        raise not_loaded(source, error) from None

    def read(name: str, rows: slice | None = None) -> Tensor:
        begin, end, parts = 0, sys.maxsize, []
        if rows is not None:
            begin, end = rows.start, rows.stop
        for theirs in family.names(name):
            file, key, shape = places[theirs]
            count = shape[1] if family.is_transposed(name) else shape[0]
            part = slice(max(0, min(begin, count)), max(0, min(end, count)))
            begin, end = begin - count, end - count
            with safe_open(file, "pt") as opened:
                tensor = opened.get_slice(key)
                parts.append(tensor[:, part].T if family.is_transposed(name) else tensor[part])
        return torch.cat(parts).float()

    return config, read


def _check_shapes(
    places: dict, family: Family, name: str, shape: torch.Size, config: GPTConfig
) -> None:
    """Raises ValueError where a tensor is missing or has another shape than one of ours needs."""
    rows = family.rows(name.rsplit(".", 1)[0], config) or [shape[0]]
    for theirs, count in zip(family.names(name), rows, strict=True):
        if theirs not in places:
            raise ValueError(f"it lacks {theirs}")
        needed = [count, *shape[1:]]
        needed = needed[::-1] if family.is_transposed(name) else needed
        if (found := places[theirs][2]) != needed:
            raise ValueError(f"{theirs} has shape {found}, its config.json's is {needed}")


def not_loaded(source: str, error: Exception) -> UserError:
    """The line for a folder or hub name that can't be used."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"init_from: {source}: {reason}")


def _places(source: str, family: Family) -> dict[str, tuple[str, str, list[int]]]:
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
                full = key if key.startswith((family.prefix, "lm_head.")) else family.prefix + key
                places[full] = place
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
        raise not_loaded(source, error) from None
    if file is None or ours is None:
        lacking = source if file is None else tokens.path.parent
        warn(f"{lacking} has no tokenizer: make sure that both use the same")
    elif ours != theirs:
        raise UserError(
            f"init_from: {source} has another tokenizer than {tokens.path.parent}; prepare the "
            f"data with the tokenizer of these weights"
        )


def load_tokenizer(checkpoint: Checkpoint):
    """The transformers tokenizer of a checkpoint; raises UserError where it carries none."""
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.path} has no tokenizer.json: its dataset had none")
    content = checkpoint.tokenizer.read_bytes()
    return make_tokenizer(checkpoint.path, content, checkpoint.config.vocab_size)


def make_tokenizer(folder: Path, content: bytes, vocab_size: int):
    """The transformers tokenizer of a tokenizer.json that is in this folder."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(content))
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(f"{folder}/tokenizer.json is not a tokenizer: {error}") from None
    if max(tokenizer.get_vocab().values(), default=0) >= vocab_size:
        raise UserError(
            f"{folder}/tokenizer.json has ids above the model's vocab_size {vocab_size:,}: it "
            f"belongs to another model"
        )
    if (end := end_of_text(tokenizer)) is not None:
        begin = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])  # if it adds one
        first = begin[0] if begin else end
        tokenizer.add_special_tokens({"bos_token": first, "eos_token": end})
    return tokenizer


def encode(tokenizer, prompt: str) -> torch.Tensor:
    """The ids (1, n) of a prompt; UserError where the vocabulary lacks one of its characters."""
    try:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(
            f"the prompt {short(prompt)} has a character that the vocabulary lacks ({error})"
        ) from None
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty; give at least one character")
    return ids


def load_model(checkpoint: Checkpoint, config: GPTConfig, device: str, dtype: torch.dtype):
    """The checkpoint as a model of transformers."""
    from transformers import AutoModelForCausalLM

    family = family_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family.theirs(config)).eval()
    family.complete(model, device)
    tensors = hugging_face_tensors(checkpoint, config)
    assign(model, ((name, tensor.to(device, dtype)) for name, tensor in tensors))
    if config.tied_head:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model
