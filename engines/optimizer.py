"""What AdamW does in every engine: its schedule, its groups, its constants."""

import math
from collections.abc import Iterable

from torch import Tensor

from configuration import Configuration

BETAS = (0.9, 0.95)  # as GPT-3 (Brown et al. 2020, appendix B) and Cerebras-GPT
FINAL_FRACTION = 0.1  # of the peak learning rate, at the end of the decay


def learning_rate(config: Configuration, step: int) -> float:
    """The rate of the step-th optimizer step, counted from 1: linear from 0 to the peak at step
    warmup_steps, then a cosine to a tenth of it decay_steps later, then constant."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    decay_steps = config.decay_steps or max(1, config.num_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / decay_steps)
    fraction = FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * fraction


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
