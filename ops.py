"""What the model computes with: PyTorch's functions, or ours where they are faster.

Each has the signature of PyTorch's, and chooses by the tensors it is given. On a CPU in bf16 ours
keep less for the backward pass. torch.compile sees PyTorch's, which it fuses.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from warnings import catch_warnings

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 64  # elements: 128 bytes in bf16
GRADIENT_ROWS = 4096  # of a table's gradient, computed at a time on a CPU and summed in its cache
QUERIES = 256  # in a block of attention
SCORES = 2**21  # elements in the scores of a block of attention, 8 MB
_plain = False


@contextmanager
def plain() -> Iterator[None]:
    """Have every function be PyTorch's, to see on one device what another would run."""
    global _plain
    before = _plain
    _plain = True
    try:
        yield
    finally:
        _plain = before


@cache
def has_units(*names: str) -> bool:
    """Return whether this CPU has one of these, such as amx_bf16. Torch 2.4 says no."""
    units = getattr(torch.cpu, "get_capabilities", dict)()
    return any(units.get(name, False) for name in names)


@cache
def find_gpu() -> tuple[bool, str]:
    """Returns whether CUDA works here, and what it complains of, such as an old driver."""
    with catch_warnings(record=True) as caught:
        there = torch.cuda.is_available()
    if there or not caught:
        return there, ""
    return there, " ".join(str(caught[0].message).split())


def _is_bf16_on_cpu(x: Tensor) -> bool:
    here = _is_on_cpu(x) and x.dtype == torch.bfloat16
    return here and not _plain and not torch.compiler.is_compiling()


def _is_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _is_known(x: Tensor) -> bool:
    """Return whether x is on a device that ours were made for; Cerebras's lowers PyTorch's."""
    return x.device.type in ("cpu", "cuda") and not _plain


# Norms


def layer_norm(x: Tensor, shape: tuple, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return the LayerNorm of x (..., width), computed in fp32: in bf16 a CPU sums the gradients
    of weight and bias in bf16 too, where 256 + 1 is 256."""
    if _is_bf16_on_cpu(x):
        return _LayerNorm.apply(x, shape, weight, bias, eps)
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), shape, weight.float(), bias, eps).to(x.dtype)


def rms_norm(x: Tensor, shape: tuple, weight: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm of x (..., width), computed in fp32 as in `layer_norm`."""
    if _is_bf16_on_cpu(x):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x.float(), shape, weight.float(), eps).to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    """Keeps its input in bf16, half of what PyTorch's keeps in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple, weight: Tensor, bias: Tensor | None, eps: float):
        bias = None if bias is None else bias.float()
        y, mean, scale = torch.native_layer_norm(x.float(), shape, weight.float(), bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        x, weight, bias, mean, scale = ctx.saved_tensors
        wanted = [True, True, bias is not None]
        x_grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
            y_grad.float(), x.float(), weight.shape, mean, scale, weight.float(), bias, wanted
        )
        return x_grad.to(x.dtype), None, weight_grad, bias_grad, None


class _RMSNorm(torch.autograd.Function):
    """Keeps its input in bf16, a quarter of what PyTorch's keeps (Zhang and Sennrich 2019, "Root
    Mean Square Layer Normalization"). With n = x · scale the gradient of x is
    scale · (g - n · mean(g · n)), where g is that of n."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        full = x.float()
        scale = full.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return full.mul_(scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        n = x.float().mul_(scale)
        y_grad = y_grad.float()
        weight_grad = (y_grad * n).flatten(0, -2).sum(0)
        g = y_grad.mul_(weight.float())
        mean = (g * n).mean(-1, keepdim=True)
        x_grad = g.sub_(n.mul_(mean)).mul_(scale)
        return x_grad.to(x.dtype), weight_grad, None


# The tables: large matrices with a row for each token. Where a table has a `main_grad`, an fp32
# tensor of its shape, its gradient is added there instead of being returned to autograd.


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Return the rows (..., width) of ids (...). Their gradients are summed in fp32."""
    return _Embedding.apply(ids, table) if _is_known(table) else F.embedding(ids, table)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(table)
        ctx.main_grad = getattr(table, "main_grad", None)
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        (ids,) = ctx.saved_tensors
        y_grad = y_grad.float()
        if ctx.main_grad is not None and _is_on_cpu(ids):  # the rows looked up alone
            rows = y_grad.flatten(0, -2)
            ctx.main_grad += torch.sparse_coo_tensor(
                ids.reshape(1, -1), rows, ctx.main_grad.shape, check_invariants=False
            )
            return None, None
        table_grad = torch.ops.aten.embedding_dense_backward(y_grad, ids, ctx.rows, -1, False)
        if ctx.main_grad is None:
            return None, table_grad
        ctx.main_grad += table_grad
        return None, None


def logits(x: Tensor, table: Tensor) -> Tensor:
    """Return F.linear of x (..., width) and table (vocab_size, width): (..., vocab_size)."""
    return _Logits.apply(x, table) if _is_known(x) else F.linear(x, table)


class _Logits(torch.autograd.Function):
    """On a GPU rows of the result begin at multiples of ALIGNMENT: products of matrices with rows
    of 50,257 elements run slow kernels there."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.main_grad = getattr(table, "main_grad", None)
        return aligned_linear(x, table) if x.is_cuda else F.linear(x, table)

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        x, table = ctx.saved_tensors
        x_grad = y_grad @ table
        x = x.flatten(0, -2)
        y_grad = y_grad.flatten(0, -2)
        if ctx.main_grad is None:
            return x_grad, y_grad.T @ x
        rows = len(table) if x.is_cuda else GRADIENT_ROWS
        for part, columns in zip(ctx.main_grad.split(rows), y_grad.split(rows, 1), strict=True):
            part += columns.T @ x
        return x_grad, None


def is_logits(y: Tensor) -> bool:
    """Return whether y is what `logits` returned, which no backward pass needs."""
    return isinstance(y.grad_fn, _Logits._backward_cls)


def aligned_linear(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    columns = len(weight)
    strides = (math.ceil(columns / ALIGNMENT) * ALIGNMENT, 1)
    y = torch.empty_strided((len(rows), columns), strides, dtype=x.dtype, device=x.device)
    return y.addmm_(rows, weight.T, beta=0).view(*x.shape[:-1], columns)


# Attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Return PyTorch's scaled_dot_product_attention of q, k, v (batch, heads, length, size)."""
    fast = _is_bf16_on_cpu(q) and _is_fast_in_blocks(q.shape[-2])
    fast = fast and type(q) is Tensor  # not a fake one, which knows PyTorch's as one step
    if fast and is_causal and dropout_p == 0 and q.shape == k.shape == v.shape:
        y = _BlockAttention.apply(*(part.flatten(0, 1).contiguous() for part in (q, k, v)))
        return y.view(q.shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal)


def _is_fast_in_blocks(length: int) -> bool:
    """Return whether this CPU multiplies blocks faster than PyTorch's small tiles: not with AMX,
    and at more than one block not on AMD's Zen 4 (docs/performance.md). Zen 5, which multiplies
    twice as much at a time, has avx512_vp2intersect too."""
    if has_units("amx_bf16"):
        return False
    return length <= QUERIES or has_units("avx512_vp2intersect")


class _BlockAttention(torch.autograd.Function):
    """Takes (heads of the batch, length, head_size). A block is some queries of some heads, with
    all keys that these see, in products of batches of matrices. Scores and their softmax are in
    fp32, and memory is linear in length. The backward pass computes its probabilities again: Dao et
    al. 2022, "FlashAttention", without the tiles of keys."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        y = torch.empty_like(q)
        for heads, rows, keys in _blocks(*q.shape[:2]):
            y[heads, rows] = _probabilities(q[heads, rows], k[heads, keys]) @ v[heads, keys]
        return y

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        q, k, v = ctx.saved_tensors
        q_grad = torch.empty_like(q)
        k_grad = torch.zeros_like(k, dtype=torch.float32)
        v_grad = torch.zeros_like(v, dtype=torch.float32)
        for heads, rows, keys in _blocks(*q.shape[:2]):
            queries = q[heads, rows].contiguous()
            grad = y_grad[heads, rows].contiguous()
            seen = k[heads, keys].contiguous()
            values = v[heads, keys].contiguous()
            p = _probabilities(queries, seen)
            v_grad[heads, keys] += p.mT @ grad
            scores_grad = torch._softmax_backward_data(grad @ values.mT, p, -1, p.dtype)
            q_grad[heads, rows] = scores_grad @ seen
            k_grad[heads, keys] += scores_grad.mT @ queries
        scale = q.shape[-1] ** -0.5
        return q_grad.mul_(scale), k_grad.mul_(scale).to(k.dtype), v_grad.to(v.dtype)


def _blocks(heads: int, length: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield (heads, queries, keys up to the last of these) of each block."""
    together = max(1, SCORES // (min(QUERIES, length) * length))
    for first in range(0, heads, together):
        for begin in range(0, length, QUERIES):
            end = min(begin + QUERIES, length)
            yield slice(first, first + together), slice(begin, end), slice(end)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Return the softmax of the scores of the last queries, (heads, queries, keys), bf16."""
    queries = q.shape[1]
    keys = k.shape[1]
    with _products_of_bf16():
        zero = torch.empty(())
        scale = q.shape[2] ** -0.5
        scores = torch.baddbmm(zero, q.float(), k.float().mT, beta=0, alpha=scale)
    future = torch.full((queries, queries), -math.inf).triu(1)
    scores[:, :, keys - queries :] += future
    return torch.softmax(scores, -1, out=scores).to(q.dtype)


@contextmanager
def _products_of_bf16() -> Iterator[None]:
    """Let oneDNN multiply fp32 matrices as bf16, which is exact for numbers that were bf16."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
