"""The model's norms for bf16 on a CPU: their fp32 copy of the input is not kept."""

from functools import partial

import torch
from torch import Tensor, nn

from model import Norm


def use_narrow_norms(model: nn.Module) -> None:
    """Has each norm of a model keep its bf16 input for the backward pass, half of what autograd
    keeps of a LayerNorm and a quarter of an RMSNorm."""
    for module in model.modules():
        if isinstance(module, Norm):
            kind = NarrowRMSNorm if module.is_rms else NarrowLayerNorm
            module.forward = partial(_normalize, module, kind)


def _normalize(norm: Norm, kind: type[torch.autograd.Function], x: Tensor) -> Tensor:
    """`Norm.forward`."""
    weights = [None if weight is None else weight.float() for weight in (norm.weight, norm.bias)]
    return kind.apply(x, *weights, norm.eps)


class NarrowLayerNorm(torch.autograd.Function):
    """Takes (..., width), and weight and bias in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        x, weight, bias, mean, scale = ctx.saved_tensors
        wanted = [True, True, bias is not None]
        inputs = (y_grad.float(), x.float(), weight.shape, mean, scale, weight, bias, wanted)
        x_grad, *grads = torch.ops.aten.native_layer_norm_backward(*inputs)
        return x_grad.to(x.dtype), *grads, None


class NarrowRMSNorm(torch.autograd.Function):
    """Takes (..., width), a weight in fp32 and no bias: Zhang and Sennrich 2019, "Root Mean Square
    Layer Normalization". With n = x · scale the gradient of x is
    scale · (g - n · mean(g · n)), where g is that of n."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: None, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, y_grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        n, g = x.float().mul_(scale), y_grad.float()
        weight_grad = (g * n).flatten(0, -2).sum(0)
        g = g.mul_(weight)
        mean = (g * n).mean(-1, keepdim=True)
        return g.sub_(n.mul_(mean)).mul_(scale).to(x.dtype), weight_grad, None, None
