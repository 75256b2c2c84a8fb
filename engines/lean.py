"""The model's operations, for bf16 on a CPU, that keep their input alone for the backward pass."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import MLP, Norm


def use_lean_operations(model: nn.Module) -> None:
    """Autograd keeps twice as many bytes of a LayerNorm, four times of an RMSNorm, one and a half
    times of SwiGLU."""
    for module in model.modules():
        if isinstance(module, Norm):
            kind = LeanRMSNorm if module.is_rms else LeanLayerNorm
            module.forward = partial(_normalize, module, kind)
        elif isinstance(module, MLP):
            module.swiglu = LeanSwiGLU.apply


def _normalize(norm: Norm, kind: type[torch.autograd.Function], x: Tensor) -> Tensor:
    """`Norm.forward`."""
    weights = [None if weight is None else weight.float() for weight in (norm.weight, norm.bias)]
    return kind.apply(x, *weights, norm.eps)


class LeanLayerNorm(torch.autograd.Function):
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


class LeanRMSNorm(torch.autograd.Function):
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


class LeanSwiGLU(torch.autograd.Function):
    """Takes (..., 2 · width of the hidden layer), the gate first."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, y_grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        x_grad = torch.empty_like(x)
        gate_grad, up_grad = x_grad.chunk(2, dim=-1)
        torch.ops.aten.silu_backward(y_grad * up, gate, grad_input=gate_grad)
        torch.mul(y_grad, F.silu(gate), out=up_grad)
        return x_grad
