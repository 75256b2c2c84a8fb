"""The seam between the loop and what runs a step: every engine offers the same few methods."""

import ctypes
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from configuration import Configuration
from engines.optimizer import counts, learning_rate, spike_limits
from model import GPT, IGNORE

INIT_BYTES = 4e9  # of units that are drawn at a time
LOSS_ROWS = {"CPU": 1024, "GPU": 4096}  # positions whose logits exist at one time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
Batches = Callable[[int, int], object]  # (rank, world) -> indexed by step: (ids, targets) of int64
Read = Callable[[str, slice | None], Tensor]  # (name, rows or None: all) -> tensor on the CPU


@dataclass
class StepStats:
    """What a finished step tells."""

    step: int  # optimizer steps completed
    loss: float  # mean over the tokens of the global batch, in nats
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    seconds: float
    counted: bool  # else it changed nothing: it was not finite, or a spike
    can_save: bool = True  # whether `state` has what the weights were after this step

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))


class Engine(Protocol):
    """Runs the steps of a model. Tensors have the same names in every engine: those of the model's
    parameters, and the same behind `exp_avg.` and `exp_avg_sq.` for Adam's moments."""

    updates: int  # optimizer steps that changed the weights
    recent: deque[tuple[float, float]]  # losses and norms of the last steps that were finite

    def initialize(self, progress: Callable = iter) -> None:
        """Draws the initial weights from the seed, a unit after the other through `progress`."""

    def load(self, read: Read, updates: int | None, progress: Callable = iter) -> None:
        """Takes every tensor from `read`; with updates None the weights alone."""

    def run(
        self, batches: Batches, start: int, stop: int, progress: Callable[[float], None]
    ) -> Iterator[StepStats]:
        """Trains from step start to stop, yielding each step in order, possibly late. `progress` is
        told the fraction of the step that is done, now and then."""

    def evaluate(self, batches: Batches, progress: Callable = iter) -> tuple[float, int]:
        """The sum of the losses over all batches, in fp64, and the tokens counted."""

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name of a group, its tensors on the CPU), one kind of tensor of one unit at a time; with
        several systems the rows of each, in the order of their ranks."""

    def close(self) -> None:
        """Frees what the engine holds."""


def run_steps(
    engine: "Engine", source: object, start: int, stop: int, one_step: Callable
) -> Iterator[StepStats]:
    """What `run` yields, where one_step(step, ids, targets, rate, limits) -> (loss, gradient's
    norm), which changes nothing unless they are within the limits."""
    config = engine.config
    for step in range(start, stop):
        began = time.perf_counter()
        rate = learning_rate(config, step + 1)
        limits = spike_limits(engine.recent if config.skip_loss_spikes else ())
        loss, grad_norm = one_step(step, *source[step], rate, limits)
        tokens = config.batch_size * config.sequence_length
        seconds, counted = time.perf_counter() - began, counts(loss, grad_norm, limits)
        stats = StepStats(step + 1, loss, grad_norm, rate, tokens, seconds, counted)
        if stats.finite:
            engine.recent.append((loss, grad_norm))
        yield stats


def micro_batches(
    config: Configuration, device: torch.device, ids: np.ndarray, targets: np.ndarray
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, targets) on the device, micro_batch_size sequences at a time."""
    for begin in range(0, len(ids), config.micro_batch_size):
        rows = slice(begin, begin + config.micro_batch_size)
        cut = [torch.from_numpy(a[rows]) for a in (ids, targets)]
        if device.type == "cuda":  # a copy from pinned memory waits for nothing
            cut = [tensor.pin_memory() for tensor in cut]
        yield tuple(tensor.to(device, non_blocking=True) for tensor in cut)


@torch.no_grad()
def sum_losses(model: GPT, source: Iterable, losses: Callable) -> tuple[float, int]:
    """What `evaluate` returns, where losses(ids, targets) -> the sum over them, fp64."""
    total, tokens = 0.0, 0
    model.eval()
    try:
        for ids, targets in source:
            total += losses(ids, targets).item()
            tokens += int((targets != IGNORE).sum())
    finally:
        model.train()
    return total, tokens


def prepare_compute(config: Configuration, model: GPT, training: bool = True) -> None:
    """Sets what makes a model that is in its place faster on its device; `compile`: one compilation
    serves all blocks, and another the loss."""
    model.loss_rows = LOSS_ROWS[config.backend]
    if config.backend == "GPU":
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.compile is True and training:  # else it is over too soon
        options = {"fallback_random": True}  # dropout draws what it draws without
        for block in model.decoder:
            block.compile(options=options)
        model.cross_entropy = torch.compile(model.cross_entropy)


def draw_units(model: GPT, draw: Callable[[str], None], progress: Callable) -> None:
    """draw(unit) for every unit, several at a time as far as INIT_BYTES allow."""
    sizes = [sum(4 * p.numel() for p in unit.parameters()) for unit in model.units().values()]
    at_a_time = max(1, min(os.cpu_count(), int(INIT_BYTES / max(sizes))))
    with ThreadPoolExecutor(at_a_time) as pool:
        finish([pool.submit(draw, unit) for unit in model.units()], progress)


def finish(futures: list[Future], progress: Callable) -> None:
    """Waits for all, or after an error for none that has not begun."""
    try:
        for future in progress(futures):
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def open_engine(config: Configuration, training: bool = True) -> Engine:
    """The engine of a resolved configuration; without `training` it holds weights only."""
    if config.backend == "CPU":
        _keep_freed_memory()
    if config.engine == "streaming":
        from engines.streaming import StreamingEngine

        return StreamingEngine(config, training)
    if config.engine == "resident":
        from engines.resident import ResidentEngine

        return ResidentEngine(config, training)
    if config.engine == "sharded":
        from engines.sharded import ShardedEngine

        return ShardedEngine(config, training)
    from engines.cerebras import CerebrasEngine

    return CerebrasEngine(config, training)


def _keep_freed_memory() -> None:
    """Has glibc keep memory that is freed: given back to the system after each tensor, it returns
    as page faults, which took a third of a step (docs/log.md). Larger arrays would leave holes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**28)
        mallopt(M_TRIM_THRESHOLD, -1)
