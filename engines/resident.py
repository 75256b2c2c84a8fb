"""The model, its gradients and its optimizer on one device: plain PyTorch, every test's oracle."""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from configuration import Configuration
from engines import Batches, StepStats, finish, read_tensor
from engines.optimizer import BETAS, MOMENTS, clip_factor, learning_rate, parameter_groups
from model import GPT, IGNORE, derive_seed


class ResidentEngine:
    """Holds 16 bytes a parameter: fp32 weight, gradient and two moments. With bf16 a copy of the
    weights does the computing; it is refreshed once a step."""

    def __init__(self, config: Configuration, training: bool = True):
        self.config, self.training, self.updates = config, training, 0
        self.device = torch.device("cuda" if config.backend == "GPU" else "cpu")
        with torch.device("meta"):
            self.master = GPT(config)
        self.master.to_empty(device="cpu")

    def initialize(self, progress: Callable = iter) -> None:
        with ThreadPoolExecutor() as pool:
            units = self.master.units()
            drawn = [pool.submit(self.master.init_unit, u, self.config.seed) for u in units]
            finish(drawn, progress)
        self._place()

    def load(
        self, read: Callable[[str], Tensor], updates: int | None, progress: Callable = iter
    ) -> None:
        with torch.no_grad():
            for name, parameter in progress(list(self.master.named_parameters())):
                parameter.copy_(read_tensor(read, name, parameter.shape))
        self._place()
        if updates is not None and self.training:
            self.updates = updates
            for name, parameter in self.master.named_parameters():
                moments = {
                    moment: read_tensor(read, f"{moment}.{name}", parameter.shape).to(self.device)
                    for moment in MOMENTS
                }
                step = torch.tensor(float(updates), device=self.device)
                self.optimizer.state[parameter] = {"step": step, **moments}

    def _place(self) -> None:
        """Moves the weights to the device and makes what computes with them."""
        self.master.to(self.device)
        self.model = self.master
        if self.config.precision == "bf16":
            self.model = copy.deepcopy(self.master).bfloat16()
            for parameter in self.model.parameters():
                parameter.grad_dtype = torch.float32  # sums of micro-batches lose digits in bf16
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.master.parameters(), self.config.weight_decay),
            lr=self.config.learning_rate,
            betas=BETAS,
            eps=self.config.adam_epsilon,
            fused=True,
        )

    def run(
        self, batches: Batches, start: int, stop: int, progress: Callable[[float], None]
    ) -> Iterator[StepStats]:
        source = batches(0, 1)
        self.model.train()
        for step in range(start, stop):
            began = time.perf_counter()
            ids, targets = source[step]
            loss = self._accumulate(ids, targets, step, progress) / targets.size
            rate = learning_rate(self.config, step + 1)
            grad_norm = self._update(loss, rate)
            seconds = time.perf_counter() - began
            yield StepStats(step + 1, loss, grad_norm, rate, targets.size, seconds)

    def _accumulate(
        self, ids: np.ndarray, targets: np.ndarray, step: int, progress: Callable[[float], None]
    ) -> float:
        """Leaves the gradient of the mean loss in the model, returns the sum of the losses."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, (x, y) in enumerate(self._micro_batches(ids, targets)):
            loss = self.model(x, y, derive_seed(self.config.seed, step, number))
            (loss / targets.size).backward()
            total += loss.detach()
            progress(min(1.0, (number + 1) * self.config.micro_batch_size / len(ids)))
        return total.item()

    def _update(self, loss: float, rate: float) -> float:
        """Clips, steps and returns the norm; a step that is not finite changes nothing."""
        grads = [p.grad for p in self.model.parameters()]
        for master, grad in zip(self.master.parameters(), grads, strict=True):
            master.grad = grad
        norm = torch.nn.utils.get_total_norm(grads).item()
        if np.isfinite(loss) and np.isfinite(norm):
            torch._foreach_mul_(grads, clip_factor(self.config, norm))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.updates += 1
            self._refresh()
        torch._foreach_zero_(grads)
        return norm

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.model is not self.master:
            torch._foreach_copy_(list(self.model.parameters()), list(self.master.parameters()))

    def evaluate(self, batches: Batches, progress: Callable = iter) -> tuple[float, int]:
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.model.eval()
        with torch.no_grad():
            for ids, targets in progress(batches(0, 1)):
                for x, y in self._micro_batches(ids, targets):
                    total += self.model(x, y)
                tokens += int((targets != IGNORE).sum())
        self.model.train()
        return total.item(), tokens

    def _micro_batches(self, ids: np.ndarray, targets: np.ndarray) -> Iterator[tuple]:
        for begin in range(0, len(ids), self.config.micro_batch_size):
            rows = slice(begin, begin + self.config.micro_batch_size)
            yield tuple(torch.from_numpy(a[rows]).to(self.device) for a in (ids, targets))

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for unit, module in self.master.units().items():
            named = {f"{unit}.{name}": p for name, p in module.named_parameters()}
            yield unit, {name: p.detach().cpu() for name, p in named.items()}
            for moment in MOMENTS:
                yield (
                    f"{moment}.{unit}",
                    {
                        f"{moment}.{name}": self._moment(p, moment).cpu()
                        for name, p in named.items()
                    },
                )

    def _moment(self, parameter: Tensor, moment: str) -> Tensor:
        """Before the first update there are none yet: zeros."""
        state = self.optimizer.state.get(parameter)
        return state[moment] if state else torch.zeros_like(parameter, requires_grad=False)

    def close(self) -> None:
        self.master = self.model = self.optimizer = None
