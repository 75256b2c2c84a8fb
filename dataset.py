"""Batches of token ids, as a pure function of (seed, step).

A dataset is a folder with train.bin and val.bin (flat little-endian uint16 or uint32 ids, as
nanoGPT writes them), tokenizer.json and meta.json, which says how many there are. `TrainBatches`
and `EvalBatches` are indexed by step; systems (`rank` of `world`) take consecutive rows of the
global batch, so that its content does not depend on how many there are.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from errors import UserError

IGNORE = -100  # a target that is not counted


class Tokens:
    """The ids of one split of a dataset; `meta` is what its meta.json holds.

    Raises UserError where the folder is not a prepared dataset, a file of it does not hold what
    meta.json says, or its ids do not fit in `vocab_size`.
    """

    def __init__(self, folder: str, split: str, vocab_size: int):
        self.path, self.vocab_size = Path(folder) / f"{split}.bin", vocab_size
        script = Path(folder) / "prepare.py"
        own = f"data/prepare.py --name {Path(folder).name} FILES..."
        cure = f"run: python {script if script.is_file() else own}"
        try:
            self.meta = json.loads(Path(folder, "meta.json").read_text(encoding="utf-8"))
            self.dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
            self.count, ids = int(self.meta["tokens"][split]), int(self.meta["vocab_size"])
            self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115
            size = os.fstat(self.file.fileno()).st_size
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing: prepare the dataset; {cure}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}/meta.json is damaged ({error}); {cure}") from None
        if size != self.count * self.dtype.itemsize:
            raise UserError(
                f"{self.path} has {size:,} bytes where meta.json says {self.count:,} tokens of "
                f"{self.dtype.itemsize}; {cure}"
            )
        if self.count < 2:
            raise UserError(f"{self.path} has no token to predict; {cure}")
        if ids > vocab_size:
            raise UserError(
                f"{folder} has {ids:,} token ids, the model's vocab_size is {vocab_size:,}; "
                f"add --vocab_size {ids} or take another dataset"
            )

    def read(self, begin: int, count: int) -> np.ndarray:
        """Ids begin to begin + count, int64."""
        size = self.dtype.itemsize
        content = os.pread(self.file.fileno(), count * size, begin * size)
        if len(content) < count * size:
            raise UserError(f"{self.path} ends early: it was cut; prepare the dataset again")
        ids = np.frombuffer(content, self.dtype)
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.path} holds token id {ids.max()} near position {begin:,}, above the "
                f"model's vocab_size {self.vocab_size:,}; prepare the dataset again"
            )
        return ids.astype(np.int64)


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
        numbers = step * self.batch_size + np.arange(self.batch_size)
        mine = np.array_split(numbers, self.world)[self.rank]
        rows = np.stack([self.tokens.read(self._begin(n), self.length + 1) for n in mine])
        return rows[:, :-1], rows[:, 1:]

    def _begin(self, number: int) -> int:
        epoch, place = divmod(int(number), self.windows)
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
