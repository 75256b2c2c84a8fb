"""What the engines share. An engine runs the steps of a model; the loop knows no more of it."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configuration import Configuration
from dataset import Batch, EvalData, TrainData
from engines.heap import return_freed_memory
from engines.optimizer import SPIKE_STEPS, is_applied, learning_rate, spike_limits
from engines.state import EngineState, Watch
from loss import IGNORE
from model import GPT

Report = Callable[[float], None]  # is called with the fraction of a step that is done
Limits = tuple[float, float]  # of loss and gradient norm, above which an update is skipped


@dataclass
class StepStats:
    """What is known of a finished step."""

    step: int  # steps completed, with those whose update was skipped
    loss: float  # mean over the tokens of the global batch, in nats
    grad_norm: float  # before clipping
    learning_rate: float
    seconds: float
    tokens: int  # seen since the run began
    offsets: np.ndarray  # where the sequences of the batch begin in train
    applied: bool  # else the update was skipped: not finite, or a loss spike
    can_save: bool = True  # whether `state` has the weights after this step

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))


class Engine(EngineState):
    """Runs the steps of a model, and holds its weights; without `training` no more than these. An
    engine implements `step`."""

    rank = 0  # of `size` processes that share a batch
    size = 1

    def __init__(self, config: Configuration, training: bool = True):
        super().__init__(config, training)
        self.device = torch.device("cuda" if config.backend == "GPU" else "cpu")
        self.tokens = 0  # seen since the run began
        self.recent = deque(maxlen=SPIKE_STEPS)  # losses and norms of the last finite steps

    def step(
        self, step: int, batch: Batch, rate: float, limits: Limits, report_progress: Report
    ) -> tuple[float, float]:
        """Runs a training step, counted from 0, at this learning rate; returns the loss and the
        gradient norm. The update is skipped unless these are within the limits."""
        raise NotImplementedError

    def sum_losses(self, batch: Batch) -> Tensor:
        """Returns the sum of the losses of a batch, fp64."""
        parts = micro_batches(self.config, self.device, batch)
        return torch.stack([self.model(ids, targets) for ids, targets in parts]).double().sum()

    def close(self) -> None:
        """Frees what the engine holds."""
        self.model = None

    def run(
        self, data: TrainData, start: int, stop: int, report_progress: Report
    ) -> Iterator[StepStats]:
        """Trains from step start to stop and yields each step in order, possibly late."""
        config = self.config
        self.model.train()
        for step in range(start, stop):
            began = time.perf_counter()
            rate = learning_rate(config, step + 1)
            limits = spike_limits(self.recent if config.skip_loss_spikes else ())
            batch = data.get(step, self.rank, self.size)
            loss, norm = self.step(step, batch, rate, limits, report_progress)
            if step == start:  # what it keeps for the run has fragmented the heap
                return_freed_memory()
            self.tokens += config.batch_size * config.sequence_length
            stats = StepStats(
                step=step + 1,
                loss=loss,
                grad_norm=norm,
                learning_rate=rate,
                seconds=time.perf_counter() - began,
                tokens=self.tokens,
                offsets=batch.offsets,
                applied=is_applied(loss, norm, limits),
            )
            if stats.finite:
                self.recent.append((loss, norm))
            yield stats

    @torch.no_grad()
    def evaluate(self, data: EvalData, sequences: int, track: Watch = iter) -> tuple[float, int]:
        """Returns the sum of the losses over all data and the number of tokens, with so many
        sequences at a time."""
        total = 0.0
        tokens = 0
        return_freed_memory()  # the arrays of an evaluation do not fit into the holes of a step
        with self.evaluating():
            for begin in track(range(0, len(data), sequences)):
                batch = data.get(begin, sequences, self.rank, self.size)
                total += self.sum_losses(batch).item()
                tokens += int((batch.targets != IGNORE).sum())
        return_freed_memory()
        return total, tokens

    def last_logits(self, texts: list[Tensor], places: list[int]) -> list[Tensor]:
        """Returns the logits (vocab_size,) at one place of each text, ids (1, length) on the
        device; every process must call it."""
        return [self.model(ids)[0, place] for ids, place in zip(texts, places, strict=True)]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Turns the model's dropout off."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()


def micro_batches(
    config: Configuration, device: torch.device, batch: Batch
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (ids, targets) on the device, int64, micro_batch_size sequences at a time."""
    tensors = [torch.from_numpy(array) for array in (batch.ids, batch.targets)]
    if device.type == "cuda":  # one copy, which does not block: pin_memory keeps strides, else two
        tensors = [t.contiguous().pin_memory().to(device, non_blocking=True) for t in tensors]
    parts = (tensor.split(config.micro_batch_size) for tensor in tensors)
    for ids, targets in zip(*parts, strict=True):
        yield ids.long(), targets.long()


@contextmanager
def hidden_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hides `.grad` while the model runs forward: torch.compile breaks the graph at a parameter
    whose gradient has another dtype, as with bf16."""
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in gradients:
        parameter.grad = None
    yield
    for parameter, gradient in gradients:
        parameter.grad = gradient


def prepare_compute(config: Configuration, model: GPT, training: bool = True) -> None:
    """Sets how a placed model computes: the precision of matmuls, activation checkpointing, and
    `compile`: the blocks share one compilation, and the loss has another."""
    if config.backend == "GPU":
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if not training:  # an evaluation is over too soon to compile
        return
    # not block.compile(), which FSDP's hooks have Dynamo skip; each wraps the one before it
    if config.activation_checkpointing is True and config.engine != "resident":
        for block in model.decoder:
            block.forward = recomputed(block.forward)
    if config.compile is True:
        options = {"fallback_random": True}  # the same dropout masks as without
        for block in model.decoder:
            block.forward = torch.compile(block.forward, options=options)
        model.cross_entropy = torch.compile(model.cross_entropy)


def recomputed(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a block's forward function that saves its input alone. The backward pass recomputes
    the rest, but for the last matmul, whose result it does not need."""

    def run(x: Tensor) -> Tensor:
        return checkpoint(forward, x, use_reentrant=False)

    return run
