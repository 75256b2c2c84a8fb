"""The cross-entropy over a large vocabulary, without its logits in memory all at one time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # a target that is not counted: the padding of the last evaluation window
ALIGNMENT = 64  # numbers: 128 bytes in bf16
CACHED = 2**19  # numbers in fp32 for each core, 2 MB
COLUMNS = 4096  # tokens whose rows of the table's gradient are computed at a time


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
    p, counted = logits.float(), (targets != IGNORE)[:, None]
    places = targets.clamp(min=0)[:, None]
    top = p.amax(-1, keepdim=True)
    right = p.gather(1, places) - top
    total = p.sub_(top).exp_().sum(-1, keepdim=True)
    loss = torch.where(counted, total.log() - right, 0).sum()
    p.mul_(counted / total).scatter_add_(1, places, -counted.float())
    return loss, logits.copy_(p)


def cross_entropy_in_cache(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same for bf16, so few rows at a time that their fp32 copies stay in a CPU's caches."""
    rows = max(1, CACHED // logits.shape[1]) * torch.get_num_threads()
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.stack([cross_entropy(*part)[0] for part in parts]).sum(), logits


def summed_loss(model: nn.Module, x: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """`GPT.loss` of x (positions, width) and targets (positions,)."""
    if len(x) >= model.loss_rows and torch.is_grad_enabled():
        weights = (model.table, *model.norm.parameters())
        return ChunkedLoss.apply(model, x, targets, tokens, *weights)
    chunks = zip(x.split(model.loss_rows), targets.split(model.loss_rows), strict=True)
    kind = {"ignore_index": IGNORE, "reduction": "sum"}
    losses = [F.cross_entropy(model.head(x).float(), y, **kind) for x, y in chunks]
    return torch.stack(losses).sum() / (tokens or 1)


class ChunkedLoss(torch.autograd.Function):
    """The loss of `GPT.loss` with the gradients taken chunk by chunk on the way forward, so that
    the logits of one chunk alone exist at any time, once, and nothing is computed twice."""

    @staticmethod
    def forward(
        ctx, model: nn.Module, x: Tensor, targets: Tensor, tokens: int, *weights: Tensor
    ) -> Tensor:
        """weights: the table (vocab_size, width) that makes the logits, and the last norm's."""
        table, *norm = weights
        in_place, ctx.share = tokens > 0 and table.grad is not None, 1 / (tokens or 1)
        total = torch.zeros((), device=x.device)
        x_grad = torch.empty_like(x)
        table_grad = table.grad if in_place else torch.zeros_like(table, dtype=torch.float32)
        norm_grads = [torch.zeros_like(weight, dtype=torch.float32) for weight in norm]
        for begin in range(0, len(x), model.loss_rows):
            rows = slice(begin, begin + model.loss_rows)
            with torch.enable_grad():
                chunk = x[rows].detach().requires_grad_()
                y = model.norm(chunk)
            logits = model.head_linear(y.detach(), table)
            loss, grad = model.cross_entropy(logits, targets[rows])
            total += loss
            x_grad[rows], *grads = torch.autograd.grad(y, (chunk, *norm), grad @ table)
            torch._foreach_add_(norm_grads, grads)
            for part in range(0, len(table), COLUMNS):  # whose sums are made while they are cached
                columns = slice(part, part + COLUMNS)
                table_grad[columns].add_(grad[:, columns].T @ y.detach(), alpha=ctx.share)
            del logits, grad  # before the next chunk's
        ctx.grads = (None if in_place else table_grad, x_grad, *norm_grads)
        return total * ctx.share

    @staticmethod
    def backward(ctx, scale: Tensor):
        (table_grad, *grads), ctx.grads = ctx.grads, None
        x_grad, *norm_grads = (grad.mul_(scale * ctx.share) for grad in grads)
        if table_grad is not None:  # its sums have the share
            table_grad.mul_(scale)
        return None, x_grad, None, None, table_grad, *norm_grads
