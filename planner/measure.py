"""What one block of the model keeps and computes, measured on fake tensors: a changed model.py is
planned right. Nothing is allocated or computed."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from operator import attrgetter
from weakref import WeakSet

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configuration import MODEL_KEYS, Configuration
from model import GPT, GPTConfig
from ops import plain

_model_keys = attrgetter(*MODEL_KEYS)  # returns the arguments of a GPTConfig, in its order
TOKENS = 2048  # that a block is measured with, or one sequence


@dataclass(frozen=True)
class Sizes:
    """The parameters outside the blocks, in the embedding, in what the head uses (a tied one the
    embedding too), in the largest block, in its largest matrix and in all blocks; and the shapes of
    all."""

    outside: int
    embedding: int
    head: int
    block: int
    matrix: int
    blocks: int
    shapes: tuple[torch.Size, ...]

    @property
    def total(self) -> int:
        return self.outside + self.blocks


@dataclass(frozen=True)
class Block:
    """For each sequence the bytes that a block keeps for its backward pass, and the most that both
    passes have; FLOPs of its forward pass, and of recomputing it, which ends with the last tensor
    that is kept."""

    kept_bytes: int
    peak_bytes: int
    flops: int
    flops_again: int


def sizes(config: GPTConfig) -> Sizes:
    """Count the parameters of a model."""
    return _sizes(_model_keys(config))


def block(config: Configuration) -> Block:
    """Measure a block at the sequence length and in the precision of a configuration."""
    fused = config.backend != "CPU" or config.compile is True
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return _block(_model_keys(config), config.sequence_length, dtype, fused)


@lru_cache(maxsize=16)
def _sizes(keys: tuple) -> Sizes:
    with torch.device("meta"):
        model = GPT(GPTConfig(*keys))
    counts = {
        name: sum(parameter.numel() for parameter in layer.parameters())
        for name, layer in model.layers().items()
    }
    blocks = [count for name, count in counts.items() if name.startswith("decoder.")]
    return Sizes(
        outside=sum(counts.values()) - sum(blocks),
        embedding=counts["embedding"],
        head=sum(counts[name] for name in model.head_layers()),
        block=max(blocks),
        matrix=max(parameter.numel() for parameter in model.decoder[0].parameters()),
        blocks=sum(blocks),
        shapes=tuple(parameter.shape for parameter in model.parameters()),
    )


@lru_cache(maxsize=16)
def _block(keys: tuple, length: int, dtype: torch.dtype, fused: bool) -> Block:
    config = GPTConfig(*keys)
    with torch.device("meta"):
        one = GPT(replace(config, depth=1)).decoder[0].to(dtype)
    sequences = max(1, TOKENS // length)
    while any(sequences * length in parameter.shape for parameter in one.parameters()):
        sequences += 1  # activations have no shape of a parameter
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    flops_before_kept = [0]  # the FLOPs so far, without the operation that keeps a tensor

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        flops_before_kept.append(counter.get_total_flops())
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), plain() if fused else nullcontext():
        one.to_empty(device="cpu")
        for parameter in one.parameters():
            parameter.grad_dtype = torch.float32
            parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
        with Live(one) as live:
            x = torch.empty(sequences, length, config.width, dtype=dtype, requires_grad=True)
            with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
                output = one(x)
            kept = live.now - output.nbytes
            output.backward(torch.empty_like(output))
    return Block(
        kept_bytes=kept // sequences,
        peak_bytes=live.most // sequences,
        flops=counter.get_total_flops() // sequences,
        flops_again=flops_before_kept[-1] // sequences,
    )


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive `now`, and the `most` that there were, without
    a module's parameters and what has their shapes, such as gradients."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.most = 0
        self.alive = WeakSet()
        self.own = {parameter.untyped_storage() for parameter in module.parameters()}
        shapes = {parameter.shape for parameter in module.parameters()}
        self.shapes = shapes | {shape[::-1] for shape in shapes}

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.alive)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.shape not in self.shapes:
                self.alive |= {leaf.untyped_storage()} - self.own
        self.most = max(self.most, self.now)
        return result


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *rest, **more) -> int:
    """Return the FLOPs of a causal attention: two products, of which it sees half on average, so
    that one FLOP is left of two."""
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
