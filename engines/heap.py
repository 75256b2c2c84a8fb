"""glibc's heap, which keeps what is freed, and gives back what fragments it."""

import ctypes
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
GROWTH = 2**26  # bytes in holes that a heap may have
STATM = Path("/proc/self/statm")


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: returned to the system after each tensor, it came back as page
    faults, a third of a step. Arrays above 256 MB are returned, as they would fragment the heap.
    Threads share it, so that what one freed another can have."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**28)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Return to the system what is free now."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def memory_now() -> int:
    """Return the bytes of this process that are in memory; 0 where the system does not tell."""
    if not STATM.is_file():
        return 0
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Holes:
    """Keeps the holes of the heap small. What outlives a layer, such as the graph of a recomputed
    one, is tiny, but lies between large tensors that were freed: holes that those of the next layer
    do not fit into. Without a limit memory grows with every layer."""

    def __init__(self):
        self.usual: int | None = None  # bytes in memory after the first layer without holes

    def limit(self) -> None:
        """Return the holes to the system if they have grown. To be called after every layer."""
        used = memory_now()
        if self.usual is None:
            self.usual = used
        elif used > self.usual + GROWTH:
            return_freed_memory()
            self.usual = None
