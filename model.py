"""GPT-2, and with other values of its configuration Llama: a pre-norm decoder-only transformer.

The model is a list of layers: `embedding`, each block `decoder.N`, `norm`, and `lm_head` if it has
weights of its own. `forward` runs one after the other; an engine may do so itself through `embed`,
`decoder[N]` and `loss` instead. Nothing here knows of devices, ranks, optimizers or files.
"""

import hashlib
import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import cross_entropy, summed_loss

LARGEST = {"depth": 10**4, "vocab_size": 10**9, "max_position_embeddings": 10**9}  # others 10**6
ROPE_POSITIONS = 8192  # that Llama 3.1 was first trained with


@dataclass
class GPTConfig:
    """Model

    Args:
        width: size of the residual stream
        depth: number of blocks
        heads: attention heads in a block; divides width
        kv_heads: heads of keys and values, each for a group of heads; null: as many as heads
        mlp_width: size of the hidden layer of a block; null: four times the width
        vocab_size: number of token ids
        max_position_embeddings: longest sequence
        dropout: probability, after the embedding, in attention and on both residual branches
        bias: whether linear layers and norms have biases
        init_std: standard deviation of the initial weights
        activation: gelu (exact), gelu_new (the tanh form of OpenAI's released GPT-2 weights) or
            swiglu, of Llama: silu of one hidden layer times another
        norm: layernorm or rmsnorm, which has no bias
        norm_eps: added to a norm's variance
        positions: learned, added to the embedding; or rotary, of queries and keys
        rope_theta: base of the rotary frequencies
        rope_scaling: factor by which Llama 3.1 and later slow the low rotary frequencies; 1: none
        tied_head: whether the logits use the weights of the embedding
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    dropout: float = 0.0
    bias: bool = True
    init_std: float = 0.02
    activation: Literal["gelu", "gelu_new", "swiglu"] = "gelu"
    kv_heads: int | None = None
    mlp_width: int | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0
    tied_head: bool = True

    def __post_init__(self):
        for key in (field.name for field in fields(GPTConfig) if "int" in str(field.type)):
            value, most = getattr(self, key), LARGEST.get(key, 10**6)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{key}: {value} is not from 1 to {most:,}")
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}")
        self.head_width = self.width // self.heads
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads {self.heads}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"heads: rotary positions need an even width {self.head_width} each")
        least_of = {"init_std": 0, "norm_eps": 0, "rope_theta": 1, "rope_scaling": 1}
        for key, least in least_of.items():
            if not least <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}: {getattr(self, key)} is not in [{least}, inf)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")


class Norm(nn.LayerNorm):
    """Computed in fp32 whatever its input: in bf16 a CPU sums the gradients of weight and bias in
    bf16 too, where 256 + 1 is 256."""

    layer_norm, rms_norm = staticmethod(F.layer_norm), staticmethod(F.rms_norm)

    def __init__(self, config: GPTConfig):
        bias = config.bias and config.norm == "layernorm"
        super().__init__(config.width, config.norm_eps, bias=bias)
        self.is_rms = config.norm == "rmsnorm"

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        if self.is_rms:
            y = self.rms_norm(x.float(), self.normalized_shape, weight, self.eps)
        else:
            y = self.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(x.dtype)


def rotary(config: GPTConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, (length, head_width), fp32: Su et al. 2021,
    "RoFormer", 3.4, in the order of Hugging Face's Llama. As in Llama 3.1, `rope_scaling` slows
    frequencies of up to one turn over ROPE_POSITIONS in full, and from four turns not at all."""
    steps = torch.arange(0, config.head_width, 2, device=device).float() / config.head_width
    frequencies = 1.0 / config.rope_theta**steps
    kept = ((ROPE_POSITIONS * frequencies / math.tau - 1) / 3).clamp(0, 1)
    frequencies = (1 - kept) * frequencies / config.rope_scaling + kept * frequencies
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns each pair (i, i + half) of (..., length, head_width) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class Attention(nn.Module):
    """Causal self-attention; a group of heads may share keys and values."""

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.kv_heads = config, config.kv_heads or config.heads
        self.widths = [config.width, *[self.kv_heads * config.head_width] * 2]
        self.qkv = nn.Linear(config.width, sum(self.widths), bias=config.bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        config, (batch, length, width) = self.config, x.shape
        q, k, v = (
            part.view(batch, length, -1, config.head_width).transpose(1, 2)
            for part in self.qkv(x).split(self.widths, dim=2)
        )
        if config.positions == "rotary":
            angles = [part.to(x.dtype) for part in rotary(config, length, x.device)]
            q, k = rotate(q, *angles), rotate(k, *angles)
        group = (-1, -1, config.heads // self.kv_heads, -1, -1)
        k, v = (part.unsqueeze(2).expand(group).flatten(1, 2) for part in (k, v))
        dropout = config.dropout if self.training else 0.0
        y = self.attend(q, k, v, is_causal=True, dropout_p=dropout)
        y = self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return F.dropout(y, config.dropout, self.training)


class MLP(nn.Module):
    """One hidden layer; with swiglu two, the first of which gates the second."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation, self.dropout = config.activation, config.dropout
        hidden = config.mlp_width or 4 * config.width
        layers = 2 if self.activation == "swiglu" else 1
        self.fc = nn.Linear(config.width, layers * hidden, bias=config.bias)
        self.proj = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_new" else "none")
        return F.dropout(self.proj(x), self.dropout, self.training)


class Block(nn.Module):
    """(batch, length, width) -> the same."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = Norm(config)
        self.attn = Attention(config)
        self.ln_2 = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Embedding(nn.Module):
    """Tokens, and their positions where these are learned."""

    sparse_grad = False  # whether the gradient of tokens has the rows alone that were looked up

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_position_embeddings, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        weight, sparse = self.tokens.weight, self.sparse_grad
        # float() for the sake of its gradient: a CPU sums a bf16 one in bf16, as in Norm
        x = F.embedding(ids, weight if sparse else weight.float(), sparse=sparse).to(weight.dtype)
        return x + self.positions.weight[: ids.shape[1]] if hasattr(self, "positions") else x


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
        self.norm = Norm(config)
        if not config.tied_head:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def layers(self) -> dict[str, nn.Module]:
        """The modules that own the parameters, by name, in the order of the forward pass."""
        blocks = {f"decoder.{i}": block for i, block in enumerate(self.decoder)}
        head = {} if self.config.tied_head else {"lm_head": self.lm_head}
        return {"embedding": self.embedding, **blocks, "norm": self.norm, **head}

    def head_layers(self) -> dict[str, nn.Module]:
        """Those whose weights `head` uses."""
        last = "embedding" if self.config.tied_head else "lm_head"
        return {name: self.get_submodule(name) for name in (last, "norm")}

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
        """(..., width) -> logits (..., vocab_size). ChunkedLoss takes their gradient by hand."""
        return self.head_linear(self.norm(x), self.table)

    @property
    def table(self) -> nn.Parameter:
        """(vocab_size, width): what the logits are made with."""
        return (self.embedding.tokens if self.config.tied_head else self.lm_head).weight

    def loss(self, x: Tensor, targets: Tensor, tokens: int = 0) -> Tensor:
        """The last block's output (batch, length, width), targets (batch, length) -> the sum, not
        the mean, of the cross-entropies in nats, fp32; targets equal to IGNORE are not counted.

        With `tokens` the sum is divided by them, and if the table has a gradient, its part is added
        here instead of in backward(). So call backward() once, and do not scale the loss.
        """
        return summed_loss(self, x.flatten(0, 1), targets.flatten(), tokens)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, dropout_seed: int = 0, tokens: int = 0
    ) -> Tensor:
        """Without targets the logits (batch, length, vocab_size), else the loss."""
        self.seed_dropout(dropout_seed, 0)
        x = self.embed(ids)
        for i, block in enumerate(self.decoder):
            self.seed_dropout(dropout_seed, i + 1)
            x = block(x)
        return self.head(x) if targets is None else self.loss(x, targets, tokens)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
