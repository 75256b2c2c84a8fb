"""The models of transformers that model.py can be: tables of keys and modules, read both ways."""

import re
from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from common.console import UserError, short
from model import ROPE_POSITIONS, GPTConfig
from weights.hub import reading


class Family:
    """How a model of transformers spells what model.py has.

    title, model_type, architecture: its names. parts: the values of our keys that it can have.
    keys: its keys by ours; those here are in every family. dropouts: its keys of our dropout.
    modules: its modules by ours, several where ours holds their rows one after the other; those of
    a block follow `blocks` and its number, and all but the head follow `prefix`. transposed:
    whether its linear layers hold the transpose of ours.
    """

    keys: ClassVar = {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "tied_head": "tie_word_embeddings",
    }
    transposed = False

    def from_hf(self, theirs, **more) -> dict[str, object]:
        """Return our keys for `theirs`, a configuration of transformers, and `more` of ours; a
        value that we lack is another one of ours."""
        values = {ours: getattr(theirs, key) for ours, key in self.keys.items()} | more
        for key, known in self.parts.items():
            if values.get(key) not in known:
                values[key] = known[0]
        return values

    def to_hf(self, config: GPTConfig) -> dict[str, object]:
        """Return the keys of transformers for our model."""
        return {key: getattr(config, ours) for ours, key in self.keys.items()}

    def theirs(self, config: GPTConfig):
        """Return the configuration of transformers that describes our model. Raises UserError
        where it refuses a value."""
        from transformers import AutoConfig

        with reading(f"transformers' {self.title}"):
            return AutoConfig.for_model(
                self.model_type,
                **self.to_hf(config),
                **dict.fromkeys(self.dropouts, config.dropout),
                initializer_range=config.init_std,
                bos_token_id=None,
                eos_token_id=None,
                architectures=[self.architecture],
            )

    def lacks(self, config: GPTConfig) -> list[str]:
        """Return the parts of our model that theirs can't have."""
        values = {key: getattr(config, key) for key in self.parts}
        return [f"{key} {value}" for key, value in values.items() if value not in self.parts[key]]

    def names(self, name: str) -> list[str]:
        """Return their names of one of our weights. Raises UserError if they have none."""
        module, kind = name.rsplit(".", 1)
        block = re.fullmatch(r"decoder\.(\d+)\.(.+)", module)
        if (found := self.modules.get(block[2] if block else module)) is None:
            raise UserError(f"{short(name)} has no place in transformers' {self.title}")
        place = f"{self.blocks}.{block[1]}." if block else ""
        return [f"{'' if m == 'lm_head' else self.prefix}{place}{m}.{kind}" for m in found]

    def is_transposed(self, name: str) -> bool:
        return self.transposed and re.search(r"(attn|mlp)\.\w+\.weight$", name) is not None

    def split(self, name: str, tensor: Tensor, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
        """Yield (their name, tensor) of one of our weights."""
        names = self.names(name)
        rows = len(tensor) // len(names)
        if len(names) == 3:  # queries, keys and values
            rows = config.qkv_widths
        for theirs, part in zip(names, tensor.split(rows), strict=True):
            yield theirs, part.T.contiguous() if self.is_transposed(name) else part.contiguous()


class GPT2(Family):
    title, model_type, architecture = "GPT-2", "gpt2", "GPT2LMHeadModel"
    parts: ClassVar = {
        "norm": ["layernorm"],
        "positions": ["learned"],
        "activation": ["gelu", "gelu_new"],
        "bias": [True, False],
        "head_width": [None],
        "qk_norm": [False],
    }
    keys: ClassVar = Family.keys | {
        "mlp_width": "n_inner",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
    }
    dropouts = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    modules: ClassVar = {
        "ln_1": ("ln_1",),
        "attn.qkv": ("attn.c_attn",),
        "attn.proj": ("attn.c_proj",),
        "ln_2": ("ln_2",),
        "mlp.fc": ("mlp.c_fc",),
        "mlp.proj": ("mlp.c_proj",),
        "embedding.tokens": ("wte",),
        "embedding.positions": ("wpe",),
        "head.norm": ("ln_f",),
        "head.linear": ("lm_head",),
    }
    prefix, blocks, transposed = "transformer.", "h", True

    def split(self, name: str, tensor: Tensor, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
        """Yield the same, and biases of zero where ours has none."""
        yield from super().split(name, tensor, config)
        if not config.bias and not name.startswith(("embedding", "head.linear")):
            (theirs,) = self.names(name)
            yield theirs.removesuffix("weight") + "bias", tensor.new_zeros(len(tensor))


class Llama(Family):
    """biases: its keys of which linear layers have biases. fixed: its keys that have one value."""

    title, model_type, architecture = "Llama", "llama", "LlamaForCausalLM"
    parts: ClassVar = {
        "norm": ["rmsnorm"],
        "positions": ["rotary"],
        "activation": ["swiglu"],
        "bias": [False, True, "attention", "mlp"],
        "qk_norm": [False],
    }
    biases = ("attention_bias", "mlp_bias")
    fixed: ClassVar = {"hidden_act": "silu"}
    keys: ClassVar = Family.keys | {
        "kv_heads": "num_key_value_heads",
        "mlp_width": "intermediate_size",
        "norm_eps": "rms_norm_eps",
    }
    dropouts = ("attention_dropout",)
    modules: ClassVar = {
        "ln_1": ("input_layernorm",),
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.proj": ("self_attn.o_proj",),
        "attn.q_norm": ("self_attn.q_norm",),
        "attn.k_norm": ("self_attn.k_norm",),
        "ln_2": ("post_attention_layernorm",),
        "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.proj": ("mlp.down_proj",),
        "embedding.tokens": ("embed_tokens",),
        "head.norm": ("norm",),
        "head.linear": ("lm_head",),
    }
    prefix, blocks = "model.", "layers"
    scaling: ClassVar = {  # of Llama 3.1 and later
        "rope_type": "llama3",
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ROPE_POSITIONS,
    }

    def from_hf(self, theirs) -> dict[str, object]:
        rope = theirs.rope_parameters
        factor = rope["factor"] if rope.get("rope_type") == "llama3" else 1.0
        biased = [key.removesuffix("_bias") for key in self.biases if getattr(theirs, key)]
        head_width = getattr(theirs, "head_dim", None)
        if head_width and head_width * theirs.num_attention_heads == theirs.hidden_size:
            head_width = None
        return super().from_hf(
            theirs,
            rope_theta=rope["rope_theta"],
            rope_scaling=factor,
            head_width=head_width,
            bias=True if len(biased) == 2 else next(iter(biased), False),
        )

    def to_hf(self, config: GPTConfig) -> dict[str, object]:
        rope = {"rope_type": "default"}
        if config.rope_scaling != 1:
            rope = self.scaling | {"factor": config.rope_scaling}
        biased = {key: config.bias in (True, key.removesuffix("_bias")) for key in self.biases}
        return {
            **super().to_hf(config),
            **biased,
            **self.fixed,
            "num_key_value_heads": config.kv_heads or config.heads,
            "intermediate_size": config.mlp_width or 4 * config.width,
            "head_dim": config.head_size,
            "rope_parameters": rope | {"rope_theta": config.rope_theta},
        }


class Mistral(Llama):
    title, model_type, architecture = "Mistral", "mistral", "MistralForCausalLM"
    parts: ClassVar = Llama.parts | {"bias": [False]}
    biases = ()
    fixed: ClassVar = Llama.fixed | {"sliding_window": None}


class Qwen2(Mistral):
    title, model_type, architecture = "Qwen2", "qwen2", "Qwen2ForCausalLM"
    parts: ClassVar = Llama.parts | {"bias": ["qkv"]}


class Qwen3(Mistral):
    title, model_type, architecture = "Qwen3", "qwen3", "Qwen3ForCausalLM"
    parts: ClassVar = Llama.parts | {"bias": [False, "attention"], "qk_norm": [True]}
    biases = ("attention_bias",)


FAMILIES = {kind.model_type: kind() for kind in (GPT2, Llama, Mistral, Qwen2, Qwen3)}


def family_of(config: GPTConfig) -> Family:
    """Return the one that has all parts of a model. Raises UserError where none has."""
    nearest = min(FAMILIES.values(), key=lambda family: len(family.lacks(config)))
    if lacking := nearest.lacks(config):
        raise UserError(f"transformers' {nearest.title} has no {', '.join(lacking)}")
    return nearest
