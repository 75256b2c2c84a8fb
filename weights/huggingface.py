"""Checkpoints and models of Hugging Face's transformers: weights both ways, tokenizers."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from common.console import UserError, short, warn
from common.tokens import Tokens
from configuration import Configuration, make_configuration
from model import GPT, GPTConfig
from weights.checkpoint import Checkpoint
from weights.families import FAMILIES, Family, family_of
from weights.hub import begin_of_text, end_of_text, find_file, open_tokenizer, read_json, reading

WEIGHTS = "model.safetensors"  # the names transformers looks for
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
HEAD = "lm_head.weight"  # their name
OUR_HEAD = "head.linear.weight"
TABLE = "embedding.tokens.weight"
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")  # that nobody needs
POSITIONS = 2048  # that are compared
ROWS = 4096  # that are read at one time
LARGEST_FILE = 5 * 10**9  # bytes, as transformers'


def hugging_face_tensors(config: GPTConfig, read: Callable) -> Iterator[tuple[str, Tensor]]:
    """Yield (their name, tensor) of `read(our name)`, one of ours at a time."""
    family = family_of(config)
    with torch.device("meta"):
        model = GPT(config)
    for name, _ in model.named_parameters():
        yield from family.split(name, read(name), config)


def write_weights(folder: Path, config: GPTConfig, read: Callable, dtype: torch.dtype) -> None:
    """Write `read(our name)` as transformers does: into model.safetensors, or files of up to
    LARGEST_FILE bytes with their index. One tensor at a time is in memory."""
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    named = hugging_face_tensors(config, model.get_parameter)
    tensors = {name: tensor.clone() for name, tensor in named}  # a view counts as its whole storage
    files = split_torch_state_dict_into_shards(tensors, max_shard_size=LARGEST_FILE)
    for file, names in files.filename_to_tensors.items():
        (folder / file).write_bytes(_header({name: tensors[name] for name in names}))
    read_tensors = hugging_face_tensors(config, read)
    for name, tensor in tqdm(read_tensors, unit="tensor", total=len(tensors), disable=None):
        with open(folder / files.tensor_to_filename[name], "ab") as file:
            file.write(tensor.to(dtype).view(torch.uint8).numpy())
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _header(tensors: dict[str, Tensor]) -> bytes:
    """Return the beginning of a safetensors file: its length, names, shapes and offsets."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin = end
        end += tensor.nbytes
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        shape = list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_same(config: GPTConfig, theirs) -> None:
    """Compare model.py with a model of transformers that has the configuration `theirs`. Raises
    UserError, with the first key of `theirs` that makes a difference, if one does."""
    try:
        _compare(config, theirs)
    except UserError:
        for key, value in vars(theirs).items():
            plain = family_of(config).theirs(config)
            if value != getattr(plain, key, None):
                setattr(plain, key, value)
                try:
                    _compare(config, plain)
                except UserError:
                    raise _unknown(key, value) from None
        raise


def _unknown(key: str, value: object) -> UserError:
    return UserError(f"its {key} is {str(value)[:100]}, which model.py can't compute")


@torch.no_grad()
def _compare(config: GPTConfig, theirs) -> None:
    """Raises UserError where the logits of both models differ. Both have all blocks and options and
    the same random weights, but narrow layers, a small vocabulary and POSITIONS at most."""
    from transformers import AutoModelForCausalLM

    family = family_of(config)
    theirs = deepcopy(theirs)
    shared = config.kv_heads or config.heads
    kv_heads = min(2, shared)
    group = min(2, config.heads // shared)
    small = replace(
        config,
        width=8 * kv_heads * group,
        heads=kv_heads * group,
        kv_heads=config.kv_heads and kv_heads,
        head_width=config.head_width and 6,
        mlp_width=config.mlp_width and 24,
        vocab_size=50,
    )
    for key, value in {**family.to_hf(small), "pad_token_id": None}.items():
        setattr(theirs, key, value)
    what = f"transformers' {family.title} is another model"
    with reading(what), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.randint(50, (1, min(POSITIONS, config.max_position_embeddings)))
        ours = GPT(small).eval()
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
        kinds = {"attn_implementation": "sdpa", "dtype": torch.float32}
        model = AutoModelForCausalLM.from_config(theirs, **kinds).eval()
        model.load_state_dict(_their_tensors(ours, small))
        expected = ours(ids)
        found = model(ids, use_cache=False)[0]
        if not (expected - found).norm() <= 1e-4 * expected.norm():
            raise ValueError("its logits differ from those of model.py")


def read_config(source: str):
    """Return transformers' configuration of a folder or hub name. Raises UserError where it brings
    code."""
    from transformers import AutoConfig

    read_json(source, "config.json")  # its checks
    return AutoConfig.from_pretrained(source, trust_remote_code=False)


def read_hugging_face(config: Configuration) -> tuple[Configuration, Callable]:
    """Return the run of `config` with the model of its init_from, a folder or hub name of a Hugging
    Face model, and `read(our name, rows)` over its weights, which stay in their files."""
    source = config.init_from
    with reading(f"init_from: {source}"):
        theirs = read_config(source)
        if (family := FAMILIES.get(theirs.model_type)) is None:
            known = ", ".join(FAMILIES)
            raise ValueError(f"its model_type is {short(theirs.model_type)}; known are {known}")
        if window := getattr(theirs, "sliding_window", None):  # shorter texts don't see it
            theirs.sliding_window = None
            theirs.max_position_embeddings = min(theirs.max_position_embeddings, window)
        model = GPTConfig(**family.from_hf(theirs))
        for key, value in {**family.to_hf(model), "quantization_config": None}.items():
            if (found := getattr(theirs, key, value)) != value:
                raise _unknown(key, found)
        model = replace(model, dropout=config.dropout, init_std=config.init_std)
        config = make_configuration(asdict(config) | asdict(model))
        places = _find_tensors(source, theirs, family)
        read = partial(_read, places, family)
        _check_tensors(places, family, model, read)
        check_same(model, theirs)
    return config, read


def _read(places: dict, family: Family, name: str, rows: slice | None = None) -> Tensor:
    """Return one of our weights, or some of its rows, in fp32."""
    begin = 0 if rows is None else rows.start
    end = sys.maxsize if rows is None else rows.stop
    parts = []
    for theirs in family.names(name):
        file, key, shape = places[theirs]
        count = shape[1] if family.is_transposed(name) else shape[0]
        part = slice(max(0, min(begin, count)), max(0, min(end, count)))
        begin -= count
        end -= count
        with safe_open(file, "pt") as opened:
            tensor = opened.get_slice(key)
            parts.append(tensor[:, part].T if family.is_transposed(name) else tensor[part])
    return torch.cat(parts).float()


def _check_tensors(places: dict, family: Family, config: GPTConfig, read: Callable) -> None:
    """Raises ValueError where the files lack a tensor, or have one of another shape or another head
    than the embedding that it is tied to; warns of those that are not used."""
    with torch.device("meta"):
        needed = _their_tensors(GPT(config), config)
    if config.tied_head and HEAD not in places:
        del needed[HEAD]
    for name, tensor in needed.items():
        if name not in places:
            raise ValueError(f"it lacks {name}")
        if (found := places[name][2]) != list(tensor.shape):
            raise ValueError(f"{name} has shape {found}, its config.json's is {[*tensor.shape]}")
    if config.tied_head and HEAD in places:
        parts = [slice(start, start + ROWS) for start in range(0, config.vocab_size, ROWS)]
        if not all(torch.equal(read(OUR_HEAD, rows), read(TABLE, rows)) for rows in parts):
            raise ValueError(
                f"its {HEAD} is not its embedding, but its tie_word_embeddings is true; set it to "
                f"false, or delete the tensor"
            )
    unused = [name for name in places if name not in needed and not BUFFERS.search(name)]
    if unused:
        some = ", ".join(map(short, sorted(unused)[:3]))
        warn(f"init_from: {len(unused)} tensors of its files are not used, such as {some}")


def _their_tensors(model: GPT, config: GPTConfig) -> dict[str, Tensor]:
    """Return the tensors of a model by the names of transformers."""
    return {HEAD: model.table} | dict(hugging_face_tensors(config, model.get_parameter))


def _find_tensors(source: str, theirs, family: Family) -> dict[str, tuple[Path, str, list[int]]]:
    """Return the file, the name in it and the shape of each tensor of a folder or hub name, by its
    full name."""
    places = {}
    for name in weight_files(source, getattr(theirs, "transformers_weights", None)):
        if Path(name).name != name or (file := find_file(source, name)) is None:
            raise ValueError(f"it has no {short(name)}")
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                full = key.removeprefix(family.prefix)
                full = full if full.startswith("lm_head.") else family.prefix + full
                if full in places:
                    raise ValueError(f"it has two tensors {full}: {places[full][1]} and {key}")
                places[full] = (file, key, opened.get_slice(key).get_shape())
    return places


def weight_files(source: str, chosen: str | None) -> list[str]:
    """Return the names of the files that transformers would read: those of the one that the
    configuration has chosen, of model.safetensors, or of its index."""
    if chosen is None:
        single, index = (find_file(source, name) is not None for name in (WEIGHTS, INDEX))
        if not single and not index and any(find_file(source, name) for name in PICKLES):
            raise ValueError(
                f"it has {PICKLES[0]}, which can run code and is not read; where you trust it, "
                f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) of transformers "
                f"writes {WEIGHTS}"
            )
        chosen = INDEX if index and not single else WEIGHTS
        if index and single:
            warn(f"{source}: reading {WEIGHTS}, as transformers does, and not {INDEX}")
    if chosen.endswith(".index.json"):
        return sorted(set(read_json(source, chosen)["weight_map"].values()))
    return [chosen]


def check_vocabulary(source: str, tokens: Tokens) -> None:
    """Refuses data whose token ids stand for other text than those of Hugging Face weights."""
    with reading(f"init_from: {source}"):
        file = find_file(source, "tokenizer.json")
        theirs = file and open_tokenizer(file.read_bytes()).get_vocab()
        ours = tokens.tokenizer and open_tokenizer(tokens.tokenizer).get_vocab()
    if theirs is None or ours is None:
        lacking = source if theirs is None else tokens.path.parent
        warn(f"{lacking} has no tokenizer.json: make sure that both use the same tokenizer")
    elif ours != theirs:
        raise UserError(
            f"init_from: {source} has another tokenizer than {tokens.path.parent}; prepare the "
            f"data with the tokenizer of these weights"
        )


def load_tokenizer(checkpoint: Checkpoint):
    """Return the transformers tokenizer of a checkpoint. Raises UserError where it carries none."""
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.path} has no tokenizer.json: its dataset had none")
    content = checkpoint.tokenizer.read_bytes()
    return make_tokenizer(checkpoint.path, content, checkpoint.config.vocab_size)


def make_tokenizer(folder: Path, content: bytes, vocab_size: int):
    """Return the transformers tokenizer of a tokenizer.json that is in this folder. Raises
    UserError where it is not one for a model of this vocab_size."""
    from transformers import PreTrainedTokenizerFast

    with reading(f"{folder}/tokenizer.json is not a tokenizer"):
        plain = open_tokenizer(content)
        ends = {"bos_token": begin_of_text(folder, plain), "eos_token": end_of_text(folder, plain)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
        tokenizer.add_special_tokens({kind: token for kind, token in ends.items() if token})
    if max(tokenizer.get_vocab().values(), default=0) >= vocab_size:
        raise UserError(
            f"{folder}/tokenizer.json has ids above the model's vocab_size {vocab_size:,}: it "
            f"belongs to another model"
        )
    return tokenizer


def encode(tokenizer, prompt: str) -> torch.Tensor:
    """Return the ids (1, n) of a prompt. Raises UserError where it can't be encoded."""
    what = f"the prompt {short(prompt)} has a character that the vocabulary lacks"
    with reading(f"{what}, or its tokenizer is damaged"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty; give at least one character")
    return ids


def decode(tokenizer, ids: list[int] | Tensor) -> str:
    """Return the text of ids, without special tokens. Raises UserError where it can't."""
    with reading("the tokenizer can't decode what the model wrote"):
        return tokenizer.decode(ids, skip_special_tokens=True)


def load_model(checkpoint: Checkpoint, config: GPTConfig, device: str, dtype: torch.dtype):
    """Return the checkpoint as a model of transformers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family_of(config).theirs(config)).eval()
    tensors = hugging_face_tensors(config, checkpoint.read)
    weights = {name: tensor.to(device, dtype) for name, tensor in tensors}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if config.positions == "rotary":  # its frequencies are no weights
        rotary = type(model.model.rotary_emb)
        model.model.rotary_emb = rotary(model.config).to(device)
    return model
