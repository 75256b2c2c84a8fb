"""Norms that keep less for the backward pass, for the fp32 copy of a bf16 input."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swap(model: nn.Module, name: str, theirs: Callable, ours: Callable) -> None:
    """Has all modules of a model call our function where they call that one, by the name of their
    attribute. What a user has put in its place stays."""
    for module in model.modules():
        if getattr(module, name, None) is theirs:
            setattr(module, name, ours)


def use_lean_norms(model: nn.Module) -> None:
    """Has the norms of a model keep their input in bf16, which is exact: half of what PyTorch's
    LayerNorm keeps, and a quarter of its RMSNorm."""
    swap(model, "layer_norm", F.layer_norm, LeanLayerNorm.apply)
    swap(model, "rms_norm", F.rms_norm, LeanRMSNorm.apply)


class LeanLayerNorm(torch.autograd.Function):
    """F.layer_norm of (..., width), fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple, weight: Tensor, bias: Tensor | None, eps: float):
        y, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x.bfloat16(), weight, bias, mean, scale)
        return y

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        x, weight, bias, mean, scale = ctx.saved_tensors
        wanted = [True, True, bias is not None]
        inputs = (y_grad, x.float(), weight.shape, mean, scale, weight, bias, wanted)
        x_grad, *grads = torch.ops.aten.native_layer_norm_backward(*inputs)
        return x_grad, None, *grads, None


class LeanRMSNorm(torch.autograd.Function):
    """F.rms_norm of (..., width), fp32 (Zhang and Sennrich 2019, "Root Mean Square Layer
    Normalization"). With n = x · scale the gradient of x is scale · (g - n · mean(g · n)), where g
    is that of n."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x.bfloat16(), weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        n = x.float().mul_(scale)
        weight_grad = (y_grad * n).flatten(0, -2).sum(0)
        g = y_grad * weight
        mean = (g * n).mean(-1, keepdim=True)
        return g.sub_(n.mul_(mean)).mul_(scale), None, weight_grad, None
