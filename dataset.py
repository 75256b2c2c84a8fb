"""Batches of token ids, as a pure function of (seed, step).

A dataset is a folder with train.bin and val.bin (flat little-endian uint16 or uint32 ids, as
nanoGPT writes them), tokenizer.json and meta.json, which says how many there are and has checksums
of all: each block of a file is verified when it is read for the first time.

`TrainBatches` and `EvalBatches` are indexed by step; systems (`rank` of `world`) take consecutive
rows of the global batch, so that its content does not depend on how many there are.
"""

import copy
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


def find_folder(name: str) -> Path:
    """The folder of a dataset; a relative one that is not below the current folder is looked for in
    the repository, where configurations place theirs."""
    path, ours = Path(name), Path(__file__).parent / name
    return ours if not path.exists() and ours.exists() else path


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
    """The ids of one split of a dataset, from files that stay open: who prepares it anew does not
    change them. `meta` is what its meta.json holds, `text_bytes` the size of the text that the
    split stands for, if it is known, `tokenizer` the content of tokenizer.json, if there is one.

    Raises UserError where the folder is not a prepared dataset, a file of it does not hold what
    meta.json says, its ids do not fit in `vocab_size`, or its digest is not `digest`.
    """

    def __init__(self, name: str, split: str, vocab_size: int, digest: str | None = None):
        folder = find_folder(name)
        self.origin = (str(folder.absolute()), split, vocab_size)
        self.path = folder / f"{split}.bin"
        self.cure = cure = _cure(folder)
        for path in (self.path, folder / "meta.json", folder / "tokenizer.json"):
            if path.exists() and not path.is_file():  # opening a pipe would wait forever
                raise UserError(f"{path} is not a file; {cure}")
        try:
            self.meta = meta = read_sealed(folder / "meta.json")
            self.dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[meta["dtype"]]
            self.count, self.ids = count_of(meta["tokens"][split]), count_of(meta["vocab_size"])
            self.text_bytes = count_of(meta.get("bytes", {}).get(split, 0))
            self.checksums = list(meta["crc32"][split])
            self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115
            size = os.fstat(self.file.fileno()).st_size
            sha256, path = meta.get("tokenizer_sha256"), folder / "tokenizer.json"
            known = sha256 is not None or path.is_file()
            self.tokenizer = path.read_bytes() if known else None
            if sha256 is not None and sha256 != hashlib.sha256(self.tokenizer).hexdigest():
                raise UserError(f"{folder}/tokenizer.json is not the one of meta.json; {cure}")
        except FileNotFoundError as error:
            missing = Path(error.filename).absolute()
            raise UserError(f"{missing} is missing: prepare the dataset; {cure}") from None
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
        content = repr((self.dtype.name, self.count, self.checksums))
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        if digest not in (None, self.digest):
            raise UserError(f"{self.path} was replaced while it was in use; start again")
        self.verified = np.zeros(len(self.checksums), bool)

    def __reduce__(self) -> tuple:
        """Another process opens the files again, which must hold the same."""
        return Tokens, (*self.origin, self.digest)

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


def _cure(folder: Path) -> str:
    """The command that makes what is missing in the folder of a dataset."""
    program = os.path.relpath(Path(__file__).parent / "data" / "prepare.py")
    if (folder / "prepare.py").is_file():
        return f"run: python {os.path.relpath(folder / 'prepare.py')}"
    if (folder / "train.bin").is_file() and not (folder / "meta.json").exists():
        return f"if its tokens are GPT-2's, run: python {program} --adopt {folder}"
    return f"run: python {program} --name {folder.name} FILES..."


class Batches:
    """What batches have in common: opened tokens, and the part of one of `world` systems."""

    tokens: Tokens
    rank: int
    world: int

    def share(self, rank: int, world: int) -> "Batches":
        """The same batches, of which `rank` takes its rows."""
        mine = copy.copy(self)
        mine.rank, mine.world = rank, world
        return mine


@lru_cache(maxsize=2)
def _draw_epoch(seed: int, epoch: int, room: int, windows: int) -> tuple[int, np.ndarray]:
    """An epoch's offset, and the order of its windows."""
    # RandomState's numbers are frozen for good: the order survives upgrades of numpy
    random = np.random.RandomState([seed, epoch])
    return random.randint(room + 1), random.permutation(windows)


class TrainBatches(Batches):
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
        shift, order = _draw_epoch(self.seed, epoch, self.room, self.windows)
        return shift + int(order[place]) * self.length


class EvalBatches(Batches):
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
