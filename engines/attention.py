"""Causal attention for CPUs without AMX, where PyTorch multiplies its small tiles slowly."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ROWS = 256  # queries of a block
SCORES = 2**21  # numbers in the scores of a block, 8 MB


def block_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, dropout_p: float) -> Tensor:
    """Three of (batch, heads, length, head_width), bf16 -> the same, as PyTorch's
    scaled_dot_product_attention, causal and without dropout. Scores and their softmax are in fp32
    and memory is linear in length, as in PyTorch's."""
    assert is_causal and dropout_p == 0
    y = BlockAttention.apply(*(part.flatten(0, 1).contiguous() for part in (q, k, v)))
    return y.view(q.shape)


class BlockAttention(torch.autograd.Function):
    """Takes (heads of the batch, length, head_width). A block is some queries of some heads, with
    all keys that these see, in products of batches of matrices. The backward pass computes its
    probabilities again: Dao et al. 2022, "FlashAttention", without the tiles of keys."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        y = torch.empty_like(q)
        for heads, rows, keys in blocks(*q.shape[:2]):
            y[heads, rows] = probabilities(q[heads, rows], k[heads, keys]) @ v[heads, keys]
        return y

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        q, k, v = ctx.saved_tensors
        q_grad = torch.empty_like(q)
        k_grad, v_grad = (torch.zeros_like(part, dtype=torch.float32) for part in (k, v))
        for heads, rows, keys in blocks(*q.shape[:2]):
            queries, grad = (part[heads, rows].contiguous() for part in (q, y_grad))
            seen, values = (part[heads, keys].contiguous() for part in (k, v))
            p = probabilities(queries, seen)
            v_grad[heads, keys] += p.mT @ grad
            scores_grad = torch._softmax_backward_data(grad @ values.mT, p, -1, p.dtype)
            q_grad[heads, rows] = scores_grad @ seen
            k_grad[heads, keys] += scores_grad.mT @ queries
        scale = q.shape[-1] ** -0.5
        return q_grad.mul_(scale), k_grad.mul_(scale).to(k.dtype), v_grad.to(v.dtype)


def blocks(heads: int, length: int) -> Iterator[tuple[slice, slice, slice]]:
    """(heads, queries, keys up to the last of these) of each block."""
    together = max(1, SCORES // (min(ROWS, length) * length))
    for first in range(0, heads, together):
        for begin in range(0, length, ROWS):
            end = min(begin + ROWS, length)
            yield slice(first, first + together), slice(begin, end), slice(end)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """The softmax of the scores of the last queries, (heads, queries, keys), bf16."""
    queries, keys, scale = q.shape[1], k.shape[1], q.shape[2] ** -0.5
    with products_of_bf16():
        zero = torch.empty(())
        scores = torch.baddbmm(zero, q.float(), k.float().mT, beta=0, alpha=scale)
    future = torch.full((queries, queries), -math.inf).triu(1)
    scores[:, :, keys - queries :] += future
    return torch.softmax(scores, -1, out=scores).to(q.dtype)


@contextmanager
def products_of_bf16() -> Iterator[None]:
    """Lets oneDNN multiply fp32 matrices as bf16, which is exact for numbers that were bf16."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
