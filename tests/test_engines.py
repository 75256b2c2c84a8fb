"""What every engine does alike, through the commands. A new engine is a row of ENGINES, and its
other ways to run are rows of CASES."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import figures, records
from faults import spoil
from helpers import (
    LLAMA,
    QWEN,
    await_text,
    begin_systems,
    build,
    close,
    equal_records,
    flags_of,
    train_data,
    weights,
)

import loss
from engines import base, store
from engines.store import PREFIX
from model import GPT
from planner.measure import sizes
from weights.checkpoint import Checkpoint

RAM = {"engine": "streaming", "stream_to": "ram", "activation_checkpointing": True}
DISK = RAM | {"stream_to": "disk"}
KEPT = {"activation_checkpointing": False}
TWO = {"engine": "sharded", "num_systems": 2}
ENGINES = {
    "resident": {"engine": "resident"},
    "streaming, RAM": RAM,
    "streaming, disk": DISK | KEPT,
    "streaming, a block stays": DISK | {"blocks_on_device": 1},
    "sharded": TWO,
}
# Keys of the way in which an engine runs a model; without them it is the resident engine's run
WAYS = {"engine", "stream_to", "activation_checkpointing", "activation_location", "compile"}
WAYS |= {"stream_batch_size", "blocks_on_device"}
WAYS |= {"num_systems", "shard_group_size", "reshard_after_forward"}
SLOW = {"learning_rate": 1e-3}  # where rounding grows at a higher rate
PASSES = {"micro_batch_size": 1, "stream_batch_size": 2}
EIGHT = SLOW | {"batch_size": 8}
SHARDED = TWO | EIGHT
COPIES = {"num_systems": 4, "shard_group_size": 2, "micro_batch_size": 1}
AGAIN = {"reshard_after_forward": True}
WHOLE = {"reshard_after_forward": False}
CASES = {
    "ram": RAM,
    "disk": DISK,
    "kept graphs": RAM | KEPT,
    "kept graphs, disk": DISK | KEPT,
    "micro-batches": DISK | {"micro_batch_size": 1},
    "uneven micro-batches": RAM | {"micro_batch_size": 3, "stream_batch_size": 6},
    "passes": DISK | {"micro_batch_size": 1, "stream_batch_size": 1},
    "passes of two": RAM | KEPT | PASSES,
    "dropout": RAM | {"dropout": 0.2, "micro_batch_size": 2},
    "dropout, kept, passes": DISK | KEPT | PASSES | {"dropout": 0.2, "micro_batch_size": 2},
    "activations in host memory": RAM | {"micro_batch_size": 1, "activation_location": "host"},
    "depth 1": DISK | {"depth": 1},
    "depth 1, kept, passes": RAM | KEPT | PASSES | {"depth": 1},
    "deeper, no biases": RAM | SLOW | {"depth": 5, "bias": False},
    "even vocabulary": RAM | {"vocab_size": 128},
    "blocks stay": RAM | SLOW | {"depth": 3, "blocks_on_device": 2},
    "blocks stay, kept": DISK | KEPT | SLOW | {"depth": 5, "blocks_on_device": 2},
    "blocks stay, dropout, passes": DISK
    | SLOW
    | {"depth": 3, "blocks_on_device": 1, "dropout": 0.2}
    | {"micro_batch_size": 2, "stream_batch_size": 2},
    "all blocks stay": RAM | PASSES | {"blocks_on_device": 2},
    "2 systems": SHARDED | AGAIN | {"micro_batch_size": 1, "activation_checkpointing": True},
    "3 systems, uneven": SHARDED | WHOLE | {"num_systems": 3, "micro_batch_size": 2},
    "4 systems, two copies, no biases": SHARDED | COPIES | AGAIN | {"bias": False},
    "4 systems, two copies, whole for a step": SHARDED | COPIES | WHOLE,
}
PARTS = {  # of models, each of which works alone too
    "rmsnorm": {"norm": "rmsnorm"},
    "rotary": {"positions": "rotary", "rope_scaling": 8.0},
    "swiglu": {"activation": "swiglu", "mlp_width": 40},
    "grouped heads": {"heads": 4, "kv_heads": 1},
    "untied": {"tied_head": False},
    "wide heads": {"head_width": 24, "heads": 3},
    "norms of heads": {"qk_norm": True},
    "biases of qkv": {"bias": "qkv"},
    "biases of attention": {"bias": "attention"},
    "biases of the mlp": {"bias": "mlp"},
    "all of llama": LLAMA,
    "all of qwen": QWEN,
}
for part, keys in PARTS.items():
    same = keys | {"micro_batch_size": 2, "dropout": 0.1}
    CASES[f"{part}, kept"] = RAM | KEPT | same
    CASES[f"{part}, passes"] = DISK | same | {"stream_batch_size": 2}
    CASES[f"{part}, 2 systems"] = SHARDED | keys
CASES["all of qwen, 3 systems"] = SHARDED | QWEN | {"num_systems": 3}
LONG = {name for name in CASES if "systems" in name} - {"2 systems", "all of llama, 2 systems"}
COMPILED = {"resident": ENGINES["resident"], "recomputed": RAM, "kept": RAM | KEPT}
for dropout in (0.0, 0.3):
    for name, way in COMPILED.items():
        keys = {"compile": True, "depth": 3, "dropout": dropout, "micro_batch_size": 2}
        CASES[f"compiled, {name}, dropout {dropout}"] = way | keys
LONG |= {name for name in CASES if "compiled" in name}


def some(names: object) -> list:
    return [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in names]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks a layer, as real models have."""
    monkeypatch.setattr(store, "CHUNK", {"ram": 2048, "disk": 2048})


@pytest.fixture
def config(config):
    """Ten steps, each of which is clipped."""
    config.values |= {"num_steps": 10, "eval_steps": 5, "checkpoint_steps": 10}
    config.values |= {"max_gradient_norm": 0.1, "precision": "fp32"}
    Path(config.path).write_text(yaml.safe_dump(config.values))
    return config


@pytest.fixture
def trained(run, config, forks, monkeypatch):
    """trained(keys, out) trains with these keys, of several systems in forks; it must work."""

    def trained(keys: dict, out: Path, spoiled: dict | None = None) -> SimpleNamespace:
        keys = keys | {"out_dir": out}
        staying = keys.pop("blocks_on_device", 0)
        words = [config.path, *flags_of(keys)]
        if keys.get("engine") == "sharded":
            seen = run_systems(forks, keys["num_systems"], words, spoiled)
        else:
            with monkeypatch.context() as patch:
                patch.setattr("planner.costs.fitting_blocks", lambda *arguments: staying)
                if "compile" in keys:  # the logits too in several chunks
                    patch.setattr(loss, "CHUNK", {"cpu": 16})
                patch.setattr(base, "learning_rate", base.learning_rate)
                patch.setattr(GPT, "__init__", GPT.__init__)
                spoil(spoiled or {})
                seen = run("train", *words)
            assert ("stay on the device, " in seen.out) == (staying > 0)
        assert seen.status == 0, seen.err
        assert not list(out.glob(f"{PREFIX}*"))
        return seen

    return trained


def run_systems(forks, systems: int, words: list, spoiled: dict | None = None) -> SimpleNamespace:
    """What the first system said; the others say nothing."""
    started = begin_systems(forks, [words] * systems, spoiled=spoiled)
    first, *others = [forks.end(process) for process in started]
    assert f"{systems} processes, " in first.out
    for other in others:
        assert (other.status, other.out, other.err) == (0, "", "")
    return first


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """Folders of the resident engine's runs, by what they trained."""
    return {}


@pytest.fixture
def resident(trained, made, tmp_path_factory):
    """resident(keys) returns the folder of the resident engine's run of the same model."""

    def resident(keys: dict) -> Path:
        keys = {key: value for key, value in keys.items() if key not in WAYS}
        if str(keys) not in made:
            made[str(keys)] = tmp_path_factory.mktemp("resident")
            trained(keys | ENGINES["resident"], made[str(keys)])
        return made[str(keys)]

    return resident


@pytest.mark.parametrize("case", some(CASES))
def test_equals_resident(trained, resident, tmp_path, case):
    """Losses, norms and evaluations to 1e-5, and weights as rounding explains."""
    keys = CASES[case]
    oracle = resident(keys)
    trained(keys, tmp_path / "out")
    equal_records(oracle, tmp_path / "out")
    steps = records(oracle)
    assert all(record["grad_norm"] > 0.1 for record in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    a, b = (Checkpoint(out / "checkpoint_10.mdl") for out in (tmp_path / "out", oracle))
    assert a.optimizer_steps == b.optimizer_steps == 10
    assert a.tensors.keys() == b.tensors.keys()
    for name, first in build(b.config).named_parameters():
        ours, theirs = (without_key_biases(b, name, c.read(name)) for c in (a, b))
        first = without_key_biases(b, name, first.detach())
        assert (ours - theirs).norm() <= 1e-3 * (theirs - first).norm(), name
    assert sizes(b.config).total == sum(p.numel() for p in GPT(b.config).parameters())


def without_key_biases(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Their true gradient is zero, and Adam turns rounding into steps."""
    if name.endswith("k_norm.bias"):
        return torch.ones(1)
    if not name.endswith("qkv.bias"):
        return tensor
    q, _, v = tensor.split(checkpoint.config.qkv_widths)
    return torch.cat([q, v])


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_follows_fp32(trained, resident, tmp_path, engine):
    """And the resident engine's more closely: only the order of sums differs."""
    keys = {"micro_batch_size": 2, "batch_size": 8} | (SLOW if engine == "sharded" else {})
    trained(ENGINES[engine] | keys | {"precision": "bf16"}, tmp_path)
    exact, rounded = (records(resident(keys | {"precision": p})) for p in ("fp32", "bf16"))
    assert rounded[-1]["loss"] != exact[-1]["loss"]
    for a, b, c in zip(exact, rounded, records(tmp_path), strict=True):
        assert close(c["loss"], a["loss"], 0.02)
        assert close(c["loss"], b["loss"], 5e-3)
        assert close(c["grad_norm"], b["grad_norm"], 5e-2)


GPTS = [(engine, {}) for engine in ENGINES]


@pytest.mark.parametrize(("engine", "model"), [*GPTS, ("resident", LLAMA)])
def test_resume_is_exact(trained, config, tmp_path, engine, model):
    """Bit for bit: weights, moments and figures, with dropout, across an epoch, in micro-batches.
    Evaluations in between change nothing."""
    keys = ENGINES[engine] | model | {"dropout": 0.2, "micro_batch_size": 24, "batch_size": 64}
    keys |= {"decay_steps": 30, "num_steps": 12, "eval_steps": 3, "checkpoint_path": "latest"}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    trained(keys | {"eval_steps": 12}, whole)
    seen = trained(keys | {"num_steps": 6}, halves)
    assert "starting from random weights" in seen.out
    seen = trained(keys, halves)
    assert f"resumed from {halves}/checkpoint_6.mdl at step 6" in seen.out
    a, b = (weights(out / "checkpoint_12.mdl") for out in (whole, halves))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    expected = {(r["step"], "loss" in r): r for r in figures(halves)}
    assert len(expected) == 12 + 4
    assert all(expected[r["step"], "loss" in r] == r for r in figures(whole))
    windows = train_data(config.values["dataset"], 27, 32, 64, 0).sources[0].windows
    assert 6 * 64 < windows < 12 * 64


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_finite_changes_nothing(trained, tmp_path, engine):
    """Not the first weights, which depend on the seed and the layer alone, nor later ones."""
    keys = ENGINES[engine] | {"checkpoint_path": "latest", "checkpoint_steps": 3, "decay_steps": 9}
    seen = trained(keys | {"num_steps": 1}, tmp_path, {1: ("gradient", float("nan"))})
    assert "not finite: update skipped" in seen.out
    first = Checkpoint(tmp_path / "checkpoint_1.mdl")
    assert first.optimizer_steps == 0
    drawn = dict(build(first.config).named_parameters())
    assert len(first.tensors) == 3 * len(drawn)
    for name, parameter in drawn.items():
        assert torch.equal(first.read(name), parameter), name
        assert not first.read(f"exp_avg.{name}").any()
        assert not first.read(f"exp_avg_sq.{name}").any()
    trained(keys | {"num_steps": 4}, tmp_path, {4: ("gradient", float("nan"))})
    before, after = (tmp_path / f"checkpoint_{step}.mdl" for step in (3, 4))
    assert Checkpoint(before).optimizer_steps == Checkpoint(after).optimizer_steps == 2
    a, b = weights(before), weights(after)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert [r["step"] for r in records(tmp_path) if r["grad_norm"] is None] == [1, 4]
    trained(keys | {"num_steps": 5}, tmp_path)
    assert Checkpoint(tmp_path / "checkpoint_5.mdl").optimizer_steps == 3


@pytest.mark.parametrize(("engine", "model"), [*GPTS[1:], ("streaming, disk", LLAMA)])
def test_a_checkpoint_crosses(trained, resident, tmp_path, engine, model):
    """Resident, this engine, resident: the numbers are those of one resident run."""
    keys = SLOW | model | {"batch_size": 8, "eval_steps": 3, "decay_steps": 8}
    one = resident(keys | {"num_steps": 9})
    for steps, way in enumerate((ENGINES["resident"], ENGINES[engine], ENGINES["resident"]), 1):
        more = {"num_steps": 3 * steps, "checkpoint_path": "latest"}
        seen = trained(keys | way | more, tmp_path / "crossed")
        assert steps == 1 or f"at step {3 * steps - 3}" in seen.out
    equal_records(one, tmp_path / "crossed")


@pytest.mark.parametrize("engine", ENGINES)
def test_other_commands_take_its_checkpoints(run, trained, config, tmp_path, engine):
    trained(ENGINES[engine] | {"dropout": 0.2, "checkpoint_steps": 5}, config.out)
    assert sorted(path.name for path in config.out.iterdir()) == [
        *("checkpoint_10.mdl", "checkpoint_5.mdl", "config.yaml"),
        *("lock", "loss.png", "metrics.jsonl", "tensorboard"),
    ]
    checkpoint = ["--checkpoint_path", config.out / "checkpoint_10.mdl"]
    expected = records(config.out, "val_loss")[-1]["val_loss"]
    tokens = json.loads(Path(config.values["dataset"], "meta.json").read_text())["tokens"]["val"]
    ways = [ENGINES["resident"], ENGINES[engine]] if engine != "sharded" else [{}]
    for way in ways:
        flags = flags_of({key: value for key, value in way.items() if key != "blocks_on_device"})
        seen = run("eval", config.path, *checkpoint, "--json", *flags)
        assert seen.status == 0, seen.err
        told = json.loads(seen.out)
        assert told["tokens"] == tokens - 1
        assert close(told["loss"], expected, 1e-6)
    seen = run("sample", *checkpoint, "--prompt", "ab", "--max_new_tokens", 5)
    assert seen.out.startswith("ab")
    assert run("export", *checkpoint, "--out", tmp_path / "exported").status == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("engine", ["resident", "streaming, disk", "sharded"])
def test_a_signal_saves_the_step_and_exits(trained, config, forks, engine, number):
    """Of several systems one has to hear of it."""
    keys = {"num_steps": 100000, "checkpoint_steps": 100000, "eval_steps": 100000}
    words = [config.path, *flags_of(ENGINES[engine] | keys)]
    started = begin_systems(forks, [words] * ENGINES[engine].get("num_systems", 1))
    await_text(started[0], "step 3/")
    assert bool(list(config.out.glob(f"{PREFIX}*"))) == ("disk" in engine)
    os.kill(started[-1].pid, number)
    seen, *_ = [forks.end(process) for process in started]
    assert seen.status == 0 and "Traceback" not in seen.err, seen.err
    (saved,) = config.out.glob("checkpoint_*.mdl")
    step = Checkpoint(saved).step
    assert f"stopped at step {step}; resume with --checkpoint_path latest" in seen.out
    assert records(config.out)[-1]["step"] == step
    assert not list(config.out.glob(f"{PREFIX}*"))
    trained(ENGINES[engine] | {"checkpoint_path": "latest", "num_steps": step + 2}, config.out)
