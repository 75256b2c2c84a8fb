"""The engines, each a way to run the steps of a model."""

from configuration import Configuration
from engines.base import Engine
from engines.heap import keep_freed_memory


def open_engine(config: Configuration, training: bool = True, blocks_on_device: int = 0) -> Engine:
    """Returns the engine of a resolved configuration; without `training` it holds weights only.
    blocks_on_device: of a streamed model, those whose state stays on the device."""
    if config.backend == "CPU":
        keep_freed_memory()
    if config.engine == "streaming":
        from engines.streaming import StreamingEngine

        return StreamingEngine(config, training, blocks_on_device)
    if config.engine == "resident":
        from engines.resident import ResidentEngine as Chosen
    elif config.engine == "sharded":
        from engines.sharded import ShardedEngine as Chosen
    else:
        from engines.cerebras import CerebrasEngine as Chosen
    return Chosen(config, training)
