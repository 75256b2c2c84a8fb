"""Batches of token ids, as a pure function of (seed, step).

A process (`rank` of `size`) gets consecutive rows of the global batch, whose content does not
depend on how many processes there are.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from loss import IGNORE
from runtime.console import UserError
from runtime.tokens import Tokens


@dataclass
class Batch:
    """ids and targets: int64 of (rows of this process, sequence_length). offsets: the tokens at
    which the sequences of the global batch begin in the file."""

    ids: np.ndarray
    targets: np.ndarray
    offsets: list[int]


@lru_cache(maxsize=2)
def _draw_epoch(seed: int, epoch: int, room: int, windows: int) -> tuple[int, np.ndarray]:
    """An epoch's offset, and the order of its windows."""
    # RandomState's numbers are frozen for good: the order survives upgrades of numpy
    random = np.random.RandomState([seed, epoch])
    return random.randint(room + 1), random.permutation(windows)


class TrainData:
    """The batches of train.bin. Each epoch cuts the text into windows from another offset and
    visits them in another order."""

    def __init__(
        self, folder: str, vocab_size: int, sequence_length: int, batch_size: int, seed: int
    ):
        self.tokens = Tokens(folder, "train", vocab_size)
        self.length, self.batch_size, self.seed = sequence_length, batch_size, seed
        windows = (self.tokens.count - 1) // sequence_length
        if windows < 1:
            raise UserError(
                f"{self.tokens.path} has {self.tokens.count:,} tokens, fewer than one sequence of "
                f"{sequence_length} and the token after it; lower sequence_length"
            )
        self.windows = max(1, windows - 1)  # one less leaves room to shift them
        self.room = self.tokens.count - 1 - self.windows * sequence_length

    def get(self, step: int, rank: int = 0, size: int = 1) -> Batch:
        """The batch of a step, counted from 0."""
        offsets = self.offsets(step)
        mine = np.array_split(offsets, size)[rank]
        rows = np.stack([self.tokens.read(begin, self.length + 1) for begin in mine])
        return Batch(rows[:, :-1], rows[:, 1:], offsets)

    def offsets(self, step: int) -> list[int]:
        """Where the sequences of a step's global batch begin, in tokens."""
        first = step * self.batch_size
        return [self._offset(number) for number in range(first, first + self.batch_size)]

    def _offset(self, number: int) -> int:
        epoch, place = divmod(number, self.windows)
        shift, order = _draw_epoch(self.seed, epoch, self.room, self.windows)
        return shift + int(order[place]) * self.length


class EvalData:
    """The sequences of val.bin in order, `len` of them: every token is predicted once, or those of
    `batches` batches. The last sequence is padded with targets IGNORE."""

    def __init__(
        self,
        folder: str,
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        batches: int | None = None,
    ):
        self.tokens, self.length = Tokens(folder, "val", vocab_size), sequence_length
        sequences = -(-(self.tokens.count - 1) // sequence_length)
        self.sequences = min(sequences, batches * batch_size) if batches else sequences

    def __len__(self) -> int:
        return self.sequences

    def get(self, first: int, count: int, rank: int = 0, size: int = 1) -> Batch:
        """Sequences first to first + count, as far as there are; a process may get none."""
        numbers = range(first, min(first + count, self.sequences))
        mine = np.array_split(numbers, size)[rank].astype(int)
        ids = np.zeros((len(mine), self.length), np.int64)
        targets = np.full((len(mine), self.length), IGNORE, np.int64)
        for row, number in enumerate(mine):
            begin = int(number) * self.length
            window = self.tokens.read(begin, min(self.length + 1, self.tokens.count - begin))
            ids[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        return Batch(ids, targets, [number * self.length for number in numbers])
