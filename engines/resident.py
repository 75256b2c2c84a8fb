"""The model, its gradients and its optimizer on one device: plain PyTorch, every test's oracle."""

import copy

import torch

from configuration import Configuration
from dataset import Batch
from engines.base import Engine, Limits, Report, hidden_gradients, micro_batches, prepare_compute
from engines.optimizer import MOMENTS, clip_divisor, is_applied, make_optimizer, square_sum
from model import derive_seed


class ResidentEngine(Engine):
    """Holds 16 bytes a parameter: fp32 weight, gradient and two moments. With bf16 the model is a
    copy of the weights, refreshed once a step."""

    def __init__(self, config: Configuration, training: bool = True):
        super().__init__(config, training)
        self.model.to_empty(device=self.device)
        self.weights = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(config, self.weights.values()) if training else None

    def ready(self) -> None:
        if self.config.precision == "bf16":
            self.model = copy.deepcopy(self.model).bfloat16()
            for parameter in self.model.parameters():
                parameter.grad_dtype = torch.float32  # bf16 sums of micro-batches lose digits
        prepare_compute(self.config, self.model, self.training)
        if self.training:
            self._open_moments()

    def _open_moments(self) -> None:
        """Make the moments now: made in the first step, they would leave holes in its memory."""
        for weight in self.weights.values():
            state = self.optimizer.state[weight]
            if not state:
                state["step"] = torch.tensor(0.0, device=weight.device)
                state.update({moment: torch.zeros_like(weight) for moment in MOMENTS})

    def step(
        self, step: int, batch: Batch, rate: float, limits: Limits, report_progress: Report
    ) -> tuple[float, float]:
        config = self.config
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._open_tables()
        tokens = batch.targets.size
        done = 0
        for i, (ids, targets) in enumerate(micro_batches(config, self.device, batch)):
            seed = derive_seed(config.seed, step, i)
            with hidden_gradients(self.model.decoder.parameters()):
                part = self.model(ids, targets, seed, tokens)
            part.backward()
            loss += part.detach()
            done += len(ids)
            report_progress(done / len(batch.ids))
        gradients = [parameter.grad for parameter in self.model.parameters()]
        norm = square_sum(gradients).sqrt()
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            weight.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.grad_scale = clip_divisor(config, norm)
        # 1: the optimizer changes nothing. The device decides, and the host waits for it only once
        self.optimizer.found_inf = (~is_applied(loss, norm, limits)).float()
        self.optimizer.step()
        self._refresh()
        self.optimizer_steps += int(1 - self.optimizer.found_inf.item())
        self.model.zero_grad()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def _open_tables(self) -> None:
        """Give the tables their gradients before the step: each micro-batch adds in place."""
        for table in {self.model.embedding.tokens.weight, self.model.table}:
            if not hasattr(table, "main_grad"):
                table.main_grad = torch.empty_like(table, dtype=torch.float32)
            table.grad = table.main_grad.zero_()  # in the same memory in every step

    @torch.no_grad()
    def _refresh(self) -> None:
        """Copies the weights into the bf16 model."""
        if self.config.precision == "bf16":
            torch._foreach_copy_(list(self.model.parameters()), list(self.weights.values()))

    def close(self) -> None:
        self.model = None
        self.weights = None
        self.optimizer = None
