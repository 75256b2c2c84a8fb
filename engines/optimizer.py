"""What AdamW does in every engine: its schedule, its groups, its constants."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from configuration import Configuration

BETAS = (0.9, 0.95)  # as GPT-3 (Brown et al. 2020, appendix B) and Cerebras-GPT
MOMENTS = ("exp_avg", "exp_avg_sq")
FINAL_FRACTION = 0.1  # of the peak learning rate, at the end of the decay
SPIKE_STEPS, SPIKE_DEVIATIONS, SPIKE_LEAST = 128, 6, 64  # see spike_limits


def learning_rate(config: Configuration, step: int) -> float:
    """The rate of the step-th optimizer step, counted from 1: linear from 0 to the peak at step
    warmup_steps, then a cosine to a tenth of it; or with `wsd` the peak, and at the end a line to a
    tenth of it (Hu et al. 2024, "MiniCPM", 4: warm-up, stable, decay)."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    begin, steps = decay_span(config)
    done = min(1.0, max(0, step - begin) / steps)
    left = 1 - done if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (FINAL_FRACTION + (1 - FINAL_FRACTION) * left)


def decay_span(config: Configuration) -> tuple[int, int]:
    """The step after which the rate decays, and over how many steps."""
    if config.schedule == "wsd":
        steps = config.decay_steps or max(1, config.num_steps // 10)
        return max(config.warmup_steps, config.num_steps - steps), steps
    steps = config.decay_steps or max(1, config.num_steps - config.warmup_steps)
    return config.warmup_steps, steps


def is_applied(loss, norm, limits: tuple[float, float]):
    """Whether the update of a step is applied, for numbers and for tensors: loss and norm are
    within the limits, as NaN and infinity never are."""
    return (loss <= limits[0]) & (norm <= limits[1])


def spike_limits(recent: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The highest loss and gradient norm that are no spike: SPIKE_DEVIATIONS standard deviations
    above the mean of the SPIKE_STEPS steps before, spikes included, so that a lasting change is
    soon no spike; no limit before SPIKE_LEAST steps. The numbers are those of OLMo's
    SkipStepOptimizer (github.com/allenai/OLMo-core), which also skips what is as far below."""
    if len(recent) < SPIKE_LEAST:
        return sys.float_info.max, sys.float_info.max
    values = np.array(recent)
    losses, norms = values.mean(0) + SPIKE_DEVIATIONS * values.std(0, ddof=1)
    return float(losses), float(norms)


def clip_divisor(config: Configuration, norm: Tensor) -> Tensor:
    """What clipping divides a gradient of this global norm by, fp32. AdamW does so in its own pass,
    as if it were the scale of a loss (`grad_scale`)."""
    return ((norm + 1e-6) / config.max_gradient_norm).clamp(min=1.0).float()


def square_sum(tensors: list[Tensor]) -> Tensor:
    """The sum of the squares of all numbers, fp64. On a CPU from norms of 1,024 at a time: its fp32
    norm of 38 million numbers in one piece was 0.3% too small."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
    sums = []
    for flat in (tensor.flatten() for tensor in tensors):
        whole = len(flat) // 1024 * 1024
        norms = [flat[:whole].view(-1, 1024).norm(dim=1), flat[whole:].norm()[None]]
        sums.append(torch.cat(norms).double().square().sum())
    return torch.stack(sums).sum()


def decays(parameter: Tensor) -> bool:
    """Weight decay is for matrices and embeddings, not for biases and norms."""
    return parameter.dim() >= 2


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict]:
    """torch.optim groups, decaying parameters first."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]


def make_optimizer(config: Configuration, parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """AdamW with its weight decay on matrices and embeddings."""
    groups = parameter_groups(parameters, config.weight_decay)
    options = {"betas": BETAS, "eps": config.adam_epsilon, "fused": True}
    return torch.optim.AdamW(groups, lr=config.learning_rate, **options)


@dataclass
class Update:
    """One AdamW step, for state that is updated piece by piece."""

    config: Configuration
    learning_rate: float
    clip: float  # divisor of the gradient
    number: int  # of optimizer steps, this one included

    @torch.no_grad()
    def apply(self, state: Tensor, decaying: int) -> None:
        """state: (weight, first moment, second moment, gradient) × numbers, fp32, changed in place;
        weight decay applies to the numbers before `decaying`."""
        decaying = max(0, min(decaying, state.shape[1]))
        pieces = (
            (state[:, :decaying], self.config.weight_decay),
            (state[:, decaying:], 0.0),
        )
        for piece, weight_decay in pieces:
            weight, exp_avg, exp_avg_sq, gradient = ([row] for row in piece)
            adamw(
                *(weight, gradient, exp_avg, exp_avg_sq, []),
                [torch.full((), self.number - 1.0, device=state.device)],
                fused=True,
                grad_scale=torch.full((), self.clip, device=state.device),
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=self.learning_rate,
                weight_decay=weight_decay,
                eps=self.config.adam_epsilon,
                maximize=False,
            )
