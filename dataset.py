"""Batches of token ids, as a pure function of (seed, step).

A dataset is a folder with train.bin and val.bin (flat little-endian uint16 or uint32 ids, as
nanoGPT writes them), tokenizer.json and meta.json, which says how many there are and has checksums
of all: each block of a file is verified when it is read for the first time.

`TrainBatches` and `EvalBatches` are indexed by step; systems (`rank` of `world`) take consecutive
rows of the global batch, so that its content does not depend on how many there are.
"""

import hashlib
import os
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from errors import UserError
from files import count_of, read_sealed, write_sealed

IGNORE = -100  # a target that is not counted
BLOCK = 2**18  # bytes of a file that have a checksum: 9 billion tokens have 70,000


def write_meta(folder: Path, meta: dict) -> dict:
    """Writes, and returns, the meta.json of train.bin and val.bin in `folder`: vocab_size and
    dtype, which `meta` holds beside what the caller wants to tell, the tokens in each file and its
    checksums."""
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
    """The ids of one split of a dataset; `meta` is what its meta.json holds, `text_bytes` the size
    of the text that the split stands for, if it is known.

    Raises UserError where the folder is not a prepared dataset, a file of it does not hold what
    meta.json says, or its ids do not fit in `vocab_size`.
    """

    def __init__(self, folder: str, split: str, vocab_size: int):
        self.path = Path(folder) / f"{split}.bin"
        script = Path(folder) / "prepare.py"
        own = f"data/prepare.py --name {Path(folder).name} FILES..."
        self.cure = cure = f"run: python {script if script.is_file() else own}"
        for path in (self.path, Path(folder, "meta.json"), Path(folder, "tokenizer.json")):
            if path.exists() and not path.is_file():  # opening a pipe would wait forever
                raise UserError(f"{path} is not a file; {cure}")
        try:
            self.meta = meta = read_sealed(Path(folder, "meta.json"))
            self.dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[meta["dtype"]]
            self.count, self.ids = count_of(meta["tokens"][split]), count_of(meta["vocab_size"])
            self.text_bytes = count_of(meta.get("bytes", {}).get(split, 0))
            self.checksums = list(meta["crc32"][split])
            self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115
            size = os.fstat(self.file.fileno()).st_size
            sha256 = meta.get("tokenizer_sha256")
            if sha256 is not None and sha256 != _sha256(Path(folder, "tokenizer.json")):
                raise UserError(f"{folder}/tokenizer.json is not the one of meta.json; {cure}")
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing: prepare the dataset; {cure}") from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder}/meta.json is damaged ({str(error)[:200]}); {cure}") from None
        if size != self.count * self.dtype.itemsize:
            raise UserError(
                f"{self.path} has {size:,} bytes where meta.json says {self.count:,} tokens of "
                f"{self.dtype.itemsize}; {cure}"
            )
        if len(self.checksums) != -(-size // BLOCK):
            raise UserError(f"{folder}/meta.json is damaged (crc32 of {split}); {cure}")
        if self.count < 2:
            raise UserError(f"{self.path} has no token to predict; {cure}")
        if self.ids > vocab_size:
            raise UserError(
                f"{folder} has {self.ids:,} token ids, the model's vocab_size is {vocab_size:,}; "
                f"add --vocab_size {self.ids} or take another dataset"
            )
        self.verified = np.zeros(len(self.checksums), bool)

    def read(self, begin: int, count: int) -> np.ndarray:
        """Ids begin to begin + count, int64."""
        size = self.dtype.itemsize
        for block in range(begin * size // BLOCK, -(-(begin + count) * size // BLOCK)):
            if not self.verified[block]:
                self._verify(block)
        ids = np.frombuffer(self._pread(count * size, begin * size), self.dtype)
        if ids.max() >= self.ids:
            raise UserError(
                f"{self.path} holds token id {ids.max()} near position {begin:,}, and meta.json "
                f"says that they are below {self.ids:,}; {self.cure}"
            )
        return ids.astype(np.int64)

    def _verify(self, block: int) -> None:
        begin = block * BLOCK
        size = min(BLOCK, self.count * self.dtype.itemsize - begin)
        if zlib.crc32(self._pread(size, begin)) != self.checksums[block]:
            raise UserError(
                f"{self.path} was changed between bytes {begin:,} and {begin + size:,} (its "
                f"checksum differs); {self.cure}"
            )
        self.verified[block] = True

    def _pread(self, size: int, begin: int) -> bytes:
        parts, place, end = [], begin, begin + size
        while place < end:  # a read may give less than was asked for
            try:
                part = os.pread(self.file.fileno(), end - place, place)
            except OSError as error:
                reason = f"can't be read at byte {place:,} ({error.strerror})"
                raise UserError(f"{self.path} {reason}; check the disk") from None
            if not part:
                raise UserError(f"{self.path} ends early: it was cut; {self.cure}")
            parts.append(part)
            place += len(part)
        return b"".join(parts)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TrainBatches:
    """`batches[step]` -> (ids, targets), each int64 of (rows of this rank, sequence_length).

    Each epoch cuts the text into windows from another offset and visits them in another order.
    """

    def __init__(
        self,
        folder: str,
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.tokens = Tokens(folder, "train", vocab_size)
        self.length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.rank, self.world = rank, world
        whole = (self.tokens.count - 1) // sequence_length
        if whole < 1:
            raise UserError(
                f"{self.tokens.path} has {self.tokens.count:,} tokens, fewer than one sequence of "
                f"{sequence_length} and the token after it; lower sequence_length"
            )
        self.windows = max(1, whole - 1)  # one less leaves room to shift them
        self.room = self.tokens.count - 1 - self.windows * sequence_length
        self.epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        mine = np.array_split(self.places(step), self.world)[self.rank]
        rows = np.stack([self.tokens.read(begin, self.length + 1) for begin in mine])
        return rows[:, :-1], rows[:, 1:]

    def places(self, step: int) -> list[int]:
        """Where in train.bin the sequences of a global batch begin, in tokens."""
        first = step * self.batch_size
        return [self._begin(number) for number in range(first, first + self.batch_size)]

    def _begin(self, number: int) -> int:
        epoch, place = divmod(number, self.windows)
        shift, order = self.epoch(epoch)
        return shift + int(order[place]) * self.length

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        # RandomState's numbers are frozen for good: the order survives upgrades of numpy
        random = np.random.RandomState([self.seed, epoch])
        return random.randint(self.room + 1), random.permutation(self.windows)


class EvalBatches:
    """`batches[i]` for i below `len(batches)`: val.bin in order, every token predicted once.

    The last window is as short as what is left; in a batch it is padded with targets IGNORE. With
    several systems the last batches of some may be empty (0 rows).
    """

    def __init__(
        self,
        folder: str,
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        batches: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.tokens = Tokens(folder, "val", vocab_size)
        self.length, self.batch_size = sequence_length, batch_size
        self.rank, self.world = rank, world
        self.windows = -(-(self.tokens.count - 1) // sequence_length)
        whole = -(-self.windows // batch_size)
        self.batches = whole if batches is None else min(batches, whole)

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= i < self.batches:
            raise IndexError(i)
        numbers = np.arange(i * self.batch_size, min((i + 1) * self.batch_size, self.windows))
        mine = np.array_split(numbers, self.world)[self.rank]
        ids = np.zeros((len(mine), self.length), np.int64)
        targets = np.full((len(mine), self.length), IGNORE, np.int64)
        for row, number in enumerate(mine):
            begin = int(number) * self.length
            window = self.tokens.read(begin, min(self.length + 1, self.tokens.count - begin))
            ids[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        return ids, targets
