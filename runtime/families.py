"""The models of transformers that model.py can be: their configurations, names and blocks."""

import re
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ROPE_POSITIONS, GPTConfig
from runtime.console import UserError, short


class NotInTransformers(UserError):
    """No model of transformers computes what this one does."""


class Family:
    """How a model of transformers spells what model.py has.

    title: its name. required: the values of its configuration that model.py can compute.
    modules: its modules by ours, several where ours holds their rows one after the other; in a
    block after `blocks`. transposed: whether its linear layers hold the transpose of ours.
    """

    title: str
    required: ClassVar[dict[str, list]]
    modules: ClassVar[dict[str, tuple[str, ...]]]
    prefix: str
    blocks: str
    transposed = False

    def ours(self, theirs) -> dict[str, object]:
        """The keys of the model that `theirs`, a configuration of transformers, describes."""
        raise NotImplementedError

    def theirs(self, config: GPTConfig):
        """The configuration of transformers that describes our model."""
        raise NotImplementedError

    def block(self, theirs) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """One block of transformers, and what runs it on the model's activations."""
        raise NotImplementedError

    def complete(self, model: nn.Module, device: str) -> None:
        """Makes what a model of theirs, built on meta, has beside its weights."""

    def normed(self, x: Tensor, weights: dict[str, Tensor], config: GPTConfig) -> Tensor:
        """x after the final norm, as theirs computes it, with our names of its weights."""
        raise NotImplementedError

    def rows(self, module: str, config: GPTConfig) -> list[int] | None:
        """Rows of each of their modules in one of ours; None: it is one module."""
        return None

    def names(self, name: str) -> list[str]:
        """Their names of one of our weights; NotInTransformers where they have none."""
        module, kind = name.rsplit(".", 1)
        block = re.fullmatch(r"decoder\.(\d+)\.(.+)", module)
        if (found := self.modules.get(block[2] if block else module)) is None:
            raise NotInTransformers(f"{short(name)} has no place in transformers' {self.title}")
        place = f"{self.blocks}.{block[1]}." if block else ""
        return [f"{'' if m == 'lm_head' else self.prefix}{place}{m}.{kind}" for m in found]

    def is_transposed(self, name: str) -> bool:
        return self.transposed and re.search(r"(attn|mlp)\.\w+\.weight$", name) is not None

    def split(self, name: str, tensor: Tensor, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
        """(their name, tensor) of one of our weights."""
        rows = self.rows(name.rsplit(".", 1)[0], config) or [len(tensor)]
        for theirs, part in zip(self.names(name), tensor.split(rows), strict=True):
            yield theirs, part.T.contiguous() if self.is_transposed(name) else part.contiguous()


class GPT2(Family):
    title = "GPT-2"
    required: ClassVar = {
        "activation_function": ["gelu", "gelu_new"],
        "tie_word_embeddings": [True],
        "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False],
        "quantization_config": [None],
    }
    modules: ClassVar = {
        "ln_1": ("ln_1",),
        "attn.qkv": ("attn.c_attn",),
        "attn.proj": ("attn.c_proj",),
        "ln_2": ("ln_2",),
        "mlp.fc": ("mlp.c_fc",),
        "mlp.proj": ("mlp.c_proj",),
        "embedding.tokens": ("wte",),
        "embedding.positions": ("wpe",),
        "norm": ("ln_f",),
    }
    prefix, blocks, transposed = "transformer.", "h", True

    def ours(self, theirs) -> dict[str, object]:
        return {
            "width": theirs.n_embd,
            "depth": theirs.n_layer,
            "heads": theirs.n_head,
            "mlp_width": theirs.n_inner,
            "vocab_size": theirs.vocab_size,
            "max_position_embeddings": theirs.n_positions,
            "activation": theirs.activation_function,
            "norm_eps": theirs.layer_norm_epsilon,
        }

    def theirs(self, config: GPTConfig):
        from transformers import GPT2Config

        end_of_text = 50256 if config.vocab_size > 50256 else None  # in GPT-2's vocabulary
        return GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_position_embeddings,
            n_embd=config.width,
            n_layer=config.depth,
            n_head=config.heads,
            n_inner=config.mlp_width,
            activation_function=config.activation,
            layer_norm_epsilon=config.norm_eps,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            initializer_range=config.init_std,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            architectures=["GPT2LMHeadModel"],
        )

    def block(self, theirs) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        with torch.device("meta"):
            block = GPT2Block(theirs, 0).eval()

        def run(x: Tensor) -> Tensor:
            output = block(x)
            return output[0] if isinstance(output, tuple) else output  # before transformers 5

        return block, run

    def normed(self, x: Tensor, weights: dict[str, Tensor], config: GPTConfig) -> Tensor:
        bias = weights.get("norm.bias")
        return F.layer_norm(x, x.shape[-1:], weights["norm.weight"], bias, config.norm_eps)

    def split(self, name: str, tensor: Tensor, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
        """With biases of zero where ours has none."""
        yield from super().split(name, tensor, config)
        if not config.bias and not name.startswith("embedding"):
            (theirs,) = self.names(name)
            yield theirs.removesuffix("weight") + "bias", tensor.new_zeros(len(tensor))


class Llama(Family):
    title = "Llama"
    required: ClassVar = {
        "hidden_act": ["silu"],
        "pretraining_tp": [None, 1],
        "quantization_config": [None],
    }
    modules: ClassVar = {
        "ln_1": ("input_layernorm",),
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.proj": ("self_attn.o_proj",),
        "ln_2": ("post_attention_layernorm",),
        "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.proj": ("mlp.down_proj",),
        "embedding.tokens": ("embed_tokens",),
        "norm": ("norm",),
        "lm_head": ("lm_head",),
    }
    prefix, blocks = "model.", "layers"
    scaling: ClassVar = {  # of Llama 3.1 and later
        "rope_type": "llama3",
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ROPE_POSITIONS,
    }

    def ours(self, theirs) -> dict[str, object]:
        if theirs.head_dim != theirs.hidden_size // theirs.num_attention_heads:
            raise ValueError(f"its head_dim is {theirs.head_dim}, which model.py can't compute")
        if theirs.attention_bias != theirs.mlp_bias:
            raise ValueError("its attention_bias is not its mlp_bias, as in model.py")
        rope = dict(theirs.rope_parameters)
        theta, factor = rope.pop("rope_theta"), 1.0
        if rope.get("rope_type") == "llama3":
            factor = rope.pop("factor")
        if rope not in ({"rope_type": "default"}, self.scaling):
            raise ValueError(f"its rope_parameters are {rope}, which model.py can't compute")
        return {
            "width": theirs.hidden_size,
            "depth": theirs.num_hidden_layers,
            "heads": theirs.num_attention_heads,
            "kv_heads": theirs.num_key_value_heads,
            "mlp_width": theirs.intermediate_size,
            "vocab_size": theirs.vocab_size,
            "max_position_embeddings": theirs.max_position_embeddings,
            "bias": theirs.attention_bias,
            "activation": "swiglu",
            "norm": "rmsnorm",
            "norm_eps": theirs.rms_norm_eps,
            "positions": "rotary",
            "rope_theta": theta,
            "rope_scaling": factor,
            "tied_head": theirs.tie_word_embeddings,
        }

    def theirs(self, config: GPTConfig):
        from transformers import LlamaConfig

        rope = {"rope_type": "default"}
        if config.rope_scaling != 1:
            rope = self.scaling | {"factor": config.rope_scaling}
        return LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width or 4 * config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads or config.heads,
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=config.init_std,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied_head,
            rope_parameters=rope | {"rope_theta": config.rope_theta},
            attention_bias=config.bias,
            mlp_bias=config.bias,
            attention_dropout=config.dropout,
            bos_token_id=None,
            eos_token_id=None,
            architectures=["LlamaForCausalLM"],
        )

    def block(self, theirs) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        with torch.device("meta"):
            block = LlamaDecoderLayer(theirs, 0).eval()
        rotary = LlamaRotaryEmbedding(theirs)

        def run(x: Tensor) -> Tensor:
            angles = rotary(x, torch.arange(x.shape[1])[None])
            output = block(x, position_embeddings=angles)
            return output[0] if isinstance(output, tuple) else output

        return block, run

    def complete(self, model: nn.Module, device: str) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)

    def normed(self, x: Tensor, weights: dict[str, Tensor], config: GPTConfig) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights["norm.weight"], config.norm_eps)

    def rows(self, module: str, config: GPTConfig) -> list[int] | None:
        if module.endswith("attn.qkv"):
            shared = (config.kv_heads or config.heads) * config.head_width
            return [config.width, shared, shared]
        if module.endswith("mlp.fc"):
            return [config.mlp_width or 4 * config.width] * 2
        return None


FAMILIES = {"gpt2": GPT2(), "llama": Llama()}


def family_of(config: GPTConfig) -> Family:
    """The one that has all parts of a model; NotInTransformers where none has."""
    llama = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu"}
    if all(getattr(config, key) == value for key, value in llama.items()):
        return FAMILIES["llama"]
    other = [
        f"{key} {getattr(config, key)}" for key, v in llama.items() if getattr(config, key) == v
    ]
    if config.kv_heads not in (None, config.heads):
        other.append(f"kv_heads {config.kv_heads}")
    if not config.tied_head:
        other.append("tied_head false")
    if other:
        raise NotInTransformers(f"transformers' GPT-2 has no {', '.join(other)}")
    return FAMILIES["gpt2"]
