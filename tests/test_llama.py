"""Llama, Mistral, Qwen2 and Qwen3 in model.py, against transformers' models. Their parts train in
every engine: test_engines.py."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, refused
from helpers import LLAMA, batches_of, close, engine_config, flags_of, our_logits, quiet, reference
from transformers import AutoConfig, AutoModelForCausalLM

from configuration import Configuration
from engines import open_engine
from model import GPT
from weights.checkpoint import Checkpoint
from weights.families import family_of
from weights.huggingface import hugging_face_tensors, read_hugging_face

SCALING = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
SCALING |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
THETA = {"rope_type": "default", "rope_theta": 1000000.0}
SHAPES = {
    "grouped heads, tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "untied": ("llama", {}),
    "llama 3": ("llama", {"num_key_value_heads": 1, "rope_parameters": SCALING}),
    "biases": ("llama", {"vocab_size": 31, "attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 24, "attention_bias": True}),
    "biases of the mlp": ("llama", {"head_dim": 8, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "num_key_value_heads": 2}),
    "a window": ("mistral", {"sliding_window": 2048, "tie_word_embeddings": True}),
    "mistral nemo": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral scaled": ("mistral", {"sliding_window": None, "rope_parameters": SCALING}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 31}),
    "qwen2 theta": ("qwen2", {"num_key_value_heads": 1, "rope_parameters": THETA}),
    "qwen2 wide": ("qwen2", {"head_dim": 24}),
    "qwen3": ("qwen3", {"head_dim": 32, "num_key_value_heads": 2}),
    "qwen3 tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 biases": ("qwen3", {"head_dim": 8, "attention_bias": True, "rope_parameters": THETA}),
    "qwen3 odd heads": ("qwen3", {"head_dim": 32, "num_attention_heads": 5}),
}
# One of each family in every run of the tests, and the others where there is time
EACH = {"wide heads", "a window", "qwen2", "qwen3"}
SOME = [s if s in EACH else pytest.param(s, marks=pytest.mark.long) for s in SHAPES]


def their_model(out: Path, positions: int = 16384, kind: str = "llama", **keys):
    """A random model of transformers, saved in `out`, whose norms are not all ones."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "intermediate_size": 88, "bos_token_id": None}
    shape |= {"max_position_embeddings": positions, "rms_norm_eps": 1e-5, "eos_token_id": None}
    shape |= keys
    shape = {"num_key_value_heads": shape["num_attention_heads"]} | shape
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(out, max_shard_size="100KB")
    return model


def loaded(out: Path, **keys) -> tuple[Configuration, GPT]:
    """The same in model.py."""
    config, read = read_hugging_face(Configuration(init_from=str(out), **keys))
    model = GPT(config).eval()
    model.load_state_dict({name: read(name) for name in model.state_dict()})
    return config, model


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, shape):
    """At positions where Llama 3's scaling matters too, and as our model is exported."""
    kind, keys = SHAPES[shape]
    theirs = their_model(tmp_path / "theirs", kind=kind, **keys)
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    config, model = loaded(tmp_path / "theirs")
    length = 2048 if keys.get("rope_parameters") == SCALING else 128
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    assert expected.abs().max() > 1
    assert (model(ids) - expected).abs().max() < 1e-4
    back = AutoModelForCausalLM.from_config(family_of(config).theirs(config)).eval()
    back.load_state_dict(dict(hugging_face_tensors(config, model.get_parameter)), strict=False)
    assert (back(ids).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SOME)
def test_there_and_back(run, config, tmp_path, shape):
    """Imported, trained three steps, exported and opened with transformers; then imported again."""
    kind, keys = SHAPES[shape]
    their_model(tmp_path / "theirs", 64, kind, **keys | {"vocab_size": max(VOCABULARY, 31)})
    flags = ["--init_from", tmp_path / "theirs", "--num_steps", 3, "--warmup_steps", 0]
    seen = run("train", config.path, *flags)
    assert seen.status == 0, seen.err
    checkpoint = Checkpoint(config.out / "checkpoint_3.mdl")
    out = tmp_path / "exported"
    assert run("export", "--checkpoint_path", checkpoint.path, "--out", out).status == 0
    theirs, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert theirs.config.model_type == kind.replace("mistral", "llama")  # which computes the same
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.randint(VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(0))
    expected = our_logits(checkpoint, ids)
    assert (theirs.eval()(ids).logits - expected).abs().max() < 1e-4
    _, again = loaded(out, sequence_length=64)
    assert (again(ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SOME)
def test_steps_equal_a_loop_over_transformers(dataset, tmp_path, shape):
    """Ten clipped steps."""
    kind, keys = SHAPES[shape]
    theirs = their_model(tmp_path / "theirs", 32, kind, **keys | {"vocab_size": VOCABULARY})
    rates = {"learning_rate": 1e-3, "num_steps": 10, "init_from": str(tmp_path / "theirs")}
    config, read = read_hugging_face(engine_config(**rates))
    engine = open_engine(config)
    engine.load(read, None)
    batches = batches_of(config, dataset)
    expected = reference(config, theirs, lambda ids: theirs(ids).logits, batches)
    for got, (loss, norm) in zip(engine.run(batches, 0, 10, quiet), expected, strict=True):
        assert norm > 0.1
        assert close(got.loss, loss, 1e-5), got.step
        assert close(got.grad_norm, norm, 1e-5), got.step


def test_sampling(run, config):
    """With transformers' Llama; a model with parts of both is sampled with model.py."""
    flags = [*flags_of(LLAMA), "--num_steps", 3]
    assert run("train", config.path, *flags).status == 0
    seen = run("sample", "--checkpoint_path", config.out, "--prompt", "ab", "--max_new_tokens", 60)
    assert seen.status == 0 and seen.out.startswith("ab") and not seen.err, seen.err
    mixed = ["--norm", "rmsnorm", "--num_steps", 3, "--out_dir", config.out.with_name("mixed")]
    assert run("train", config.path, *mixed).status == 0
    flags = ["--checkpoint_path", mixed[-1], "--prompt", "ab"]
    seen = run("sample", *flags, "--max_new_tokens", 9)
    assert "transformers' GPT-2 has no norm rmsnorm; generating with model.py" in seen.err
    seen = run("export", "--checkpoint_path", mixed[-1], "--out", config.out / "e")
    refused(seen, "can't be exp")


def test_export_in_bf16(run, config, tmp_path):
    run("train", config.path, *flags_of(LLAMA), "--num_steps", 3)
    flags = ["--checkpoint_path", config.out, "--out", tmp_path / "half", "--dtype", "bfloat16"]
    assert run("export", *flags).status == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert theirs.dtype == torch.bfloat16


BAD = {
    "hidden_act": ("gelu", "its hidden_act is gelu, which model.py can't compute"),
    "head_dim": (32, "self_attn.q_proj.weight has shape [64, 64], its config.json's is [128, 64]"),
    "attention_bias": (True, "it lacks model.layers.0.self_attn.q_proj.bias"),
    "rope_parameters": (
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        "its rope_parameters is {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 10000.0}, ",
    ),
    "model_type": ("gemma", "is 'gemma'; known are gpt2, llama, mistral, qwen2, qwen3"),
    "num_hidden_layers": (4, "it lacks model.layers.3."),
    "intermediate_size": (80, "model.layers.0.mlp.gate_proj.weight has shape [88, 64], its conf"),
}


@pytest.mark.parametrize("key", BAD)
def test_what_model_cannot_compute(run, config, tmp_path, key):
    value, message = BAD[key]
    their_model(tmp_path / "theirs", 64)
    path = tmp_path / "theirs/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(run("train", config.path, "--init_from", tmp_path / "theirs"), message)
    assert not config.out.exists()


def test_a_missing_shard(run, config, tmp_path):
    their_model(tmp_path / "theirs", 64)
    shard = sorted((tmp_path / "theirs").glob("model-*.safetensors"))[1]
    shard.unlink()
    seen = run("train", config.path, "--init_from", tmp_path / "theirs")
    refused(seen, f"it has no {shard.name!r}")


def test_sampling_a_released_model(run, config, tmp_path):
    """By the name of its folder, as init_from takes it."""
    run("train", config.path, *flags_of(LLAMA), "--num_steps", 3)
    out, flags = tmp_path / "exported", ["--max_new_tokens", 20, "--seed", 3, "--prompt", "ab"]
    run("export", "--checkpoint_path", config.out, "--out", out)
    ours = run("sample", "--checkpoint_path", config.out, *flags)
    theirs = run("sample", "--init_from", out, *flags)
    assert theirs.status == 0, theirs.err
    assert ours.out == theirs.out
    refused(run("sample", *flags), "--checkpoint_path or --init_from is required, and not both")
    (out / "config.json").write_text("{}")
    refused(run("sample", "--init_from", out, *flags), f"init_from: {out}: ")


def test_a_model_that_fits_in_bf16_only(run, config, monkeypatch):
    run("train", config.path, *flags_of(LLAMA), "--num_steps", 3)
    checkpoint = Checkpoint(config.out / "checkpoint_3.mdl")
    sizes = [math.prod(checkpoint.tensors[name]["shape"]) for name in checkpoint.weights]
    flags = ["--checkpoint_path", config.out, "--prompt", "ab", "--max_new_tokens", 3]
    for bytes_each, status in ((2, 0), (1, 1)):
        most = bytes_each * sum(sizes) + 8 * max(sizes)
        monkeypatch.setattr("runtime.generation.host_memory", lambda most=most: most)
        seen = run("sample", *flags)
        assert seen.status == status, seen.err
    refused(seen, "does not fit: its model needs 0.0 GB of memory")
