"""The cross-entropy over a large vocabulary, without its logits in memory all at one time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # a target that is not counted: the padding of the last evaluation window
ALIGNMENT = 64  # numbers: 128 bytes in bf16
CACHED = 2**19  # numbers in fp32 for each core, 2 MB


def aligned_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear, whose result (..., vocab_size) has rows that begin at multiples of ALIGNMENT:
    products of matrices with rows of 50,257 numbers run slow kernels on a GPU."""
    rows, columns = x.flatten(0, -2), len(weight)
    strides = (math.ceil(columns / ALIGNMENT) * ALIGNMENT, 1)
    y = torch.empty_strided((len(rows), columns), strides, dtype=x.dtype, device=x.device)
    return y.addmm_(rows, weight.T, beta=0).view(*x.shape[:-1], columns)


@torch.no_grad()
def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses, fp32, and its gradient, which takes the place of the logits: PyTorch's
    own would have three more tensors of that size."""
    p = logits.float()
    torch.log_softmax(p, -1, out=p)
    loss = F.nll_loss(p, targets, ignore_index=IGNORE, reduction="sum")
    p.exp_()[torch.arange(len(p), device=p.device), targets.clamp(min=0)] -= 1
    return loss, logits.copy_(p).mul_((targets != IGNORE)[:, None])


def cross_entropy_in_cache(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same for bf16, so few rows at a time that their fp32 copies stay in a CPU's caches."""
    rows = max(1, CACHED // logits.shape[1]) * torch.get_num_threads()
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.stack([cross_entropy(*part)[0] for part in parts]).sum(), logits


class ChunkedLoss(torch.autograd.Function):
    """The loss of `GPT.loss` with the gradients taken chunk by chunk on the way forward, so that
    the logits of one chunk alone exist at any time, once, and nothing is computed twice."""

    @staticmethod
    def forward(ctx, model: nn.Module, x: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        total = torch.zeros((), device=x.device)
        x_grad = torch.empty_like(x)
        sums = [None] * len(weights)
        for begin in range(0, len(x), model.loss_rows):
            rows = slice(begin, begin + model.loss_rows)
            with torch.enable_grad():
                chunk = x[rows].detach().requires_grad_()
                logits = model.head(chunk)
            loss, grad = model.cross_entropy(logits.detach(), targets[rows])
            inputs = (chunk, *weights)
            x_grad[rows], *grads = torch.autograd.grad(logits, inputs, grad, allow_unused=True)
            total += loss
            for i, grad in enumerate(grads):
                if grad is not None:
                    sums[i] = grad.float() if sums[i] is None else sums[i].add_(grad)
            del logits, grad, grads  # before the next chunk's
        ctx.grads = (x_grad, *sums)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        grads, ctx.grads = ctx.grads, None
        x_grad, *sums = (grad if grad is None else grad.mul_(scale) for grad in grads)
        return None, x_grad, None, *sums
