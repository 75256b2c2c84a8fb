"""The engines, each a way to run the steps of a model."""

import ctypes

from configuration import Configuration
from engines.base import Engine

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def open_engine(config: Configuration, training: bool = True) -> Engine:
    """The engine of a resolved configuration; without `training` it holds weights only."""
    if config.backend == "CPU":
        _keep_freed_memory()
    if config.engine == "streaming":
        from engines.streaming import StreamingEngine as Chosen
    elif config.engine == "resident":
        from engines.resident import ResidentEngine as Chosen
    elif config.engine == "sharded":
        from engines.sharded import ShardedEngine as Chosen
    else:
        from engines.cerebras import CerebrasEngine as Chosen
    return Chosen(config, training)


def _keep_freed_memory() -> None:
    """Has glibc keep freed memory: returned to the system after each tensor, it came back as page
    faults, a third of a step. Arrays above 256 MB are returned, as they would fragment the heap."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**28)
        mallopt(M_TRIM_THRESHOLD, -1)
