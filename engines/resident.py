"""The model, its gradients and its optimizer on one device: plain PyTorch, every test's oracle."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from configuration import Configuration
from engines import (
    Batches,
    Read,
    StepStats,
    draw_units,
    micro_batches,
    prepare_compute,
    run_steps,
    sum_losses,
)
from engines.optimizer import (
    MOMENTS,
    SPIKE_STEPS,
    adamw_step,
    clip_factor,
    counts,
    decays,
    square_sum,
)
from model import GPT, derive_seed


class ResidentEngine:
    """Holds 16 bytes a parameter: fp32 weight, gradient and two moments. With bf16 a copy of the
    weights does the computing; it is refreshed once a step."""

    def __init__(self, config: Configuration, training: bool = True):
        self.config, self.training, self.updates = config, training, 0
        self.recent = deque(maxlen=SPIKE_STEPS)
        self.device = torch.device("cuda" if config.backend == "GPU" else "cpu")
        with torch.device("meta"):
            self.master = GPT(config)
        self.master.to_empty(device="cpu")

    def initialize(self, progress: Callable = iter) -> None:
        draw_units(self.master, partial(self.master.init_unit, seed=self.config.seed), progress)
        self._place()

    def load(self, read: Read, updates: int | None, progress: Callable = iter) -> None:
        with torch.no_grad():
            for name, parameter in progress(list(self.master.named_parameters())):
                parameter.copy_(read(name, None))
        self._place()
        if updates is not None and self.training:
            self.updates = updates
            for moment in MOMENTS:
                for name, tensor in self.moments[moment].items():
                    tensor.copy_(read(f"{moment}.{name}", None))

    def _place(self) -> None:
        """Moves the weights to the device and makes what computes with them."""
        self.master.to(self.device)
        self.model = self.master
        if self.config.precision == "bf16":
            self.model = copy.deepcopy(self.master).bfloat16()
            for parameter in self.model.parameters():
                parameter.grad_dtype = torch.float32  # sums of micro-batches lose digits in bf16
        prepare_compute(self.config, self.model, self.training)
        self.moments = {
            moment: {
                name: torch.zeros_like(p.detach()) for name, p in self.master.named_parameters()
            }
            for moment in (MOMENTS if self.training else ())
        }

    def run(
        self, batches: Batches, start: int, stop: int, progress: Callable[[float], None]
    ) -> Iterator[StepStats]:
        def one_step(step: int, ids: np.ndarray, targets: np.ndarray, *rate_and_limits) -> tuple:
            return self._update(self._accumulate(ids, targets, step, progress), *rate_and_limits)

        self.model.train()
        yield from run_steps(self, batches(0, 1), start, stop, one_step)

    def _accumulate(
        self, ids: np.ndarray, targets: np.ndarray, step: int, progress: Callable[[float], None]
    ) -> Tensor:
        """Leaves the gradient of the mean loss in the model, and returns that loss, fp64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, (x, y) in enumerate(micro_batches(self.config, self.device, ids, targets)):
            loss = self.model(x, y, derive_seed(self.config.seed, step, number))
            (loss / targets.size).backward()
            total += loss.detach()
            progress(min(1.0, (number + 1) * self.config.micro_batch_size / len(ids)))
        return total / targets.size

    def _update(
        self, loss: Tensor, rate: float, limits: tuple[float, float]
    ) -> tuple[float, float]:
        """Clips and steps; returns the loss and the norm. A step beyond the limits changes nothing:
        the device sees to that, and is waited for once, when all of the step is queued."""
        grads = [p.grad for p in self.model.parameters()]
        norm = square_sum(grads).sqrt()
        torch._foreach_mul_(grads, clip_factor(self.config, norm))
        skip = (~counts(loss, norm, limits)).float()
        moments = (self.moments[moment].values() for moment in MOMENTS)
        state = list(zip(self.master.parameters(), grads, *moments, strict=True))
        for weight_decay, decaying in ((self.config.weight_decay, True), (0.0, False)):
            if rows := [row for row in state if decays(row[0]) == decaying]:
                columns = map(list, zip(*rows, strict=True))
                step = (rate, self.updates + 1, weight_decay)
                adamw_step(self.config, *step, *columns, skip)
        self._refresh()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.updates += int(1 - skip.item())
        return loss.item(), norm.item()

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.model is not self.master:
            torch._foreach_copy_(list(self.model.parameters()), list(self.master.parameters()))

    def evaluate(self, batches: Batches, progress: Callable = iter) -> tuple[float, int]:
        def losses(ids: np.ndarray, targets: np.ndarray) -> Tensor:
            cut = micro_batches(self.config, self.device, ids, targets)
            return torch.stack([self.model(x, y) for x, y in cut]).double().sum()

        return sum_losses(self.model, progress(batches(0, 1)), losses)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for unit, module in self.master.units().items():
            named = {f"{unit}.{name}": p for name, p in module.named_parameters()}
            yield unit, {name: p.detach().cpu() for name, p in named.items()}
            for moment in MOMENTS:
                yield (
                    f"{moment}.{unit}",
                    {f"{moment}.{name}": self.moments[moment][name].cpu() for name in named},
                )

    def close(self) -> None:
        self.master = self.model = self.moments = None
