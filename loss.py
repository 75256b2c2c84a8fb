"""The cross-entropy over a large vocabulary, without its logits in memory all at one time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import is_logits

IGNORE = -100  # a target that is not counted: the padding of the last evaluation window
CHUNK = {"cpu": 1024, "cuda": 8192}  # positions whose logits exist at one time
USUAL_VOCABULARY = 50257  # GPT-2's: with more tokens a chunk has fewer positions
CACHED = 2**19  # elements in fp32 for each core, 2 MB


def chunk_size(device: str, vocab_size: int) -> int | None:
    """Return how many positions have logits at one time; None: all, as the compiler for Cerebras
    systems cuts a batch to what fits, and would only unroll a loop."""
    most = CHUNK.get(device)
    return most and min(most, max(1, most * USUAL_VOCABULARY // vocab_size))


def summed_loss(model: nn.Module, x: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Return `GPT.loss` of x (positions, width) and targets (positions,)."""
    size = chunk_size(x.device.type, len(model.table))
    if size is None:
        logits = model.logits(x).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / tokens
    if torch.is_grad_enabled():
        weights = dict.fromkeys([model.table, *model.head.parameters()])
        return _ChunkedLoss.apply(model, x, targets, tokens, size, *weights)
    chunks = zip(x.split(size), targets.split(size), strict=True)
    losses = [model.cross_entropy(model.logits(rows), y, tokens) for rows, y in chunks]
    return torch.stack(losses).sum()


@torch.no_grad()
def cross_entropy(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Return the sum of the losses over `tokens`, fp32, and replace the logits (positions,
    vocab_size) by its gradient: PyTorch's own has three more tensors of that size."""
    in_cache = logits.device.type == "cpu" and logits.dtype == torch.bfloat16
    if not in_cache or torch.compiler.is_compiling():
        return _cross_entropy(logits, targets, tokens)
    # so few rows at a time that their fp32 copies stay in the caches
    rows = max(1, CACHED // logits.shape[1]) * torch.get_num_threads()
    chunks = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.stack([_cross_entropy(part, y, tokens) for part, y in chunks]).sum()


def _cross_entropy(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
    p = logits.float()
    counted = (targets != IGNORE)[:, None]
    places = targets.clamp(min=0)[:, None]
    top = p.amax(-1, keepdim=True)
    right = p.gather(1, places) - top
    total = p.sub_(top).exp_().sum(-1, keepdim=True)
    loss = torch.where(counted, total.log() - right, 0).sum() / tokens
    each = counted / tokens
    if torch.compiler.is_compiling():  # fuses a comparison, and makes an array for scatter_add_
        columns = torch.arange(logits.shape[1], device=logits.device)
        p = p * (each / total) - each * (columns == places)
    else:
        p.mul_(each / total).scatter_add_(1, places, -each)
    logits.copy_(p)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """The loss with the gradients of its head, taken chunk by chunk on the way forward, so that the
    logits of one chunk alone exist at any time, and nothing is computed twice."""

    @staticmethod
    def forward(
        ctx,
        model: nn.Module,
        x: Tensor,
        targets: Tensor,
        tokens: int,
        size: int,
        *weights: nn.Parameter,
    ) -> Tensor:
        """weights: the parameters that `model.logits` uses."""
        total = torch.zeros((), device=x.device)
        x_grad = torch.empty_like(x)
        sums = [None] * len(weights)
        for part, y, place in zip(
            x.split(size), targets.split(size), x_grad.split(size), strict=True
        ):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                logits = model.logits(leaf)
            # a changed head may need its result for its backward pass
            gradient = logits.detach() if is_logits(logits) else logits.detach().clone()
            total += model.cross_entropy(gradient, y, tokens)
            part_grad, *grads = torch.autograd.grad(
                logits, (leaf, *weights), gradient, allow_unused=True
            )
            place.copy_(part_grad)
            sums = [_add(*pair) for pair in zip(sums, grads, strict=True)]
            del logits, gradient, grads  # before the next chunk's
        ctx.grads = (x_grad, *sums)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        x_grad, *weight_grads = (None if grad is None else grad.mul_(scale) for grad in ctx.grads)
        ctx.grads = None
        return None, x_grad, None, None, None, *weight_grads


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Return the sum in fp32; None is nothing."""
    if gradient is None:
        return total
    return gradient.float() if total is None else total.add_(gradient)
