"""AdamW for state that is updated piece by piece, as the streaming engine's is."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from configuration import Configuration
from engines.optimizer import BETAS


@dataclass
class Update:
    """One AdamW step, the `number`-th, with the gradient divided by `clip`."""

    config: Configuration
    learning_rate: float
    clip: float
    number: int

    @torch.no_grad()
    def apply(self, state: Tensor, decay_end: int) -> None:
        """Changes the elements of state in place: (weight, first moment, second moment, gradient) ×
        elements, fp32. Weight decay applies to the elements before `decay_end`."""
        decay_end = max(0, min(decay_end, state.shape[1]))
        self._apply(state[:, :decay_end], self.config.weight_decay)
        self._apply(state[:, decay_end:], 0.0)

    def _apply(self, state: Tensor, weight_decay: float) -> None:
        weight, exp_avg, exp_avg_sq, gradient = state
        adamw(
            [weight],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
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
