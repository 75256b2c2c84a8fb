"""Batches of token ids, as a pure function of (seed, step).

A process (`rank` of `size`) gets consecutive rows of the global batch, whose content does not
depend on how many processes there are. Nothing of an epoch's order is kept in memory.
"""

from dataclasses import dataclass

import numpy as np

from common.console import UserError
from common.shuffle import hashed, shuffled
from common.tokens import Tokens, sources_of
from configuration import Configuration
from loss import IGNORE


@dataclass
class Batch:
    """ids and targets: int32 of (rows of this process, sequence_length), half of what the model
    takes. offsets: the tokens at which the sequences of the global batch begin, counted through the
    sources in their order."""

    ids: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray


class Source:
    """The sequences of one folder, in epochs. Each cuts the text into windows from another offset
    and visits them in another order."""

    def __init__(self, tokens: Tokens, sequence_length: int, key: np.ndarray):
        self.tokens = tokens
        self.length = sequence_length
        self.key = key
        windows = (tokens.count - 1) // sequence_length
        if windows < 1:
            raise UserError(
                f"{tokens.path} has {tokens.count:,} tokens, fewer than one sequence of "
                f"{sequence_length} and the token after it; lower sequence_length"
            )
        self.windows = max(1, windows - 1)  # one less leaves room to shift them
        self.room = tokens.count - 1 - self.windows * sequence_length

    def offsets(self, indices: np.ndarray) -> np.ndarray:
        """Return the tokens at which sequences begin, by their indices since the run began."""
        epochs, places = np.divmod(indices, self.windows)
        shifts = (hashed(self.key, epochs, 0) % (self.room + 1)).astype(np.int64)
        keys = hashed(self.key, epochs, 1)
        return shifts + shuffled(places, self.windows, keys) * self.length


class TrainData:
    """The batches of train, of one folder or of several with weights."""

    def __init__(self, config: Configuration):
        weights = sources_of(config.dataset)
        opened = [Tokens(name, "train", config.vocab_size) for name in weights]
        check_alike(opened)
        self.length = config.sequence_length
        self.batch_size = config.batch_size
        self.sources = [
            Source(tokens, self.length, hashed(config.seed, i)) for i, tokens in enumerate(opened)
        ]
        self.tokens = opened[0]
        self.shares = [weight / sum(weights.values()) for weight in weights.values()]
        self.begins = np.cumsum([0, *(tokens.count for tokens in opened)])

    @property
    def digest(self) -> str:
        """Of the tokens of all sources, and of their shares."""
        digests = [source.tokens.digest for source in self.sources]
        shares = [f"{share:.6f}" for share in self.shares] if len(digests) > 1 else []
        return " ".join(digests + shares)

    def get(self, step: int, rank: int = 0, size: int = 1) -> Batch:
        """Return the batch of a step, counted from 0."""
        offsets = self.offsets(step)
        mine = np.array_split(offsets, size)[rank]
        rows = np.empty((len(mine), self.length + 1), np.int32)
        for i, begin in enumerate(mine):
            rows[i] = self._read(begin)
        return Batch(ids=rows[:, :-1], targets=rows[:, 1:], offsets=offsets)

    def _read(self, begin: int) -> np.ndarray:
        index = int(np.searchsorted(self.begins, begin, "right")) - 1
        tokens = self.sources[index].tokens
        return tokens.read(int(begin - self.begins[index]), self.length + 1)

    def offsets(self, step: int) -> np.ndarray:
        """Return where the sequences of a step's global batch begin, as in Batch."""
        source_of, indices = self.mixed(step * self.batch_size, self.batch_size)
        offsets = np.empty(self.batch_size, np.int64)
        for i, source in enumerate(self.sources):
            mine = source_of == i
            offsets[mine] = self.begins[i] + source.offsets(indices[mine])
        return offsets

    def mixed(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sources of sequences first to first + count of the run, and their indices
        among those of their source.

        Sequence n of a source is due at (n + 1/2) / its share, and all run in the order in which
        they are due: Webster's method, which the Sainte-Laguë seats of a parliament follow, too.
        """
        slack = len(self.shares)  # the place of a sequence is nearer than this to when it is due
        before = 0  # sequences that are due before those that are ordered here
        source_of = []
        indices = []
        due = []
        for source, share in enumerate(self.shares):
            begin = max(0, int(share * (first - slack)) - 2)
            end = int(share * (first + count + slack)) + 3
            numbers = np.arange(begin, end)
            before += begin
            source_of.append(np.full_like(numbers, source))
            indices.append(numbers)
            due.append((numbers + 0.5) / share)
        order = np.argsort(np.concatenate(due), kind="stable")
        chosen = order[first - before :][:count]
        return np.concatenate(source_of)[chosen], np.concatenate(indices)[chosen]


def check_alike(opened: list[Tokens]) -> None:
    """Raises UserError where the ids of the sources do not mean the same."""
    for tokens in opened[1:]:
        for key in ("tokenizer_sha256", "dtype", "vocab_size"):
            if tokens.meta.get(key) != opened[0].meta.get(key):
                raise UserError(
                    f"{tokens.path.parent} and {opened[0].path.parent} differ in {key}: prepare "
                    f"both with one tokenizer"
                )


def open_val(config: Configuration) -> list["EvalData"]:
    """Return the evaluation data of each source of a configuration."""
    opened = [EvalData(config, name) for name in sources_of(config.dataset)]
    check_alike([data.tokens for data in opened])
    return opened


class EvalData:
    """The sequences of a folder's val in order, `len` of them: every token is predicted once, or
    those of eval_batches batches, of which each of several folders has its part. The last sequence
    is padded with targets IGNORE."""

    def __init__(self, config: Configuration, folder: str):
        self.tokens = Tokens(folder, "val", config.vocab_size)
        self.length = config.sequence_length
        self.sequences = -(-(self.tokens.count - 1) // self.length)
        if config.eval_batches is not None:
            folders = len(sources_of(config.dataset))
            most = -(-config.eval_batches * config.batch_size // folders)
            self.sequences = min(self.sequences, most)

    def __len__(self) -> int:
        return self.sequences

    def get(self, first: int, count: int, rank: int = 0, size: int = 1) -> Batch:
        """Return sequences first to first + count, as far as there are; a process may get none."""
        indices = np.arange(first, min(first + count, self.sequences))
        mine = np.array_split(indices, size)[rank]
        ids = np.zeros((len(mine), self.length), np.int32)
        targets = np.full((len(mine), self.length), IGNORE, np.int32)
        for row, index in enumerate(mine):
            begin = int(index) * self.length
            count = min(self.length + 1, self.tokens.count - begin)
            window = self.tokens.read(begin, count)
            ids[row, : count - 1] = window[:-1]
            targets[row, : count - 1] = window[1:]
        return Batch(ids, targets, indices * self.length)
