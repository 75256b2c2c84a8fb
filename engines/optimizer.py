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
    warmup_steps, then a cosine to a tenth of it decay_steps later, then constant."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / decay_steps(config))
    fraction = FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * fraction


def decay_steps(config: Configuration) -> int:
    """Steps of the cosine: what was asked for, or all after the warm-up."""
    return config.decay_steps or max(1, config.num_steps - config.warmup_steps)


def counts(loss, norm, limits: tuple[float, float]):
    """Whether a step may change the weights, for numbers and for tensors: loss and norm are not
    above the limits, as NaN and infinity always are."""
    return (loss <= limits[0]) & (norm <= limits[1])


def spike_limits(recent: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The highest loss and gradient norm that are no spike: SPIKE_DEVIATIONS standard deviations
    above the mean of the SPIKE_STEPS steps before, spikes among them, so that a lasting change is
    soon none; the largest number there is before SPIKE_LEAST steps. These numbers are those of
    OLMo's SkipStepOptimizer (github.com/allenai/OLMo-core), which also leaves out what is as far
    below the mean."""
    if len(recent) < SPIKE_LEAST:
        return sys.float_info.max, sys.float_info.max
    values = np.array(recent)
    losses, norms = values.mean(0) + SPIKE_DEVIATIONS * values.std(0, ddof=1)
    return float(losses), float(norms)


def clip_factor(config: Configuration, norm: Tensor) -> Tensor:
    """What a gradient of this global norm is multiplied with, fp32."""
    return (config.max_gradient_norm / (norm + 1e-6)).clamp(max=1.0).float()


def square_sum(tensors: list[Tensor]) -> Tensor:
    """Of all numbers, fp64. On a CPU from norms of 1,024 at a time: in one piece its fp32 norm of
    38 million numbers was 0.3% too small (docs/log.md)."""
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


@torch.no_grad()
def adamw_step(
    config: Configuration,
    rate: float,
    number: int,
    weight_decay: float,
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    skip: Tensor | None = None,
) -> None:
    """PyTorch's fused AdamW, in place, fp32. number: of updates, this one included; skip: if it is
    1, nothing changes, which only the device has to know. Its function and not its class, which
    imports torch.compile's front end, a second of every start."""
    before = torch.full((len(weights),), number - 1.0, device=weights[0].device)
    adamw(
        *(weights, gradients, exp_avgs, exp_avg_sqs, [], list(before.unbind())),
        fused=True,
        found_inf=skip,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=rate,
        weight_decay=weight_decay,
        eps=config.adam_epsilon,
        maximize=False,
    )


@dataclass
class Update:
    """One AdamW step, for state that comes in pieces."""

    config: Configuration
    learning_rate: float
    clip: float  # factor for the gradient
    number: int  # of updates, this one included

    @torch.no_grad()
    def apply(self, state: Tensor, decaying: int) -> None:
        """state: (weight, first moment, second moment, gradient) × numbers, fp32, changed in place;
        weight decay is for the numbers before `decaying`."""
        if self.clip < 1.0:
            state[3].mul_(self.clip)
        decaying = max(0, min(decaying, state.shape[1]))
        for piece, weight_decay in (
            (state[:, :decaying], self.config.weight_decay),
            (state[:, decaying:], 0.0),
        ):
            weight, exp_avg, exp_avg_sq, gradient = ([row] for row in piece)
            step = (self.learning_rate, self.number, weight_decay)
            adamw_step(self.config, *step, weight, gradient, exp_avg, exp_avg_sq)
