"""GPT-2: learned positions, pre-LayerNorm, causal attention, embedding tied to the head.

The model is a list of layers: `embedding`, each block `decoder.N`, and `norm`. `forward` runs one
after the other; an engine may do so itself through `embed`, `decoder[N]` and `loss` instead.
Nothing here knows of devices, ranks, optimizers or files.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import IGNORE, ChunkedLoss, cross_entropy

LARGEST = {
    "width": 10**6,
    "depth": 10**4,
    "heads": 10**6,
    "vocab_size": 10**9,
    "max_position_embeddings": 10**9,
}


@dataclass
class GPTConfig:
    """Model

    Args:
        width: size of the residual stream
        depth: number of blocks
        heads: attention heads in a block; divides width
        vocab_size: number of token ids
        max_position_embeddings: longest sequence the learned positions allow
        dropout: probability, after the embedding, in attention and on both residual branches
        bias: whether linear layers and norms have biases
        init_std: standard deviation of the initial weights
        activation: gelu (exact) or gelu_new (the tanh form of OpenAI's released GPT-2 weights)
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    dropout: float = 0.0
    bias: bool = True
    init_std: float = 0.02
    activation: Literal["gelu", "gelu_new"] = "gelu"

    def __post_init__(self):
        for key, most in LARGEST.items():
            if not 1 <= getattr(self, key) <= most:
                raise ValueError(f"{key}: {getattr(self, key)} is not from 1 to {most:,}")
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}")
        if not self.init_std >= 0:
            raise ValueError(f"init_std: {self.init_std} is negative")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")


class LayerNorm(nn.LayerNorm):
    """Computed in fp32 whatever its input: in bf16 a CPU sums the gradients of weight and bias in
    bf16 too, where 256 + 1 is 256."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.width, eps=1e-5, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        y = self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.approximate = "tanh" if config.activation == "gelu_new" else "none"
        self.fc = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.proj = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(F.gelu(self.fc(x), approximate=self.approximate))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """(batch, length, width) -> the same."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Embedding(nn.Module):
    """Tokens and their learned positions."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_position_embeddings, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        # float() for the sake of its gradient: a CPU sums a bf16 one in bf16, as in LayerNorm
        tokens = F.embedding(ids, self.tokens.weight.float()).to(self.tokens.weight.dtype)
        return tokens + self.positions.weight[: ids.shape[1]]


class GPT(nn.Module):
    """A decoder-only transformer. Weights are not drawn at construction: see `init_layer`."""

    loss_rows = 1024  # positions whose logits exist at one time
    cross_entropy = staticmethod(cross_entropy)
    head_linear = staticmethod(F.linear)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.decoder = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = LayerNorm(config)

    def layers(self) -> dict[str, nn.Module]:
        """The modules that own the parameters, by name, in the order of the forward pass."""
        blocks = {f"decoder.{i}": block for i, block in enumerate(self.decoder)}
        return {"embedding": self.embedding, **blocks, "norm": self.norm}

    @torch.no_grad()
    def init_layer(self, name: str, seed: int) -> None:
        """Draws the weights of one layer, in place, as a function of (seed, name) alone.

        normal(init_std), residual projections divided by sqrt(2·depth), biases 0, norms 1 (Radford
        et al. 2019, "Language Models are Unsupervised Multitask Learners", 2.3). The layer must be
        on the CPU, whose generator gives every engine the same numbers.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        for path, module in self.get_submodule(name).named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = path.endswith("proj")
                std = self.config.init_std / (math.sqrt(2 * self.config.depth) if residual else 1)
                module.weight.normal_(0.0, std, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
            elif next(module.parameters(recurse=False), None) is not None:
                module.reset_parameters()

    def seed_dropout(self, seed: int, layer: int) -> None:
        """Makes the masks of a layer (0: the embedding, i + 1: block i) a function of (seed,
        layer), so that recomputing, resuming and streaming draw them again."""
        if self.training and self.config.dropout > 0:
            torch.manual_seed(derive_seed(seed, layer))

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, length) int64 -> (batch, length, width)."""
        return F.dropout(self.embedding(ids), self.config.dropout, self.training)

    def head(self, x: Tensor) -> Tensor:
        """(..., width) -> logits (..., vocab_size). `loss` overwrites them with their gradient: the
        last operation must not be one whose own gradient needs its result, such as a tanh."""
        return self.head_linear(self.norm(x), self.embedding.tokens.weight)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The last block's output (batch, length, width), targets (batch, length) -> the sum, not
        the mean, of the cross-entropies in nats, fp32; targets equal to IGNORE are not counted."""
        x, targets = x.flatten(0, 1), targets.flatten()
        if len(x) >= self.loss_rows and torch.is_grad_enabled():
            weights = [*self.embedding.parameters(), *self.norm.parameters()]
            return ChunkedLoss.apply(self, x, targets, *weights)
        chunks = zip(x.split(self.loss_rows), targets.split(self.loss_rows), strict=True)
        kind = {"ignore_index": IGNORE, "reduction": "sum"}
        losses = [F.cross_entropy(self.head(x).float(), y, **kind) for x, y in chunks]
        return torch.stack(losses).sum()

    def forward(self, ids: Tensor, targets: Tensor | None = None, dropout_seed: int = 0) -> Tensor:
        """Without targets the logits (batch, length, vocab_size), else the sum of the losses."""
        self.seed_dropout(dropout_seed, 0)
        x = self.embed(ids)
        for i, block in enumerate(self.decoder):
            self.seed_dropout(dropout_seed, i + 1)
            x = block(x)
        return self.head(x) if targets is None else self.loss(x, targets)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
