"""The parameter store of the streaming engine: in memory or in files, a chunk at a time.

Each layer of the model has four fp32 arrays, the kinds: weight, exp_avg, exp_avg_sq, gradient. They
are cut into chunks. A chunk has its elements of every kind, one after the other, so that any
neighbouring kinds move in one piece.
"""

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import torch
from torch import Tensor

from common.console import UserError
from common.files import locked
from engines.buffers import Array
from engines.threads import start_threads

# Elements of a kind that move at a time: 128 MB to a GPU at full rate, 16 MB to a disk's queue
CHUNK = {"ram": 32 * 2**20, "disk": 4 * 2**20}
BUFFERS = 6  # chunks that are on their way from or to the disk at a time
WEIGHT = slice(0, 1)  # of the kinds
STATE = slice(0, 3)
GRADIENT = slice(3, 4)
ALL = slice(0, 4)
PAGE = 4096  # bytes: what direct input and output is aligned to
THREADS = 2  # that read, and as many that write


def padded(count: int) -> int:
    """Returns the elements that `count` take up in the store: whole pages."""
    in_page = PAGE // 4
    return -(-count // in_page) * in_page


@dataclass
class Chunk:
    """Elements of a layer in memory: `data` is (kinds, count), some neighbouring kinds."""

    layer: str
    index: int
    kinds: slice
    data: Tensor
    buffer: Tensor | None = None


class Store:
    """What both stores share: a chunk that is given back may be changed and is written later.

    sizes: elements of each layer, padded.
    """

    def __init__(self, sizes: dict[str, int], kinds: int, chunk: int):
        self.sizes = sizes
        self.kinds = kinds
        self.chunk = chunk
        self.written = defaultdict(list)  # events or futures, by layer
        self.mutex = Lock()  # of `written`, which the engine's threads share

    def spans(self, layer: str) -> list[tuple[int, int]]:
        """Returns (begin, end) of each chunk of a layer."""
        size = self.sizes[layer]
        return [(begin, min(begin + self.chunk, size)) for begin in range(0, size, self.chunk)]

    def buffer(self, layer: str, index: int, kinds: slice) -> Chunk:
        """Returns a chunk to be filled; waits until a buffer is free."""
        raise NotImplementedError

    def read(self, layer: str, index: int, kinds: slice) -> "Future[Chunk]":
        """Starts to read a chunk as it was written last; `wait` comes first."""
        raise NotImplementedError

    def give_back(self, chunk: Chunk, after: object, write: slice | None = None) -> None:
        """Ends the use of a chunk once the event `after` has passed; `write` are the kinds (counted
        from the chunk's first) that have changed."""
        raise NotImplementedError

    def _wait_one(self, written: object) -> None:
        """Waits for one of `written`."""
        raise NotImplementedError

    def wait(self, layer: str) -> None:
        """Waits until all that was given back of a layer is written; raises what went wrong."""
        with self.mutex:
            pending = list(self.written[layer])
        for one in pending:
            self._wait_one(one)
        with self.mutex:  # only now: another thread that waits must wait for them too
            self.written[layer] = [one for one in self.written[layer] if one not in pending]


class MemoryStore(Store):
    """In memory: a device's, or the host's, which is pinned if a GPU reads it."""

    def __init__(
        self, sizes: dict[str, int], kinds: int, pin: bool, device: torch.device | None = None
    ):
        super().__init__(sizes, kinds, CHUNK["ram"])
        try:
            self.arrays = {
                layer: Array(size * kinds, device=device, pinned=pin)
                for layer, size in sizes.items()
            }
        except OSError as error:
            raise UserError(f"host memory: {error.strerror}; use --stream_to disk") from None
        self.pinned = all(array.pinned for array in self.arrays.values())

    def buffer(self, layer: str, index: int, kinds: slice) -> Chunk:
        begin, end = self.spans(layer)[index]
        rows = self.arrays[layer].tensor[begin * self.kinds : end * self.kinds]
        return Chunk(layer, index, kinds, rows.view(self.kinds, -1)[kinds])

    def read(self, layer: str, index: int, kinds: slice) -> "Future[Chunk]":
        future = Future()
        future.set_result(self.buffer(layer, index, kinds))
        return future

    def give_back(self, chunk: Chunk, after: object, write: slice | None = None) -> None:
        if write is not None:
            with self.mutex:
                self.written[chunk.layer].append(after)

    def _wait_one(self, written: object) -> None:
        written.synchronize()

    def close(self) -> None:
        for array in self.arrays.values():
            array.unpin()


class DiskStore(Store):
    """In one file for each layer, in a folder of its own in `parent`, which is removed at the end.

    The files are preallocated, and read and written past the page cache where the file system can.
    What is read must be what was written, by its checksum.
    Raises UserError where the space is short, or a file can't be read or written.
    """

    def __init__(self, sizes: dict[str, int], kinds: int, pin: bool, parent: Path):
        super().__init__(sizes, kinds, CHUNK["disk"])
        self.files = {}
        # apart: a write waits for the device, and no read should wait with it
        self.readers = start_threads(THREADS, "read")
        self.writers = start_threads(THREADS, "write")
        self.sums: dict[tuple[str, int, int], int] = {}  # by layer, chunk and kind; zeros have 0
        self.free: SimpleQueue[Tensor | None] = SimpleQueue()
        self.buffers: list[Array] = []
        try:
            self.folder, self.lock = _make_folder(parent)
        except OSError as error:
            raise UserError(f"stream_dir {parent}: {error.strerror}; use another") from None
        try:
            for layer, size in sizes.items():
                self.files[layer] = self._create(self.folder / layer, size * kinds * 4)
        except OSError as error:
            self.close()
            total = sum(sizes.values()) * kinds * 4 / 1e9
            raise UserError(
                f"stream_dir {parent}: {error.strerror}; {total:,.2f} GB are needed"
            ) from None
        size = kinds * min(self.chunk, max(sizes.values()))
        self.buffers = [Array(size, pinned=pin) for _ in range(BUFFERS)]
        self.pinned = all(array.pinned for array in self.buffers)
        for array in self.buffers:
            self.free.put(array.tensor)

    def _create(self, path: Path, size: int) -> int:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        try:
            return os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:  # not every file system can
            return os.open(path, os.O_RDWR)

    def buffer(self, layer: str, index: int, kinds: slice) -> Chunk:
        begin, end = self.spans(layer)[index]
        buffer = self.free.get()
        if buffer is None:
            raise RuntimeError("the store was closed")
        rows = kinds.stop - kinds.start
        data = buffer[: rows * (end - begin)].view(rows, end - begin)
        return Chunk(layer, index, kinds, data, buffer)

    def read(self, layer: str, index: int, kinds: slice) -> "Future[Chunk]":
        chunk = self.buffer(layer, index, kinds)

        def fill() -> Chunk:
            try:
                return self._read(chunk)
            except UserError:
                self.free.put(chunk.buffer)
                raise

        return self.readers.submit(fill)

    def give_back(self, chunk: Chunk, after: object, write: slice | None = None) -> None:
        def finish() -> None:
            try:
                after.synchronize()
                if write is not None:
                    self._write(chunk, write)
            finally:
                self.free.put(chunk.buffer)

        with self.mutex:
            self.written[chunk.layer].append(self.writers.submit(finish))

    def _wait_one(self, written: Future) -> None:
        written.result()

    def _read(self, chunk: Chunk) -> Chunk:
        """Fills a chunk and returns it."""
        self._move(os.preadv, chunk, chunk.data)
        for kind, elements in enumerate(chunk.data, chunk.kinds.start):
            if checksum(elements) != self.sums.get((chunk.layer, chunk.index, kind), 0):
                raise self._lost(chunk, "it does not hold what was written to it")
        return chunk

    def _write(self, chunk: Chunk, kinds: slice) -> None:
        """Writes these kinds of a chunk, counted from its first."""
        for kind, elements in enumerate(chunk.data[kinds], chunk.kinds.start + kinds.start):
            self.sums[chunk.layer, chunk.index, kind] = checksum(elements)
        self._move(os.pwritev, chunk, chunk.data[kinds])

    def _move(self, call: Callable, chunk: Chunk, data: Tensor) -> None:
        file = self.files[chunk.layer]
        rest = memoryview(data.numpy()).cast("B")
        # the chunks before it are complete
        place = (chunk.index * self.chunk * self.kinds + chunk.kinds.start * data.shape[1]) * 4
        try:
            while rest:
                # a write beyond the end of a truncated file would fill the gap with zeros
                if os.fstat(file).st_size != self.sizes[chunk.layer] * self.kinds * 4:
                    raise OSError(0, "its size has changed")
                moved = call(file, [rest], place)
                if moved == 0:
                    raise OSError(0, "nothing can be moved")
                rest = rest[moved:]
                place += moved
        except OSError as error:
            raise self._lost(chunk, error.strerror) from None

    def _lost(self, chunk: Chunk, why: str) -> UserError:
        return UserError(
            f"{self.folder / chunk.layer}: {why}; training stops, as weights can't be streamed "
            f"through it: resume from the last checkpoint with --checkpoint_path latest"
        )

    def close(self) -> None:
        for threads in (self.readers, self.writers):
            threads.shutdown(cancel_futures=True)
        for _ in range(BUFFERS):
            self.free.put(None)  # for threads that still wait
        for array in self.buffers:
            array.unpin()
        for descriptor in self.files.values():
            os.close(descriptor)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.close()


def checksum(elements: Tensor) -> int:
    """Returns the sum of the bits of fp32 elements, an even count, taken as 64-bit integers, at the
    speed of the memory. A flipped bit changes it, and so does a lost page; 0 for zeros."""
    return int(elements.view(torch.int64).sum())


PREFIX = "gigagpt-store-"


def _make_folder(parent: Path) -> tuple[Path, ExitStack]:
    """Makes a folder of this process's own, and the lock that shows others that it is in use."""
    with locked(parent, wait=True):  # nobody removes a folder before it is locked
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = ExitStack()
        lock.enter_context(locked(folder))
        return folder, lock


def remove_abandoned(parent: Path) -> None:
    """Removes the stores of killed processes."""
    if any(parent.glob(f"{PREFIX}*")):
        with locked(parent, wait=True):
            for folder in parent.glob(f"{PREFIX}*"):
                with suppress(OSError), locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)
