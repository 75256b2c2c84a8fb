"""The token files of a dataset: a folder with train.bin and val.bin (flat little-endian uint16 or
uint32 ids, as nanoGPT writes them), tokenizer.json and meta.json, which has the number of tokens
and checksums of all. Each block of a file is verified when it is read for the first time."""

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from runtime.console import UserError
from runtime.files import count_of, read_sealed, write_sealed

ROOT = Path(__file__).parents[1]
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # of GPT-2, Llama 3, 2, Gemma
BLOCK = 2**18  # bytes of a file that have a checksum: 9 billion tokens have 70,000


def find_folder(name: str) -> Path:
    """The folder of a dataset. A relative name that is not in the current folder is looked up in
    the repository."""
    path, ours = Path(name), ROOT / name
    return ours if not path.exists() and ours.exists() else path


def end_of_text(tokenizer) -> str | None:
    """The token that ends a document in a Tokenizer of `tokenizers`, if it has one we know."""
    vocabulary = tokenizer.get_vocab()
    return next((token for token in END_TOKENS if token in vocabulary), None)


def write_meta(folder: Path, meta: dict) -> dict:
    """Writes, and returns, the meta.json of train.bin and val.bin in `folder`: `meta`, which holds
    vocab_size and dtype at least, with the number of tokens and the checksums of each file."""
    counts, checksums = {}, {}
    for split in ("train", "val"):
        path = Path(folder) / f"{split}.bin"
        with open(path, "rb") as file:
            checksums[split] = [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]
        counts[split] = path.stat().st_size // np.dtype(meta["dtype"]).itemsize
    meta = meta | {"tokens": counts, "crc32": checksums}
    write_sealed(Path(folder) / "meta.json", meta)
    return meta


class Tokens:
    """The ids of one split of a dataset. Its files stay open, so that preparing the dataset again
    does not change them.

    Attributes: meta, the content of meta.json; text_bytes, the size of the text that the split
    stands for, 0 if unknown; tokenizer, the content of tokenizer.json, if there is one; digest.

    Raises UserError where the folder is not a prepared dataset, a file does not match meta.json,
    the ids do not fit in `vocab_size`, or the digest is not `digest`.
    """

    def __init__(self, name: str, split: str, vocab_size: int, digest: str | None = None):
        folder = find_folder(name)
        self.origin = (str(folder.absolute()), split, vocab_size)
        self.path, self.cure = folder / f"{split}.bin", _cure(folder)
        for path in (self.path, folder / "meta.json", folder / "tokenizer.json"):
            if path.exists() and not path.is_file():  # opening a pipe would wait forever
                raise UserError(f"{path} is not a file; {self.cure}")
        try:
            self._read_meta(folder, split)
            self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError as error:
            missing = Path(error.filename).absolute()
            raise UserError(f"{missing} is missing: prepare the dataset; {self.cure}") from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"is damaged ({str(error)[:200]})"
            raise UserError(f"{folder}/meta.json {reason}; {self.cure}") from None
        self._check(folder, vocab_size)
        content = repr((self.dtype.name, self.count, self.checksums))
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        if digest not in (None, self.digest):
            raise UserError(f"{self.path} was replaced while it was in use; start again")
        self.verified = np.zeros(len(self.checksums), bool)

    def _read_meta(self, folder: Path, split: str) -> None:
        self.meta = meta = read_sealed(folder / "meta.json")
        self.dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[meta["dtype"]]
        self.count, self.ids = count_of(meta["tokens"][split]), count_of(meta["vocab_size"])
        self.text_bytes = count_of(meta.get("bytes", {}).get(split, 0))
        self.checksums = list(meta["crc32"][split])
        sha256, path = meta.get("tokenizer_sha256"), folder / "tokenizer.json"
        known = sha256 is not None or path.is_file()
        self.tokenizer = path.read_bytes() if known else None
        if sha256 is not None and sha256 != hashlib.sha256(self.tokenizer).hexdigest():
            raise UserError(f"{path} is not the one that meta.json names; {self.cure}")

    def _check(self, folder: Path, vocab_size: int) -> None:
        size = os.fstat(self.file.fileno()).st_size
        if size != self.count * self.dtype.itemsize:
            raise UserError(
                f"{self.path} has {size:,} bytes, and meta.json says {self.count:,} tokens of "
                f"{self.dtype.itemsize}; {self.cure}"
            )
        if len(self.checksums) != -(-size // BLOCK):
            raise UserError(f"{folder}/meta.json is damaged (crc32 of {self.path}); {self.cure}")
        if self.count < 2:
            raise UserError(f"{self.path} has no token to predict; {self.cure}")
        if self.ids > vocab_size:
            raise UserError(
                f"{folder} has {self.ids:,} token ids, the model's vocab_size is {vocab_size:,}; "
                f"add --vocab_size {self.ids} or use another dataset"
            )

    def __reduce__(self) -> tuple:
        """Another process opens the files again, which must hold the same."""
        return Tokens, (*self.origin, self.digest)

    def read(self, begin: int, count: int) -> np.ndarray:
        """Ids begin to begin + count, int64."""
        size = self.dtype.itemsize
        for block in range(begin * size // BLOCK, -(-(begin + count) * size // BLOCK)):
            if not self.verified[block]:
                self._verify(block)
        ids = np.frombuffer(self._read(begin * size, count * size), self.dtype)
        if ids.max() >= self.ids:
            raise UserError(
                f"{self.path} has token id {ids.max()} near position {begin:,}, and meta.json "
                f"says that all are below {self.ids:,}; {self.cure}"
            )
        return ids.astype(np.int64)

    def _verify(self, block: int) -> None:
        begin = block * BLOCK
        size = min(BLOCK, self.count * self.dtype.itemsize - begin)
        if zlib.crc32(self._read(begin, size)) != self.checksums[block]:
            raise UserError(
                f"{self.path} was changed between bytes {begin:,} and {begin + size:,} (its "
                f"checksum differs); {self.cure}"
            )
        self.verified[block] = True

    def _read(self, begin: int, size: int) -> bytes:
        file, data = self.file.fileno(), b""
        try:
            while len(data) < size:  # a read may return less than was asked for
                if not (part := os.pread(file, size - len(data), begin + len(data))):
                    raise UserError(f"{self.path} ends early: it was truncated; {self.cure}")
                data += part
        except OSError as error:
            reason = f"can't be read at byte {begin:,} ({error.strerror})"
            raise UserError(f"{self.path} {reason}; check the disk") from None
        return data


def _cure(folder: Path) -> str:
    """The command that makes what is missing in the folder of a dataset."""
    program = os.path.relpath(ROOT / "data" / "prepare.py")
    if (folder / "prepare.py").is_file():
        return f"run: python {os.path.relpath(folder / 'prepare.py')}"
    if (folder / "train.bin").is_file() and not (folder / "meta.json").exists():
        return f"if its tokens are GPT-2's, run: python {program} --adopt {folder}"
    return f"run: python {program} --name {folder.name} FILES..."
