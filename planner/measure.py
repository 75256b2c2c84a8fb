"""What one block of the model keeps and computes, measured on fake tensors: a changed model.py is
planned right. Nothing is allocated or computed."""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from configuration import MODEL_KEYS, Configuration
from engines.base import has_own_operations
from engines.lean import use_lean_norms
from model import GPT, GPTConfig


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: outside the blocks, in the embedding and in what the head uses (a tied
    one the embedding too), in one block, in its largest matrix, in all blocks; and the shapes of
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
    """Of one sequence: bytes that a block keeps for the backward pass, FLOPs of its forward pass
    and of recomputing it, which ends with the last tensor that is kept."""

    kept_bytes: int
    flops: int
    flops_again: int


def sizes(config: GPTConfig) -> Sizes:
    return _sizes(_model(config))


def block(config: Configuration) -> Block:
    """Measures a block at the sequence length and in the precision of a configuration."""
    bf16, lean = config.precision == "bf16", has_own_operations(config)
    return _block(_model(config), config.sequence_length, bf16, lean)


def _model(config: GPTConfig) -> tuple:
    return tuple((key, getattr(config, key)) for key in MODEL_KEYS)


@lru_cache(maxsize=16)
def _sizes(keys: tuple) -> Sizes:
    with torch.device("meta"):
        model = GPT(GPTConfig(**dict(keys)))
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in model.layers().items()}
    blocks = [count for name, count in counts.items() if name.startswith("decoder.")]
    shapes = tuple(parameter.shape for parameter in model.parameters())
    matrix = max(parameter.numel() for parameter in model.decoder[0].parameters())
    ends = (sum(counts.values()) - sum(blocks), counts["embedding"])
    head = sum(counts[name] for name in model.head_layers())
    return Sizes(*ends, head, max(blocks), matrix, sum(blocks), shapes)


@lru_cache(maxsize=16)
def _block(keys: tuple, length: int, bf16: bool, lean: bool) -> Block:
    config = GPTConfig(**dict(keys))
    dtype, kept, again = torch.bfloat16 if bf16 else torch.float32, {}, 0
    with torch.device("meta"):
        one = GPT(replace(config, depth=1)).decoder[0].to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        one.to_empty(device="cpu")
        if lean:
            use_lean_norms(one)
        own = {StorageWeakRef(parameter.untyped_storage()) for parameter in one.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal again
            again = counter.get_total_flops()  # without the operation that keeps it
            storage = tensor.untyped_storage()
            if (reference := StorageWeakRef(storage)) not in own:
                kept[reference] = storage.nbytes()
            return tensor

        x = torch.empty(1, length, config.width, dtype=dtype, requires_grad=True)
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            output = one(x)  # noqa: F841 - what it keeps is counted while it lives
    return Block(sum(kept.values()), counter.get_total_flops(), again)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *rest, **more) -> int:
    """A causal attention sees half of the positions on average: two products of half the size."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1]) // 2


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
