"""The engines on CUDA against the resident one, which on the GPU equals the one on the CPU."""

import math

import pytest
import torch
from conftest import records
from helpers import (
    COMPILED,
    GPU_CASES,
    STREAMED,
    batches_of,
    command,
    engine_config,
    equal_records,
    equal_runs,
    graphs,
    quiet,
    train,
)

import loss
from engines import buffers, store
from runtime.samples import next_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = {"backend": "GPU"}
DROPOUT = GPU | {"depth": 3, "dropout": 0.3, "micro_batch_size": 2}
DEEP = GPU | {"depth": 6, "learning_rate": 1e-3}  # at 1e-2 rounding grows
HALF = DEEP | {"precision": "bf16", "compile": True}
KEPT = {"activation_checkpointing": False}
# name -> (keys of the run that is followed, keys of its follower, steps, what may differ of losses
# and of norms)
CASES = {
    "fp32": ({"backend": "CPU"}, GPU, 20, 1e-5, 1e-4),
    "compiled": (GPU, GPU | {"compile": True}, 20, 1e-5, math.inf),
    "tf32": (GPU, GPU | {"precision": "tf32"}, 20, 0.02, math.inf),
    "bf16": (GPU, GPU | {"precision": "bf16"}, 20, 0.02, math.inf),
}
for name, way in {"resident": {}, "recomputed": STREAMED, "kept": STREAMED | KEPT}.items():
    # a block that is computed again draws the masks of its forward pass
    CASES[f"dropout, {name}"] = (DROPOUT, DROPOUT | {"compile": True} | way, 4, 1e-4, 1e-4)
for number, way in enumerate(GPU_CASES):
    same = {"micro_batch_size": way.get("micro_batch_size", 4)}
    for name, base, tolerances in (
        ("fp32", DEEP, (1e-5, 1e-4)),
        ("bf16, compiled", HALF, (1e-3, math.inf)),
    ):
        follower = base | STREAMED | way
        CASES[f"streaming {number}, {name}"] = (base | same, follower, 20, *tolerances)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of layers, so that copies in both directions and updates overlap, and of logits."""
    monkeypatch.setattr(store, "CHUNK", {"ram": 1024, "disk": 1024})
    monkeypatch.setattr(loss, "CHUNK", {"cpu": 16, "cuda": 16})


@pytest.mark.parametrize("case", CASES)
def test_follows_resident(dataset, tmp_path, case):
    first, keys, steps, of_loss, of_norm = CASES[case]
    expected, _ = train(engine_config(**first), dataset, steps)
    keys = keys | {"out_dir": str(tmp_path)}
    staying = keys.pop("blocks_on_device", 0)
    got, engine = train(engine_config(**keys), dataset, steps, staying)
    engine.close()
    equal_runs(expected, got, of_loss, of_norm)


def test_a_step_that_is_not_finite_changes_nothing(dataset):
    """What decides is on the device."""
    engine = train(engine_config(backend="GPU"), dataset, 3)[1]
    before = [p.detach().clone() for p in engine.weights.values()]
    target = engine.model.decoder[1].mlp.fc.weight
    spoiler = target.register_hook(lambda gradient: gradient * torch.inf)
    (bad,) = engine.run(batches_of(engine.config, dataset), 3, 4, quiet)
    spoiler.remove()
    assert not bad.finite and engine.optimizer_steps == 3
    for a, b in zip(before, engine.weights.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keys", [{}, STREAMED])
def test_the_logits_of_texts_equal_the_cpu_s(dataset, tmp_path, keys):
    texts = [torch.arange(5), torch.arange(9)]
    sides = ({"backend": "CPU"}, GPU | keys | {"out_dir": str(tmp_path)})
    engines = [train(engine_config(**side), dataset, 1)[1] for side in sides]
    cpu, gpu = (next_logits(engine, texts) for engine in engines)
    torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", COMPILED)
def test_graphs(dataset, tmp_path, case):
    found = graphs(dataset, tmp_path, "GPU", COMPILED[case])
    assert len(set(found.values())) == 1 and min(found.values()) > 0, found


def test_a_pin_that_fails_leaves_no_error_to_the_next_kernel():
    """Memory that is pinned already is refused."""
    array = buffers.Array(2**20, pinned=True)
    assert array.pinned and not buffers.pin(array.tensor)
    assert torch.ones(8, device="cuda").sum().item() == 8
    array.unpin()


TWO = ["--num_systems", 2]
TWO_AGAIN = [*TWO, "--offload", "true", "--reshard_after_forward", "true"]
NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SHARDED = [pytest.param(more, marks=NEEDS_TWO) for more in (TWO, TWO_AGAIN)]
for more in ([], ["--offload", "true"], ["--micro_batch_size", 1]):
    SHARDED += [[*more, "--reshard_after_forward", flag] for flag in ("true", "false")]


@pytest.mark.parametrize("more", SHARDED)
def test_sharded_equals_resident(run, config, tmp_path, more):
    """In a process of its own, as a process group would outlive the test in this one."""
    flags = ["train", config.path, "--backend", "GPU", "--precision", "fp32"]
    seen = run(*flags, "--out_dir", tmp_path / "resident", "--engine", "resident")
    assert seen.status == 0, seen.err
    command(*flags, "--engine", "sharded", *more)
    equal_records(tmp_path / "resident", config.out, of_norm=1e-4)


def test_a_run_crosses_engines_and_backends(run, config):
    flags = ["--precision", "fp32", "--checkpoint_path", "latest"]
    for steps, backend, engine in (
        (3, "GPU", "resident"),
        (6, "GPU", "streaming"),
        (8, "GPU", "resident"),
        (10, "CPU", "resident"),
    ):
        keys = ["--backend", backend, "--engine", engine, "--num_steps", steps]
        seen = run("train", config.path, *flags, *keys)
        assert seen.status == 0, seen.err
    assert [r["step"] for r in records(config.out)] == [*range(1, 11)]


def test_sampling_on_the_gpu(run, config):
    run("train", config.path, "--backend", "GPU", "--num_steps", 3)
    flags = ["--checkpoint_path", config.out / "checkpoint_3.mdl", "--prompt", "ab"]
    assert run("sample", *flags, "--max_new_tokens", 50).out.startswith("ab")
