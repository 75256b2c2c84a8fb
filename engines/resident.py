"""The model, its gradients and its optimizer on one device: plain PyTorch, every test's oracle."""

import copy

import torch
from torch import Tensor

from configuration import Configuration
from dataset import Batch
from engines.base import Engine, Limits, Report, hidden_gradients, micro_batches, prepare_compute
from engines.optimizer import clip_divisor, is_applied, make_optimizer, square_sum
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

    def step(
        self, step: int, batch: Batch, rate: float, limits: Limits, progress: Report
    ) -> tuple[float, float]:
        config = self.config
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, (ids, targets) in enumerate(micro_batches(config, self.device, batch)):
            seed = derive_seed(config.seed, step, i)
            with hidden_gradients(self.model.decoder.parameters()):
                part = self.model(ids, targets, seed, batch.targets.size)
            part.backward()
            loss += part.detach()
            progress(min(1.0, (i + 1) * config.micro_batch_size / len(batch.ids)))
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

    @torch.no_grad()
    def _refresh(self) -> None:
        """Copies the weights into the bf16 model."""
        if self.config.precision == "bf16":
            torch._foreach_copy_(list(self.model.parameters()), list(self.weights.values()))

    def sum_losses(self, batch: Batch) -> Tensor:
        parts = micro_batches(self.config, self.device, batch)
        return torch.stack([self.model(ids, targets) for ids, targets in parts]).double().sum()

    def close(self) -> None:
        self.model = self.weights = self.optimizer = None
