"""Where the streaming engine keeps its state: in host RAM or in files, a chunk at a time.

Each unit of the model has four fp32 arrays, the kinds: weight, first moment, second moment,
gradient. They are cut into chunks of CHUNK numbers; a chunk holds its numbers of every kind, one
after the other, so any neighbouring kinds move in one piece.
"""

import fcntl
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import torch
from torch import Tensor

from errors import UserError

CHUNK = 4 * 2**20  # numbers of a kind that move at a time: 16 MB, 64 MB of all four
BUFFERS = 6  # chunks that are on their way from or to the disk at a time
WEIGHT, STATE, GRADIENT, ALL = slice(0, 1), slice(0, 3), slice(3, 4), slice(0, 4)
PAGE = 4096  # bytes: what direct input and output is aligned to
THREADS = 4


def padded(count: int) -> int:
    """The numbers that `count` take up in the store: whole pages."""
    numbers = PAGE // 4
    return -(-count // numbers) * numbers


@dataclass
class Chunk:
    """Numbers of a unit in host memory: `data` is (kinds, count), some neighbouring kinds."""

    unit: str
    index: int
    kinds: slice
    data: Tensor
    buffer: Tensor | None = None


class Store:
    """What both stores share: chunks that are given back are written behind the caller's back.

    sizes: numbers of each unit, padded.
    """

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        self.written: dict[str, list[Future]] = defaultdict(list)
        self.lock = Lock()  # of `written`, which the engine's threads share

    def spans(self, unit: str) -> list[tuple[int, int]]:
        """(begin, end) of each chunk of a unit."""
        size = self.sizes[unit]
        return [(begin, min(begin + CHUNK, size)) for begin in range(0, size, CHUNK)]

    def room(self, unit: str, index: int, kinds: slice) -> Chunk:
        """A chunk to be filled; waits until there is a buffer."""
        raise NotImplementedError

    def _read(self, chunk: Chunk) -> Chunk:
        """Fills a chunk and returns it."""
        return chunk

    def _write(self, chunk: Chunk, kinds: slice) -> None:
        """Writes the first kinds of a chunk."""

    def _free(self, chunk: Chunk) -> None:
        """Takes back the buffer."""

    def read(self, unit: str, index: int, kinds: slice) -> "Future[Chunk]":
        """A chunk as it was written last, soon; `settle` comes first."""
        chunk = self.room(unit, index, kinds)

        def fill() -> Chunk:
            try:
                return self._read(chunk)
            except UserError:
                self._free(chunk)
                raise

        return self.threads.submit(fill)

    def give_back(self, chunk: Chunk, after, write: slice | None = None) -> None:
        """Ends the use of a chunk once the event `after` has passed; `write` are the kinds (counted
        from the chunk's first) that have changed."""

        def finish() -> None:
            try:
                after.synchronize()
                if write is not None:
                    self._write(chunk, write)
            finally:
                self._free(chunk)

        with self.lock:
            self.written[chunk.unit].append(self.threads.submit(finish))

    def settle(self, unit: str) -> None:
        """Waits until all that was given back of a unit is written; raises what went wrong."""
        with self.lock:
            futures = list(self.written[unit])
        for future in futures:
            future.result()
        with self.lock:  # only now: another thread that settles must wait for them too
            pending = self.written[unit]
            self.written[unit] = [future for future in pending if future not in futures]

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)


class RamStore(Store):
    """In host RAM; pinned if a GPU reads it: pinned memory comes in powers of two, as chunks do."""

    def __init__(self, sizes: dict[str, int], kinds: int, pin: bool):
        super().__init__(sizes)
        try:
            self.chunks = {
                unit: [torch.zeros(kinds, e - b, pin_memory=pin) for b, e in self.spans(unit)]
                for unit in sizes
            }
        except RuntimeError as error:  # torch's way to say that there is no memory
            reason = str(error).splitlines()[0]
            raise UserError(f"host memory: {reason}; take --stream_to disk") from None

    def room(self, unit: str, index: int, kinds: slice) -> Chunk:
        return Chunk(unit, index, kinds, self.chunks[unit][index][kinds])


class DiskStore(Store):
    """In a file a unit, below a folder of its own in `parent`, gone when the store is closed.

    The files are preallocated, and read and written past the page cache where the file system can.
    What is read must be what was written, by its checksum.
    Raises UserError where the space is short, or a file can't be read or written.
    """

    def __init__(self, sizes: dict[str, int], kinds: int, pin: bool, parent: Path):
        super().__init__(sizes)
        self.kinds, self.files = kinds, {}
        self.sums: dict[tuple[str, int, int], int] = {}  # by unit, chunk and kind; zeros have 0
        self.free: SimpleQueue[Tensor | None] = SimpleQueue()
        try:
            self.folder, self.claim = _make_folder(parent)
        except OSError as error:
            raise UserError(f"stream_dir {parent}: {error.strerror}; name another") from None
        try:
            for unit, size in sizes.items():
                self.files[unit] = self._create(self.folder / unit, size * kinds * 4)
        except OSError as error:
            self.close()
            total = sum(sizes.values()) * kinds * 4 / 1e9
            raise UserError(
                f"stream_dir {parent}: {error.strerror}; {total:,.2f} GB are needed"
            ) from None
        largest = min(CHUNK, max(sizes.values()))
        for _ in range(BUFFERS):
            spare = 0 if pin else PAGE // 4  # pinned memory is aligned
            memory = torch.empty(kinds * largest + spare, pin_memory=pin)
            self.free.put(memory[-memory.data_ptr() % PAGE // 4 :])

    def _create(self, path: Path, size: int) -> int:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        try:
            return os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:  # not every file system can
            return os.open(path, os.O_RDWR)

    def room(self, unit: str, index: int, kinds: slice) -> Chunk:
        begin, end = self.spans(unit)[index]
        buffer, rows = self.free.get(), kinds.stop - kinds.start
        if buffer is None:
            raise RuntimeError("the store was closed")
        data = buffer[: rows * (end - begin)].view(rows, end - begin)
        return Chunk(unit, index, kinds, data, buffer)

    def _free(self, chunk: Chunk) -> None:
        self.free.put(chunk.buffer)

    def _read(self, chunk: Chunk) -> Chunk:
        self._move(os.preadv, chunk, chunk.data)
        for kind, numbers in enumerate(chunk.data, chunk.kinds.start):
            if checksum(numbers) != self.sums.get((chunk.unit, chunk.index, kind), 0):
                raise self._lost(chunk, "it does not hold what was written to it")
        return chunk

    def _write(self, chunk: Chunk, kinds: slice) -> None:
        for kind, numbers in enumerate(chunk.data[kinds], chunk.kinds.start + kinds.start):
            self.sums[chunk.unit, chunk.index, kind] = checksum(numbers)
        self._move(os.pwritev, chunk, chunk.data[kinds])

    def _move(self, call: Callable, chunk: Chunk, data: Tensor) -> None:
        file = self.files[chunk.unit]
        rest = memoryview(data.numpy()).cast("B")
        # a chunk's place follows from its number: those before it are whole
        place = (chunk.index * CHUNK * self.kinds + chunk.kinds.start * data.shape[1]) * 4
        try:
            while rest:
                # a write beyond the end of a file that was cut would fill it up with zeros
                if os.fstat(file).st_size != self.sizes[chunk.unit] * self.kinds * 4:
                    raise OSError(0, "its size has changed, something has cut it")
                moved = call(file, [rest], place)
                if moved == 0:
                    raise OSError(0, "nothing can be moved")
                rest, place = rest[moved:], place + moved
        except OSError as error:
            raise self._lost(chunk, error.strerror) from None

    def _lost(self, chunk: Chunk, why: str) -> UserError:
        return UserError(
            f"{self.folder / chunk.unit}: {why}; weights can't be streamed through it, and "
            f"training stops: the last checkpoint is whole, go on from it with --checkpoint_path "
            f"latest"
        )

    def close(self) -> None:
        super().close()
        for _ in range(BUFFERS):
            self.free.put(None)  # for who still waits
        for descriptor in self.files.values():
            os.close(descriptor)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.claim)


def checksum(numbers: Tensor) -> int:
    """Of fp32 numbers, an even count: their bits, summed up as 64-bit integers, at the speed of the
    memory. A flipped bit changes it, and so does a page that was lost; 0 for zeros."""
    return int(numbers.view(torch.int64).sum())


PREFIX = "gigagpt-store-"


def _make_folder(parent: Path) -> tuple[Path, int]:
    """A folder of this process's own, and the lock that tells others that it lives."""
    with _locked(parent, wait=True):  # nobody removes a folder between its making and its locking
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        return folder, _lock(folder)


def remove_abandoned(parent: Path) -> None:
    """Removes the stores whose process was killed."""
    if any(parent.glob(f"{PREFIX}*")):
        with _locked(parent, wait=True):
            for folder in parent.glob(f"{PREFIX}*"):
                with suppress(OSError), _locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path, wait: bool = False) -> int:
    """Raises BlockingIOError if another has it; the system lets go of it with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[None]:
    descriptor = _lock(folder, wait)
    try:
        yield
    finally:
        os.close(descriptor)
