"""GPT-2, and with other values of its configuration Llama, Mistral, Qwen2 and Qwen3: a pre-norm
decoder-only transformer.

The model is a list of layers: `embedding`, each block `decoder.N`, and `head`. `forward` runs one
after the other; an engine may do so itself through `embed`, `decoder[N]` and `loss` instead. Every
parameter belongs to a layer, which is made from the configuration alone. Nothing here knows of
devices, ranks, optimizers or files.
"""

import hashlib
import math
from dataclasses import dataclass, fields
from threading import Lock
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from loss import cross_entropy, summed_loss

LARGEST = {"depth": 10**4, "head_width": 10**4}  # others 10**6
LARGEST |= {"vocab_size": 10**9, "max_position_embeddings": 10**9}
ROPE_POSITIONS = 8192  # that Llama 3.1 was first trained with


@dataclass
class GPTConfig:
    """Model

    Args:
        width: size of the residual stream
        depth: number of blocks
        heads: attention heads in a block
        kv_heads: heads of keys and values, each for a group of heads; null: as many as heads
        head_width: size of a head's queries, keys and values; null: width divided by heads
        qk_norm: norm each head's queries and keys, as Qwen3 does
        mlp_width: size of the hidden layer of a block; null: four times the width
        vocab_size: number of token ids
        max_position_embeddings: longest sequence
        dropout: probability, after the embedding, in attention and on both residual branches
        bias: true: linear layers and layernorms have biases; false: none; or which have: attention,
            qkv (its queries, keys and values alone, as in Qwen2) or mlp
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
    bias: bool | Literal["attention", "qkv", "mlp"] = True
    init_std: float = 0.02
    activation: Literal["gelu", "gelu_new", "swiglu"] = "gelu"
    kv_heads: int | None = None
    head_width: int | None = None
    qk_norm: bool = False
    mlp_width: int | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0
    tied_head: bool = True

    def __post_init__(self):
        for key in (field.name for field in fields(GPTConfig) if "int" in str(field.type)):
            value = getattr(self, key)
            most = LARGEST.get(key, 10**6)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{key}: {value} is not from 1 to {most:,}")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads {self.heads}")
        self.head_size = self.head_width or self.width // self.heads
        shared = (self.kv_heads or self.heads) * self.head_size
        self.qkv_widths = [self.heads * self.head_size, shared, shared]
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(f"heads: rotary positions need an even width {self.head_size} each")
        least_of = {"init_std": 0, "norm_eps": 0, "rope_theta": 1, "rope_scaling": 1}
        for key, least in least_of.items():
            if not least <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}: {getattr(self, key)} is not in [{least}, inf)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")


class Linear(nn.Linear):
    """A linear layer whose weights `GPT.build_layer` draws."""

    def reset_parameters(self) -> None:
        pass


class Norm(nn.LayerNorm):
    """The norm of a vector (..., size), computed in fp32; of the residual stream by default."""

    def __init__(self, config: GPTConfig, size: int | None = None):
        bias = config.bias is True and config.norm == "layernorm"
        super().__init__(size or config.width, config.norm_eps, bias=bias)
        self.is_rms = config.norm == "rmsnorm"

    def forward(self, x: Tensor) -> Tensor:
        if self.is_rms:
            return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return ops.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def rotary(config: GPTConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, (length, head_size), fp32: Su et al. 2021,
    "RoFormer", 3.4, in the order of Hugging Face's Llama. As in Llama 3.1, `rope_scaling` slows
    frequencies of up to one turn over ROPE_POSITIONS in full, and from four turns not at all."""
    steps = torch.arange(0, config.head_size, 2, device=device).float() / config.head_size
    frequencies = 1.0 / config.rope_theta**steps
    kept = ((ROPE_POSITIONS * frequencies / math.tau - 1) / 3).clamp(0, 1)
    frequencies = (1 - kept) * frequencies / config.rope_scaling + kept * frequencies
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns each pair (i, i + half) of (..., length, head_size) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def repeated(x: Tensor, times: int) -> Tensor:
    """Repeats each head of (batch, heads, length, head_size), which copies only if times > 1."""
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


class Attention(nn.Module):
    """Causal self-attention; a group of heads may share keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        biased = config.bias in (True, "attention")
        qkv_biased = biased or config.bias == "qkv"
        self.qkv = Linear(config.width, sum(config.qkv_widths), bias=qkv_biased)
        self.proj = Linear(config.qkv_widths[0], config.width, bias=biased)
        if config.qk_norm:
            self.q_norm = Norm(config, config.head_size)
            self.k_norm = Norm(config, config.head_size)

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        q, k, v = (
            part.unflatten(2, (-1, config.head_size)).transpose(1, 2)
            for part in self.qkv(x).split(config.qkv_widths, dim=2)
        )
        if config.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if config.positions == "rotary":
            angles = [part.to(x.dtype) for part in rotary(config, x.shape[1], x.device)]
            q = rotate(q, *angles)
            k = rotate(k, *angles)
        group = q.shape[1] // k.shape[1]  # heads that share keys and values
        k = repeated(k, group)
        v = repeated(v, group)
        dropout = config.dropout if self.training else 0.0
        y = ops.attention(q, k, v, is_causal=True, dropout_p=dropout)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return F.dropout(y, config.dropout, self.training)


class MLP(nn.Module):
    """One hidden layer; with swiglu two, the first of which gates the second."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        self.dropout = config.dropout
        hidden = config.mlp_width or 4 * config.width
        layers = 2 if self.activation == "swiglu" else 1
        biased = config.bias in (True, "mlp")
        self.fc = Linear(config.width, layers * hidden, bias=biased)
        self.proj = Linear(hidden, config.width, bias=biased)

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
    """Ids (batch, length) -> (batch, length, width): tokens, and their positions if learned."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.has_positions = config.positions == "learned"
        if self.has_positions:
            self.positions = nn.Embedding(config.max_position_embeddings, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = ops.embedding(ids, self.tokens.weight)
        return x + self.positions.weight[: ids.shape[1]] if self.has_positions else x


class Head(nn.Module):
    """(..., width) -> logits (..., vocab_size), with a table (vocab_size, width) of the embedding,
    or of its own. The loss, evaluation and sampling all use it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm = Norm(config)
        if not config.tied_head:
            self.linear = Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return ops.logits(self.norm(x), table)


class GPT(nn.Module):
    """A decoder-only transformer. Weights are not drawn at construction: see `build_layer`."""

    cross_entropy = staticmethod(cross_entropy)  # an engine may compile it
    building = Lock()

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.decoder = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)

    def layers(self) -> dict[str, nn.Module]:
        """Return the modules that own the parameters, by name, in the order of the forward pass."""
        blocks = {f"decoder.{i}": block for i, block in enumerate(self.decoder)}
        return {"embedding": self.embedding, **blocks, "head": self.head}

    def head_layers(self) -> list[str]:
        """Return the names of the layers whose weights the logits use."""
        return ["embedding", "head"] if self.config.tied_head else ["head"]

    @torch.no_grad()
    def build_layer(self, name: str, seed: int) -> nn.Module:
        """Return a new layer on the CPU, with weights that are a function of (seed, name) alone.

        Linear layers and embeddings are drawn: normal(init_std), residual projections divided by
        sqrt(2·depth), biases 0 (Radford et al. 2019, "Language Models are Unsupervised Multitask
        Learners", 2.3). Other parameters have what their constructor gave them.
        """
        layer_seed = derive_seed(seed, name)
        generator = torch.Generator().manual_seed(layer_seed)
        with GPT.building, torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(layer_seed)
            layer = type(self.get_submodule(name))(self.config)
        for path, module in layer.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = path.endswith("proj")
                std = self.config.init_std / (math.sqrt(2 * self.config.depth) if residual else 1)
                module.weight.normal_(0.0, std, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        return layer

    def seed_dropout(self, seed: int, layer: int) -> None:
        """Makes the masks of a layer (0: the embedding, i + 1: block i) a function of (seed,
        layer), so that recomputing, resuming and streaming draw them again."""
        if self.training and self.config.dropout > 0:
            torch.manual_seed(derive_seed(seed, layer))

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, length) int64 -> (batch, length, width)."""
        return F.dropout(self.embedding(ids), self.config.dropout, self.training)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., vocab_size) of the last block's output (..., width)."""
        return self.head(x, self.table)

    @property
    def table(self) -> nn.Parameter:
        """(vocab_size, width): what the logits are made with."""
        return (self.embedding.tokens if self.config.tied_head else self.head.linear).weight

    def loss(self, x: Tensor, targets: Tensor, tokens: int = 1) -> Tensor:
        """Return the sum of the cross-entropies in nats over `tokens`, fp32, of the last block's
        output (batch, length, width) and targets (batch, length); IGNORE is not counted."""
        return summed_loss(self, x.flatten(0, 1), targets.flatten(), tokens)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, dropout_seed: int = 0, tokens: int = 1
    ) -> Tensor:
        """Return the logits (batch, length, vocab_size), or with targets the loss."""
        self.seed_dropout(dropout_seed, 0)
        x = self.embed(ids)
        for i, block in enumerate(self.decoder):
            self.seed_dropout(dropout_seed, i + 1)
            x = block(x)
        return self.logits(x) if targets is None else self.loss(x, targets, tokens)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
