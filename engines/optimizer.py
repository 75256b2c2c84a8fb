"""What AdamW does in every engine: its schedule, its groups, its constants."""

import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from configuration import Configuration

BETAS = (0.9, 0.95)  # as GPT-3 (Brown et al. 2020, appendix B) and Cerebras-GPT
MOMENTS = ("exp_avg", "exp_avg_sq")
FINAL_FRACTION = 0.1  # of the peak learning rate, at the end of the decay
SPIKE_STEPS = 128  # see spike_limits
SPIKE_DEVIATIONS = 6
SPIKE_LEAST = 64


def learning_rate(config: Configuration, step: int) -> float:
    """Returns the rate of the step-th optimizer step, counted from 1: linear from 0 to the peak at
    step warmup_steps, then a cosine to a tenth of it; or with `wsd` the peak, and at the end a line
    to a tenth of it (Hu et al. 2024, "MiniCPM", 4: warm-up, stable, decay)."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    begin, steps = decay_span(config)
    done = min(1.0, max(0, step - begin) / steps)
    left = 1 - done if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (FINAL_FRACTION + (1 - FINAL_FRACTION) * left)


def decay_span(config: Configuration) -> tuple[int, int]:
    """Returns the step after which the rate decays, and over how many steps."""
    begin = config.warmup_steps
    if config.schedule == "wsd":
        steps = config.decay_steps or max(1, config.num_steps // 10)
        return max(begin, config.num_steps - steps), steps
    return begin, config.decay_steps or max(1, config.num_steps - begin)


def is_applied(loss, norm, limits: tuple[float, float]):
    """Returns whether the update of a step is applied, for numbers and for tensors: loss and norm
    are within the limits, as NaN and infinity never are."""
    loss_limit, norm_limit = limits
    return (loss <= loss_limit) & (norm <= norm_limit)


def spike_limits(recent: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns the highest loss and gradient norm that are no spike: SPIKE_DEVIATIONS standard
    deviations above the mean of the SPIKE_STEPS steps before, spikes included, so that a lasting
    change is soon no spike; no limit before SPIKE_LEAST steps. The numbers are those of OLMo's
    SkipStepOptimizer (github.com/allenai/OLMo-core), which also skips what is as far below."""
    if len(recent) < SPIKE_LEAST:
        return sys.float_info.max, sys.float_info.max
    values = np.array(recent)
    losses, norms = values.mean(0) + SPIKE_DEVIATIONS * values.std(0, ddof=1)
    return float(losses), float(norms)


def clip_divisor(config: Configuration, norm: Tensor) -> Tensor:
    """Returns what clipping divides a gradient of this global norm by, fp32. AdamW does so in its
    own pass, as if it were the scale of a loss (`grad_scale`)."""
    return ((norm + 1e-6) / config.max_gradient_norm).clamp(min=1.0).float()


def square_sum(tensors: list[Tensor]) -> Tensor:
    """Returns the sum of the squares of all elements, fp64. On a CPU from norms of 1,024 at a time:
    its fp32 norm of 38 million elements in one piece was 0.3% too small."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
    sums = []
    for flat in (tensor.flatten() for tensor in tensors):
        whole = len(flat) // 1024 * 1024
        norms = flat[:whole].view(-1, 1024).norm(dim=1)
        rest = flat[whole:].norm()
        sums.append(torch.cat([norms, rest[None]]).double().square().sum())
    return torch.stack(sums).sum()


def decays(parameter: Tensor) -> bool:
    """Returns whether a parameter has weight decay, as matrices and embeddings do."""
    return parameter.dim() >= 2


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict]:
    """Returns groups for torch.optim, decaying parameters first."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]


def make_optimizer(config: Configuration, parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """Returns AdamW with its weight decay on matrices and embeddings."""
    return torch.optim.AdamW(
        parameter_groups(parameters, config.weight_decay),
        lr=config.learning_rate,
        betas=BETAS,
        eps=config.adam_epsilon,
        fused=True,
    )
