"""The engines on CUDA against the resident one on the CPU."""

import pytest
import torch
from conftest import records
from test_compile import CASES, compiled_equals_eager, graphs
from test_sharded import command
from test_train import batches_of, close, engine_config, quiet, train

import loss
from engines import buffers, store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def loss_in_chunks(monkeypatch):
    """As models of a real size have it."""
    monkeypatch.setattr(loss, "CHUNK", {"cpu": 16, "cuda": 16})


@pytest.mark.parametrize("keys", [{"compile": True}, {"precision": "tf32"}])
def test_faster_steps_follow_plain_ones(dataset, keys):
    tolerance = 0.02 if "precision" in keys else 1e-5
    plain, fast = (train(engine_config(backend="GPU", **k), dataset)[0] for k in ({}, keys))
    for a, b in zip(plain, fast, strict=True):
        assert close(b.loss, a.loss, tolerance)


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


def test_fp32_equals_the_cpu(dataset):
    cpu, gpu = (train(engine_config(backend=b), dataset)[0] for b in ("CPU", "GPU"))
    for a, b in zip(cpu, gpu, strict=True):
        assert close(b.loss, a.loss, 1e-5)
        assert close(b.grad_norm, a.grad_norm, 1e-4)


STREAMED = [
    {"stream_to": "ram", "activation_checkpointing": True},
    {"stream_to": "disk", "activation_checkpointing": True, "micro_batch_size": 1},
    {"stream_to": "ram", "activation_checkpointing": False, "dropout": 0.0},
    {
        "stream_to": "ram",
        "activation_checkpointing": True,
        "micro_batch_size": 1,
        "activation_location": "host",
    },
    {
        "stream_to": "disk",
        "activation_checkpointing": True,
        "micro_batch_size": 1,
        "stream_batch_size": 2,
    },
    {
        "stream_to": "ram",
        "activation_checkpointing": False,
        "micro_batch_size": 1,
        "stream_batch_size": 2,
        "blocks_on_device": 2,
    },
]


@pytest.mark.parametrize("keys", [{}, STREAMED[0]])
def test_the_logits_of_texts_equal_the_cpu_s(dataset, tmp_path, keys):
    texts = [torch.arange(5), torch.arange(9)]
    streamed = {"engine": "streaming", "activation_location": "device", "stream_batch_size": 4}
    more = {"out_dir": str(tmp_path)} | (streamed if keys else {}) | keys
    sides = ({"backend": "CPU"}, {"backend": "GPU", **more})
    cpu, gpu = (train(engine_config(**side), dataset, 1)[1].next_logits(texts) for side in sides)
    torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", STREAMED)
def test_streaming_equals_resident(dataset, tmp_path, monkeypatch, keys):
    """Many small chunks, so that copies in both directions and updates overlap."""
    monkeypatch.setattr(store, "CHUNK", {"ram": 1024, "disk": 1024})
    keys = {
        "activation_location": "device",
        "stream_batch_size": 4,
        "depth": 6,
        "learning_rate": 1e-3,
    } | keys
    staying = keys.pop("blocks_on_device", 0)
    config = engine_config(backend="GPU", engine="streaming", out_dir=str(tmp_path), **keys)
    same = {key: keys[key] for key in ("depth", "learning_rate")}
    same["micro_batch_size"] = config.micro_batch_size
    expected, _ = train(engine_config(backend="GPU", **same), dataset)
    got, engine = train(config, dataset, blocks_on_device=staying)
    for a, b in zip(expected, got, strict=True):
        assert close(b.loss, a.loss, 1e-5)
        assert close(b.grad_norm, a.grad_norm, 1e-4)
    engine.close()


@pytest.mark.parametrize("case", CASES)
def test_graphs(dataset, tmp_path, case):
    found = graphs(dataset, tmp_path, "GPU", CASES[case])
    assert len(set(found.values())) == 1 and min(found.values()) > 0, found


@pytest.mark.parametrize("keys", STREAMED)
def test_compiled_streaming_follows_resident_in_bf16(dataset, tmp_path, monkeypatch, keys):
    """At a rate at which rounding does not grow: at 1e-2 losses of equal steps differed by 5%."""
    monkeypatch.setattr(store, "CHUNK", {"ram": 1024, "disk": 1024})
    same = {"backend": "GPU", "precision": "bf16", "compile": True, "depth": 6}
    same |= {"learning_rate": 1e-3, "micro_batch_size": keys.get("micro_batch_size", 4)}
    expected, _ = train(engine_config(**same), dataset)
    more = {"activation_location": "device", "stream_batch_size": 4, "out_dir": str(tmp_path)}
    more |= same | keys
    staying = more.pop("blocks_on_device", 0)
    config = engine_config(engine="streaming", **more)
    got, engine = train(config, dataset, blocks_on_device=staying)
    engine.close()
    for a, b in zip(expected, got, strict=True):
        assert close(b.loss, a.loss, 1e-3)


def test_compiled_dropout_equals_eager_dropout(dataset, tmp_path):
    """A block that is computed again draws the masks of its forward pass."""
    compiled_equals_eager(dataset, tmp_path, "GPU", dropout=0.3, tolerance=1e-4)


def test_a_pin_that_fails_leaves_no_error_to_the_next_kernel():
    """Memory that is pinned already is refused."""
    array = buffers.Array(2**20, pinned=True)
    assert array.pinned and not buffers.pin(array.tensor)
    assert torch.ones(8, device="cuda").sum().item() == 8
    array.unpin()


def test_a_run_crosses_from_resident_to_streaming(run, config):
    flags = ["--backend", "GPU", "--precision", "fp32", "--checkpoint_path", "latest"]
    for engine, steps in (("resident", 3), ("streaming", 6), ("resident", 8)):
        seen = run("train", config.path, *flags, "--engine", engine, "--num_steps", steps)
        assert seen.status == 0, seen.err
    assert [r["step"] for r in records(config.out)] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("more", [[], ["--offload", "true"], ["--micro_batch_size", 1]])
def test_sharded_equals_resident(run, config, tmp_path, more):
    """One system; its process group would outlive the test in this process."""
    flags = ["--backend", "GPU", "--precision", "fp32", "--out_dir"]
    seen = run("train", config.path, *flags, tmp_path / "resident", "--engine", "resident")
    assert seen.status == 0, seen.err
    for reshard_after_forward in ("true", "false"):
        sharded = [
            *flags,
            tmp_path / reshard_after_forward,
            *more,
            "--engine",
            "sharded",
            "--reshard_after_forward",
            reshard_after_forward,
        ]
        command("train", config.path, *sharded)
        for a, b in zip(
            records(tmp_path / "resident"), records(tmp_path / reshard_after_forward), strict=True
        ):
            assert close(b["loss"], a["loss"], 1e-5)
            assert close(b["grad_norm"], a["grad_norm"], 1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("more", [[], ["--offload", "true", "--reshard_after_forward", "true"]])
def test_two_gpus_equal_one(run, config, tmp_path, more):
    flags = ["--backend", "GPU", "--precision", "fp32"]
    assert run("train", config.path, *flags, "--out_dir", tmp_path / "one").status == 0
    command("train", config.path, *flags, "--num_systems", 2, *more)
    for a, b in zip(records(tmp_path / "one"), records(config.out), strict=True):
        assert close(b["loss"], a["loss"], 1e-5)
        assert close(b["grad_norm"], a["grad_norm"], 1e-4)


def test_bf16_follows_fp32(dataset):
    exact, rounded = (
        train(engine_config(backend="GPU", precision=p), dataset)[0] for p in ("fp32", "bf16")
    )
    for a, b in zip(exact, rounded, strict=True):
        assert close(b.loss, a.loss, 0.02)


def test_a_run_crosses_from_gpu_to_cpu(run, config):
    flags = ["--backend", "GPU", "--num_steps", 3, "--precision", "fp32"]
    seen = run("train", config.path, *flags)
    assert seen.status == 0, seen.err
    flags = ["--backend", "CPU", "--checkpoint_path", "latest", "--num_steps", 6]
    assert run("train", config.path, *flags).status == 0
    assert [r["step"] for r in records(config.out)] == [1, 2, 3, 4, 5, 6]


def test_sampling_on_the_gpu(run, config):
    run("train", config.path, "--backend", "GPU", "--num_steps", 3)
    flags = ["--checkpoint_path", config.out / "checkpoint_3.mdl", "--prompt", "ab"]
    assert run("sample", *flags, "--max_new_tokens", 50).out.startswith("ab")
