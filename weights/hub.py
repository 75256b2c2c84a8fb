"""Files of other people's models, in a folder or on the Hugging Face hub, and their tokenizers.
None is run as code, and what they claim is checked before it takes memory."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tokenizers import Tokenizer

from common.console import UserError, short, warn

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # of GPT-2, Llama 3, 2, Gemma
# Files that name the end of a text: of a released tokenizer, of a dataset and of a checkpoint
NAMING = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
NAMING += ("meta.json", "manifest.json")

MOST_LAYERS = 10_000  # or labels, of which transformers makes lists
LARGEST_GROWTH = 10_000  # how many times longer a tokenizer may make a text
GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "BertNormalizer": 4, "ByteLevel": 4}


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns any error in files of other people into a UserError, a line that begins with `what`."""
    try:
        yield
    except BaseException as error:  # a panic in the package tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what}: {reason}") from None


def find_file(source: str | Path, name: str) -> Path | None:
    """Return a file of a folder or hub name, fetched if need be, or None where it has none of this
    name."""
    if Path(source).exists():
        file = Path(source, name)
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(str(source), name))
    except LocalEntryNotFoundError:  # the hub can't be reached
        raise
    except EntryNotFoundError:
        return None


def read_json(source: str | Path, name: str) -> dict:
    """Return the content of a JSON file of a folder or hub name, {} where there is none. Raises
    UserError where it is damaged, brings code or would make transformers take all memory."""
    file = find_file(source, name)
    with reading(f"its {name}"):
        content = json.loads(file.read_bytes(), object_hook=_checked) if file else {}
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    return content


def _checked(content: dict) -> dict:
    """Return an object of a JSON file. Raises ValueError where a key of it can do harm."""
    for key, value in content.items():
        if key in ("auto_map", "configuration_files") and value:
            raise ValueError(f"{key} names other files, whose code is never run")
        if re.search("layer|label", key) and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"{key} is {short(value)}, above {MOST_LAYERS:,}")
    return content


def open_tokenizer(content: bytes) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, which neither cuts nor pads texts. Raises
    ValueError where it could make a text so long that it fills the memory."""
    if _growth(json.loads(content)) > LARGEST_GROWTH:
        raise ValueError(f"its steps can make a text over {LARGEST_GROWTH:,} times longer")
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _growth(part: object) -> float:
    """Return how many times longer the steps in a part of tokenizer.json can make a text."""
    if isinstance(part, list):
        return prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1.0
    kind = part.get("type")
    growth = GROWTH.get(kind, 1)
    if kind == "Replace":
        length = len(part["content"])
        literal = part["pattern"].get("String")
        growth = length / len(literal) if literal else 1 + length  # a pattern can match nothing
    elif kind == "Prepend":
        growth = 1 + len(part["prepend"])
    elif kind == "TemplateProcessing":
        ids = [len(token["ids"]) for token in part["special_tokens"].values()]
        growth = len(part["single"]) * max([1, *ids])
    elif kind == "Precompiled":
        table = base64.b64decode(part["precompiled_charsmap"])
        texts = table[4 + int.from_bytes(table[:4], "little") :]  # what follows the trie
        growth = max(map(len, texts.split(b"\0")))
    return max(1.0, growth) * prod(map(_growth, part.values()))


def begin_of_text(source: str | Path, tokenizer: Tokenizer) -> str | None:
    """Return the token that begins a text: the one that the tokenizer adds itself, or that files of
    this folder or hub name give; None if there is none."""
    named = (_named(read_json(source, name), "bos_token", tokenizer) for name in NAMING)
    return _added(tokenizer, slice(1)) or next(filter(None, named), None)


def _added(tokenizer: Tokenizer, place: slice) -> str | None:
    """Return the token that the tokenizer itself adds to a text at this place, if there is one."""
    text = min(tokenizer.get_vocab())
    plain = tokenizer.encode(text, add_special_tokens=False).ids[place]
    added = tokenizer.encode(text).ids[place]
    return tokenizer.id_to_token(added[0]) if added != plain else None


def _named(content: dict, key: str, tokenizer: Tokenizer) -> str | None:
    """Return the token that a file names, if the tokenizer has it."""
    token = content.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and tokenizer.token_to_id(token) is not None else None


def end_of_text(source: str | Path, tokenizer: Tokenizer) -> str | None:
    """Return the token that ends a document: the one that files of this folder or hub name give, or
    that the tokenizer adds itself, or one of END_TOKENS, with a warning; None if there is none."""
    added = tokenizer.get_added_tokens_decoder()
    special = {number: token.content for number, token in added.items() if token.special}
    for name in NAMING:
        content = read_json(source, name)
        if token := _named(content, "eos_token", tokenizer):
            return token
        ids = content.get("eos_token_id")
        for number in ids if isinstance(ids, list) else [ids]:
            if number in special:  # others may be a default that nobody chose
                return special[number]
    if last := _added(tokenizer, slice(-1, None)):
        return last
    guess = next((token for token in END_TOKENS if token in special.values()), None)
    if guess is not None:
        warn(f"{source} names no end of text: documents end with {guess}")
    return guess
