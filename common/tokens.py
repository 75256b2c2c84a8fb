"""The token files of a dataset: a folder with train.bin and val.bin, or with shards of them such as
train-00000.bin (flat little-endian uint16 or uint32 ids, as nanoGPT writes them), tokenizer.json
and meta.json. Beside each token file, as train.crc, is a checksum of each of its blocks, which is
verified when the block is read for the first time."""

import hashlib
import os
import resource
import zlib
from pathlib import Path

import numpy as np

from common.console import UserError
from common.files import checked_count, read_sealed, write_sealed

ROOT = Path(__file__).parents[1]
BLOCK = 2**18  # bytes of a file that have a checksum of 4


def find_folder(name: str) -> Path:
    """Return the folder of a dataset. A relative name that is not in the current folder is looked
    up in the repository."""
    path = Path(name)
    ours = ROOT / name
    return ours if not path.exists() and ours.exists() else path


def sources_of(dataset: str | dict[str, float]) -> dict[str, float]:
    """Return the weight of each folder of the key `dataset`, which may be one folder."""
    return dataset if isinstance(dataset, dict) else {dataset: 1.0}


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return the token files of a split that are there, in order."""
    return [*folder.glob(f"{split}.bin"), *sorted(folder.glob(f"{split}-*.bin"))]


def shard_names(split: str, count: int) -> list[str]:
    """Return the names that so many token files of a split have."""
    return [f"{split}.bin"] if count == 1 else [f"{split}-{i:05}.bin" for i in range(count)]


def write_checksums(path: Path) -> int:
    """Write the checksum of each block of a token file beside it; return the checksum of these."""
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(BLOCK), b"")
        content = np.fromiter(map(zlib.crc32, blocks), "<u4").tobytes()
    path.with_suffix(".crc").write_bytes(content)
    return zlib.crc32(content)


def write_meta(folder: Path, meta: dict, known: dict[str, list] | None = None) -> dict:
    """Write, and return, the meta.json of the token files in `folder`: `meta`, which holds
    vocab_size and dtype at least, with their numbers of tokens and checksums. `known` has these of
    splits whose checksums are written already."""
    size = np.dtype(meta["dtype"]).itemsize
    shards = {"train": [], "val": []} | (known or {})
    for split in shards.keys() - (known or {}):
        paths = find_shards(folder, split) or [folder / f"{split}.bin"]
        shards[split] = [[path.stat().st_size // size, write_checksums(path)] for path in paths]
    tokens = {split: sum(count for count, _ in found) for split, found in shards.items()}
    meta = meta | {"tokens": tokens, "shards": shards}
    write_sealed(folder / "meta.json", meta)
    return meta


class Shard:
    """A token file, which stays open, and the checksums of its blocks. Raises UserError."""

    def __init__(self, path: Path, size: int, checksum: int, cure: str):
        self.path = path
        self.size = size
        self.cure = cure
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        found = os.fstat(self.file.fileno()).st_size
        if found != size:
            raise UserError(f"{path} has {found:,} bytes, and meta.json says {size:,}; {cure}")
        content = path.with_suffix(".crc").read_bytes()
        if zlib.crc32(content) != checksum:
            name = path.with_suffix(".crc")
            raise UserError(f"{name} was changed (its checksum differs); {cure}")
        self.checksums = np.frombuffer(content, "<u4")
        self.verified = np.zeros(-(-size // BLOCK), bool)

    def read(self, begin: int, size: int) -> bytes:
        """Return the bytes begin to begin + size, whose blocks are verified."""
        for block in range(begin // BLOCK, -(-(begin + size) // BLOCK)):
            if not self.verified[block]:
                self._verify(block)
        return self._read(begin, size)

    def _verify(self, block: int) -> None:
        begin = block * BLOCK
        size = min(BLOCK, self.size - begin)
        if zlib.crc32(self._read(begin, size)) != self.checksums[block]:
            raise UserError(
                f"{self.path} was changed between bytes {begin:,} and {begin + size:,} (its "
                f"checksum differs); {self.cure}"
            )
        self.verified[block] = True

    def _read(self, begin: int, size: int) -> bytes:
        data = b""
        try:
            while len(data) < size:  # a read may return less than was asked for
                part = os.pread(self.file.fileno(), size - len(data), begin + len(data))
                if not part:
                    raise UserError(f"{self.path} ends early: it was truncated; {self.cure}")
                data += part
        except OSError as error:
            reason = f"can't be read at byte {begin:,} ({error.strerror})"
            raise UserError(f"{self.path} {reason}; check the disk") from None
        return data


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
        self.path = folder / f"{split}.bin"
        self.cure = _cure(folder)
        for path in (*find_shards(folder, split), folder / "meta.json", folder / "tokenizer.json"):
            if path.exists() and not path.is_file():  # opening a pipe would wait forever
                raise UserError(f"{path} is not a file; {self.cure}")
        try:
            self._read_meta(folder, split)
            self._open(folder, split)
        except FileNotFoundError as error:
            missing = Path(error.filename).absolute()
            raise UserError(f"{missing} is missing: prepare the dataset; {self.cure}") from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"is damaged ({str(error)[:200]})"
            raise UserError(f"{folder}/meta.json {reason}; {self.cure}") from None
        if self.count < 2:
            raise UserError(f"{self.path} has no token to predict; {self.cure}")
        if self.ids > vocab_size:
            raise UserError(
                f"{folder} has {self.ids:,} token ids, the model's vocab_size is {vocab_size:,}; "
                f"use another dataset, or for a new model --vocab_size {self.ids}"
            )
        content = repr((self.dtype.name, self.known))
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        if digest not in (None, self.digest):
            raise UserError(f"{self.path} was replaced while it was in use; start again")

    def _read_meta(self, folder: Path, split: str) -> None:
        meta = read_sealed(folder / "meta.json")
        self.meta = meta
        self.dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[meta["dtype"]]
        self.ids = checked_count(meta["vocab_size"])
        self.known = [tuple(map(checked_count, pair)) for pair in meta["shards"][split]]
        self.ends = np.cumsum([tokens for tokens, _ in self.known], dtype=np.int64)
        self.count = int(self.ends[-1])
        if self.count != checked_count(meta["tokens"][split]):
            raise ValueError(f"the shards have {self.count:,} tokens, and it says otherwise")
        self.text_bytes = checked_count(meta.get("bytes", {}).get(split, 0))
        path = folder / "tokenizer.json"
        sha256 = meta.get("tokenizer_sha256")
        known = sha256 is not None or path.is_file()
        self.tokenizer = path.read_bytes() if known else None
        if sha256 is not None and sha256 != hashlib.sha256(self.tokenizer).hexdigest():
            raise UserError(f"{path} is not the one that meta.json names; {self.cure}")

    def _open(self, folder: Path, split: str) -> None:
        names = shard_names(split, len(self.known))
        for path in find_shards(folder, split):
            if path.name not in names:
                raise UserError(f"{path} is a shard too many: meta.json names {len(names)}")
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit < most and len(names) > limit // 4:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.path = folder / names[0]
        self.shards = [
            Shard(folder / name, tokens * self.dtype.itemsize, checksum, self.cure)
            for name, (tokens, checksum) in zip(names, self.known, strict=True)
        ]

    def __reduce__(self) -> tuple:
        """Another process opens the files again, which must hold the same."""
        return Tokens, (*self.origin, self.digest)

    def read(self, begin: int, count: int) -> np.ndarray:
        """Return the ids begin to begin + count, int64."""
        size = self.dtype.itemsize
        end = begin + count
        data = []
        index = int(np.searchsorted(self.ends, begin, "right"))
        while begin < end:
            last = int(self.ends[index])
            first = begin - (last - self.known[index][0])
            stop = min(end, last)
            data.append(self.shards[index].read(first * size, (stop - begin) * size))
            begin = stop
            index += 1
        ids = np.frombuffer(b"".join(data), self.dtype)
        if ids.max() >= self.ids:
            raise UserError(
                f"{self.shards[index - 1].path} has token id {ids.max()} near position "
                f"{end - count:,}, and meta.json says that all are below {self.ids:,}; {self.cure}"
            )
        return ids.astype(np.int64)


def _cure(folder: Path) -> str:
    """Return the command that makes what is missing in the folder of a dataset."""
    program = os.path.relpath(ROOT / "data" / "prepare.py")
    if (folder / "prepare.py").is_file():
        return f"run: python {os.path.relpath(folder / 'prepare.py')}"
    if find_shards(folder, "train") and not (folder / "meta.json").exists():
        return f"if its tokens are GPT-2's, run: python {program} --adopt {folder}"
    return f"run: python {program} --name {folder.name} FILES..."
