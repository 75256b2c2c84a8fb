"""How the documents of a source are cut into shards and divided into train and val. Both depend on
the documents alone, so any number of processes, in any number of runs, makes the same files."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import isqrt

import numpy as np
from tokenizers import Tokenizer

from data.sources import read_file, read_part
from weights.hub import reading

SEED = 2357
NEAR = 0.25  # how far whole documents may be from the share of val
SHARD = 2**24  # bytes of text of the first shards; later ones have GROWTH times the root of all
GROWTH = 2**11  # text before them: 10 GB is cut into about 100, 8 TB into fewer than 3,000
BYTES_A_TOKEN, COUNTED = 4, 20  # of English; documents of which the tokens of one are counted


@dataclass
class State:
    """The place up to which documents were read, and what they hold up to there."""

    file: int = 0  # its index among the files
    position: int = 0  # in it
    documents: int = 0
    skipped: int = 0  # that are null or empty
    text: int = 0  # bytes
    val: int = 0  # bytes of them in val
    end: bool = False  # whether it is the end
    tokens: float = 0.0  # about so many
    counted: int = 0  # tokens of some documents, and their bytes
    counted_bytes: int = 0


@dataclass
class Limit:
    """Stops the reading at about so many tokens. Those of one document in COUNTED are counted, else
    taken from the bytes of the others; without a tokenizer BYTES_A_TOKEN."""

    tokens: int
    tokenizer: Tokenizer | None
    by_character: bool

    def reached(self, state: State, text: str, size: int) -> bool:
        """Add a document to the state, and return whether it is the last."""
        size = len(text) if self.by_character else size
        if self.tokenizer is not None and (state.documents - 1) % COUNTED == 0:
            with reading("the tokenizer can't encode the documents"):
                state.counted += len(self.tokenizer.encode(text).ids)
            state.counted_bytes += size
        rate = 1.0 if self.by_character else 1 / BYTES_A_TOKEN
        if state.counted_bytes:
            rate = state.counted / state.counted_bytes
        state.tokens += rate * size + 1
        return state.tokens >= self.tokens


@dataclass
class Piece:
    """The documents of a shard: `spans` of files (path, position, number of documents). Those of
    the indices `val` become val, and the last `share` of the document `cut`."""

    column: str
    spans: list[tuple[str, int, int]]
    val: np.ndarray
    cut: int
    share: float
    after: State

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield (split, text) for each document."""
        val, number = set(self.val.tolist()), -1
        for path, start, documents in self.spans:
            for text in read_part(path, self.column, start, documents):
                if text is None:
                    continue
                number += 1
                if self.share and number == self.cut:
                    place = len(text) - max(1, round(len(text) * self.share))
                    if place:
                        yield "train", text[:place]
                    yield "val", text[place:]
                else:
                    yield "val" if number in val else "train", text


Choose = Callable[[State, np.ndarray, int], tuple[np.ndarray, int, float]]


def pieces(
    files: Sequence[str],
    column: str,
    choose: Choose,
    limit: Limit | None = None,
    known: Callable[[int], dict | None] = lambda number: None,
) -> Iterator[tuple[int, Piece]]:
    """Yield the number and documents of each shard. Where `known` has one, it is left out and its
    documents are not read. `choose` names the documents of val."""
    state, found = State(), None
    for number in count():
        if state.end:
            return
        if shard := known(number):
            state, found = State(**shard["after"]), None
            continue
        found = found or _documents(files, column, state)
        piece = _take(found, column, state, choose, limit, number)
        if not piece.after.documents > state.documents and number:
            return
        state = piece.after
        yield number, piece


def _documents(
    files: Sequence[str], column: str, state: State
) -> Iterator[tuple[int, str, int, str | None]]:
    """Yield (index, path, position after it, text) for each document from a state on."""
    start = state.position
    for index in count(state.file):
        try:
            path = files[index]
        except IndexError:
            return
        for position, text in read_file(path, column, start):
            yield index, path, position, text
        start = 0


def _take(
    found: Iterator, column: str, state: State, choose: Choose, limit: Limit | None, number: int
) -> Piece:
    """Read the documents of one shard."""
    after, spans, sizes = replace(state), [], array("q")
    most = state.text + max(SHARD, GROWTH * isqrt(state.text))
    for index, path, position, text in found:
        if not spans or index != after.file:
            spans.append((path, state.position if index == state.file else 0, 0))
        spans[-1] = (*spans[-1][:2], spans[-1][2] + 1)
        after.file, after.position = index, position
        if text is None:
            after.skipped += 1
            continue
        size = len(text.encode())
        sizes.append(size)
        after.documents += 1
        after.text += size
        after.end = limit is not None and limit.reached(after, text, size)
        if after.end or after.text >= most:
            break
    else:
        after.end = True
    val, cut, share = choose(state, np.array(sizes, np.int64), number)
    after.val += int(sum(sizes[i] for i in val) + (share * sizes[cut] if share else 0))
    return Piece(column, spans, val, cut, share, after)


def draw(state: State, sizes: np.ndarray, number: int) -> tuple[np.ndarray, int, float]:
    """Return the documents of a shard that become val, in order, the one whose end does, and which
    share of it: 0 where whole documents bring val near to a hundredth of all bytes up to here."""
    order = np.random.default_rng(SEED + number).permutation(len(sizes))
    drawn, hundredth = np.cumsum(sizes[order]), (state.text + sizes.sum()) / 100
    target = hundredth - state.val
    count = int(np.searchsorted(drawn, target))  # whole documents below the target
    below = int(drawn[count - 1]) if count else 0
    if count == len(sizes) or target - below < NEAR * hundredth:
        return np.sort(order[:count]), 0, 0.0
    if drawn[count] - target < NEAR * hundredth and len(sizes) > 1:
        return np.sort(order[: count + 1]), 0, 0.0
    return np.sort(order[:count]), int(order[count]), (target - below) / sizes[order[count]]
