"""The streaming engine against the resident one, and what may happen to its store."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cloned, figures, records
from helpers import eval_data
from test_train import batches_of, close, engine_config, peak_memory, quiet, refused, start, train
from test_train import weights as saved_weights

from engines import open_engine, store
from engines.store import PREFIX
from weights.checkpoint import Checkpoint

STREAMED = {
    "engine": "streaming",
    "stream_to": "ram",
    "activation_checkpointing": True,
    "activation_location": "device",
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks a layer, as real models have."""
    monkeypatch.setattr(store, "CHUNK", {"ram": 2048, "disk": 2048})


def streaming_config(out: Path, **changes):
    keys = STREAMED | {"stream_batch_size": 4, "out_dir": str(out)} | changes
    return engine_config(**keys)


def state_of(engine) -> dict[str, torch.Tensor]:
    return {name: t.clone() for _, group in engine.state() for name, t in group.items()}


def without_key_biases(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Their true gradient is zero, and Adam turns rounding into steps."""
    if not name.endswith("qkv.bias"):
        return tensor.flatten()
    q, _, v = tensor.chunk(3)
    return torch.cat([q, v])


def equal_runs(expected, got, of_loss: float = 1e-5, of_norm: float = 1e-5) -> None:
    for a, b in zip(expected, got, strict=True):
        assert close(b.loss, a.loss, of_loss), a.step
        assert close(b.grad_norm, a.grad_norm, of_norm), a.step
        assert b.learning_rate == a.learning_rate


CASES = {
    "ram": {},
    "disk": {"stream_to": "disk"},
    "kept graphs": {"activation_checkpointing": False},
    "kept graphs, disk": {"activation_checkpointing": False, "stream_to": "disk"},
    "micro-batches": {"micro_batch_size": 1, "stream_to": "disk"},
    "uneven micro-batches": {"micro_batch_size": 3, "stream_batch_size": 6},
    "passes": {"micro_batch_size": 1, "stream_batch_size": 1, "stream_to": "disk"},
    "passes of two": {
        "micro_batch_size": 1,
        "stream_batch_size": 2,
        "activation_checkpointing": False,
    },
    "dropout": {"dropout": 0.2, "micro_batch_size": 2},
    "dropout, kept, passes": {
        **{"dropout": 0.2, "micro_batch_size": 2, "stream_batch_size": 2},
        **{"activation_checkpointing": False, "stream_to": "disk"},
    },
    "activations in host memory": {"micro_batch_size": 1, "activation_location": "host"},
    "depth 1": {"depth": 1, "stream_to": "disk"},
    "depth 1, kept, passes": {
        "depth": 1,
        "activation_checkpointing": False,
        "stream_batch_size": 2,
        "micro_batch_size": 1,
    },
    "deeper, no biases": {"depth": 5, "bias": False, "learning_rate": 1e-3},
    "even vocabulary": {"vocab_size": 128},
    "blocks that stay": {"depth": 3, "blocks_on_device": 2, "learning_rate": 1e-3},
    "blocks that stay, kept graphs, disk": {
        **{"depth": 5, "blocks_on_device": 2, "stream_to": "disk"},
        **{"activation_checkpointing": False, "learning_rate": 1e-3},
    },
    "blocks that stay, dropout, passes, disk": {
        **{"depth": 3, "blocks_on_device": 1, "stream_to": "disk", "dropout": 0.2},
        **{"micro_batch_size": 2, "stream_batch_size": 2, "learning_rate": 1e-3},
    },
    "all blocks stay": {"blocks_on_device": 2, "micro_batch_size": 1, "stream_batch_size": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_resident(dataset, tmp_path, case):
    """10 steps, clipping active in each: losses and norms to 1e-5, weights as rounding explains."""
    keys = dict(CASES[case])
    staying = keys.pop("blocks_on_device", 0)
    streamed = streaming_config(tmp_path, **keys)
    changes = {k: v for k, v in keys.items() if hasattr(engine_config(), k)}
    changes = {k: v for k, v in changes.items() if k not in (*STREAMED, "stream_batch_size")}
    resident = engine_config(**changes)
    expected, oracle = train(resident, dataset, 10)
    begun = open_engine(resident)
    begun.initialize()
    before = {name: p.detach().clone() for name, p in begun.weights.items()}
    got, engine = train(streamed, dataset, 10, staying)
    assert len(engine.staying) == staying
    equal_runs(expected, got)
    assert all(stats.grad_norm > resident.max_gradient_norm for stats in expected)
    assert engine.optimizer_steps == oracle.optimizer_steps == 10
    ours, theirs = state_of(engine), state_of(oracle)
    assert ours.keys() == theirs.keys()
    for name, first in before.items():
        a, b, origin = (without_key_biases(name, t) for t in (ours[name], theirs[name], first))
        assert (a - b).norm() <= 1e-3 * (b - origin).norm(), name
    engine.close()
    assert not list(tmp_path.iterdir())


def test_slow_writes(run, config, monkeypatch):
    """A gradient is added to what all earlier writes left, whichever thread waits for these: the
    weights of a model of one layer are fetched while its gradients are still being written."""
    write = store.DiskStore._write

    def slowly(self, chunk, kinds) -> None:
        time.sleep(0.02)
        write(self, chunk, kinds)

    flags = ["--depth", 1, "--micro_batch_size", 1, "--max_gradient_norm", 1e-3, "--num_steps", 3]
    assert run("train", config.path, *flags, "--engine", "resident").status == 0
    monkeypatch.setattr(store, "CHUNK", {"ram": 2**20, "disk": 2**20})  # a layer in one piece
    monkeypatch.setattr(store.DiskStore, "_write", slowly)
    flags += ["--engine", "streaming", "--stream_to", "disk", "--stream_batch_size", 1]
    out = config.out.with_name("streamed")
    assert run("train", config.path, *flags, "--out_dir", out).status == 0
    for a, b in zip(records(config.out), records(out), strict=True):
        assert close(b["loss"], a["loss"], 1e-5)
        assert close(b["grad_norm"], a["grad_norm"], 1e-5)


@pytest.mark.long
def test_two_hundred_runs_equal_resident(dataset, tmp_path, monkeypatch):
    """Of 1 to 3 layers, in several passes, from disk, with writes that take 0 to 5 ms."""
    write, source = store.DiskStore._write, random.Random(0)

    def slowly(self, chunk, kinds) -> None:
        time.sleep(source.uniform(0, 0.005))
        write(self, chunk, kinds)

    monkeypatch.setattr(store.DiskStore, "_write", slowly)
    expected = {depth: train(engine_config(depth=depth), dataset, 3)[0] for depth in (1, 2, 3)}
    for number in range(200):
        size = 2048 if number % 5 else 2**20
        monkeypatch.setattr(store, "CHUNK", {"ram": size, "disk": size})
        keys = {"depth": number % 3 + 1, "stream_batch_size": number % 2 + 1, "micro_batch_size": 1}
        keys |= {"stream_to": "disk", "activation_checkpointing": number % 4 < 2}
        got, engine = train(streaming_config(tmp_path, **keys), dataset, 3)
        equal_runs(expected[keys["depth"]], got)
        engine.close()


@pytest.mark.parametrize("activation_checkpointing", [True, False])
def test_bf16_follows_resident(dataset, tmp_path, activation_checkpointing):
    """The same matmul in the same precision: only the order of sums differs."""
    expected, _ = train(engine_config(precision="bf16", micro_batch_size=2), dataset, 10)
    keys = {
        "precision": "bf16",
        "micro_batch_size": 2,
        "activation_checkpointing": activation_checkpointing,
    }
    got, engine = train(streaming_config(tmp_path, **keys), dataset, 10)
    equal_runs(expected, got, of_loss=5e-3, of_norm=3e-2)
    engine.close()


def test_the_threads_beside_compute_are_one_each(tmp_path):
    """A team of OpenMP's for each would have those of the compute thread sleep at every barrier."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine = open_engine(streaming_config(tmp_path, stream_to="disk"))
        store = engine.stores["decoder.0"]
        pools = (engine.fetcher, engine.storer, store.readers, store.writers)
        found = [pool.submit(torch.get_num_threads).result() for pool in pools]
        engine.close()
        assert (found, torch.get_num_threads()) == ([1, 1, 1, 1], 3)
    finally:
        torch.set_num_threads(before)


def test_starts_equal(dataset, tmp_path):
    """Weights depend on (seed, layer) alone, bit for bit."""
    resident, streaming = (open_engine(c) for c in (engine_config(), streaming_config(tmp_path)))
    for engine in (resident, streaming):
        engine.initialize()
    ours, theirs = state_of(streaming), state_of(resident)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("stream_to", "staying"), [("ram", 0), ("disk", 0), ("disk", 2)])
def test_a_step_that_is_not_finite_changes_nothing(dataset, tmp_path, stream_to, staying):
    config = streaming_config(tmp_path, stream_to=stream_to)
    runs = []
    for keys in (config, engine_config()):
        engine = open_engine(keys, blocks_on_device=staying)
        engine.initialize()
        batches = batches_of(config, dataset)
        stats = list(engine.run(batches, 0, 3, quiet))
        target = engine.model.decoder[1].mlp.fc.weight
        spoiler = target.register_hook(lambda grad: grad * float("nan"))
        (bad,) = engine.run(batches, 3, 4, quiet)
        spoiler.remove()
        assert not bad.finite
        assert engine.optimizer_steps == 3
        stats += engine.run(batches, 4, 10, quiet)
        assert engine.optimizer_steps == 9
        runs.append(stats)
        engine.close()
    equal_runs(runs[1], runs[0])


def test_an_evaluation_reads_weights_once_whatever_the_batch_size(run, config, monkeypatch):
    run("train", config.path, "--num_steps", 3)
    read, reads, results = store.DiskStore._read, [], []

    def counted(self, chunk):
        reads.append(chunk)
        return read(self, chunk)

    monkeypatch.setattr(store.DiskStore, "_read", counted)
    for batch_size in (1, 4):
        flags = ["--engine", "streaming", "--stream_to", "disk", "--batch_size", batch_size]
        seen = run("eval", config.path, "--checkpoint_path", "latest", *flags)
        assert seen.status == 0, seen.err
        results.append((seen.out.split(" | ")[1], len(reads)))
        reads.clear()
    assert results[0] == results[1]


def test_evaluation_equals_resident_in_the_middle_of_a_run(dataset, tmp_path):
    """The pending update is in what is evaluated, and evaluating leaves the run as it was."""
    results = []
    for config in (
        engine_config(dropout=0.2, micro_batch_size=3),
        streaming_config(
            tmp_path, dropout=0.2, micro_batch_size=3, stream_batch_size=3, stream_to="disk"
        ),
    ):
        stats, engine = train(config, dataset, 4)
        data = eval_data(dataset, config.vocab_size, 32, 4)
        loss, count = engine.evaluate(data, 4)
        assert engine.evaluate(data, 4) == (loss, count)
        stats += engine.run(batches_of(config, dataset), 4, 8, quiet)
        results.append((stats, loss, count))
        engine.close()
    (expected, loss, count), (got, streamed_loss, streamed_count) = results
    assert streamed_count == count
    assert close(streamed_loss, loss, 1e-5)
    equal_runs(expected, got)


FLAGS = ("--engine", "streaming", "--stream_to", "disk", "--dropout", 0.2, "--decay_steps", 30)


@pytest.mark.parametrize(
    "more", [("--activation_checkpointing", "true"), ("--activation_checkpointing", "false")]
)
def test_resume_is_exact(run, config, tmp_path, more):
    """Bit for bit, as in the resident engine."""
    flags = [*FLAGS, *more, "--num_steps", 12, "--checkpoint_steps", 6, "--micro_batch_size", 2]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    seen = run("train", config.path, *flags, "--out_dir", whole)
    assert seen.status == 0, seen.err
    first = [*flags, "--out_dir", halves, "--checkpoint_path", "latest"]
    assert run("train", config.path, *first, "--num_steps", 6).status == 0
    seen = run("train", config.path, *first)
    assert "resumed from" in seen.out
    a, b = (saved_weights(out / "checkpoint_12.mdl") for out in (whole, halves))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records(whole)] == [r[key] for r in records(halves)]


@pytest.mark.parametrize("more", [(), ("--stream_batch_size", 2, "--dropout", 0.0)])
def test_blocks_that_stay_change_nothing(run, config, tmp_path, monkeypatch, more):
    """Bit for bit: steps, evaluations, texts and checkpoints, also where a resumed run has another
    number of them."""
    flags = [*FLAGS, "--micro_batch_size", 2, "--depth", 3, "--sample_prompts", "[ab, c]", *more]
    flags += ["--num_steps", 12, "--checkpoint_steps", 6, "--eval_steps", 3]
    flags += ["--checkpoint_path", "latest", "--out_dir"]
    streamed, stayed = tmp_path / "streamed", tmp_path / "stayed"
    seen = run("train", config.path, *flags, streamed)
    assert seen.status == 0 and "stay on the device" not in seen.out, seen.err
    for blocks, steps in ((1, 6), (3, 12)):
        monkeypatch.setattr("planner.costs.fitting_blocks", lambda *arguments, n=blocks: n)
        seen = run("train", config.path, *flags, stayed, "--num_steps", steps)
        assert seen.status == 0 and f"\n{blocks} of 3 blocks stay on the device, " in seen.out
    a, b = (saved_weights(out / "checkpoint_12.mdl") for out in (streamed, stayed))
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert figures(streamed) == figures(stayed)


@pytest.mark.parametrize("engines", [("resident", "streaming"), ("streaming", "resident")])
def test_a_checkpoint_crosses_engines(run, config, tmp_path, engines):
    """Losses and norms of a run that changes its engine midway are the resident engine's."""
    oracle, crossed = tmp_path / "oracle", tmp_path / "crossed"
    run("train", config.path, "--num_steps", 10, "--out_dir", oracle)
    for engine, steps in zip(engines, (5, 10), strict=True):
        flags = ["--engine", engine, "--stream_to", "disk", "--out_dir", crossed]
        flags += ["--num_steps", steps, "--decay_steps", 8, "--checkpoint_path", "latest"]
        seen = run("train", config.path, *flags)
        assert seen.status == 0, seen.err
    for a, b in zip(records(oracle), records(crossed), strict=True):
        assert close(b["loss"], a["loss"], 1e-5)
        assert close(b["grad_norm"], a["grad_norm"], 1e-5)


def test_other_commands_take_its_checkpoints(run, config, tmp_path):
    seen = run("train", config.path, *FLAGS)
    assert seen.status == 0, seen.err
    assert sorted(path.name for path in config.out.iterdir()) == [
        *("checkpoint_3.mdl", "checkpoint_6.mdl", "config.yaml"),
        *("lock", "loss.png", "metrics.jsonl", "tensorboard"),
    ]
    checkpoint = ["--checkpoint_path", config.out / "checkpoint_6.mdl"]
    losses = []
    for engine in ("resident", "streaming"):
        flags = [*checkpoint, "--json", "--engine", engine, "--stream_to", "disk"]
        seen = run("eval", config.path, *flags)
        assert seen.status == 0, seen.err
        losses.append(json.loads(seen.out)["loss"])
    assert close(*losses, 1e-6)
    assert close(records(config.out, "val_loss")[-1]["val_loss"], losses[0], 1e-6)
    seen = run("sample", *checkpoint, "--prompt", "ab", "--max_new_tokens", 5)
    assert seen.out.startswith("ab")
    assert run("export", *checkpoint, "--out", tmp_path / "exported").status == 0


def test_a_signal_saves_and_leaves_no_store(config):
    process = start(config.path, *FLAGS, "--num_steps", 100000, "--checkpoint_steps", 100000)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    assert len(list(config.out.glob(f"{PREFIX}*"))) == 1
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(list(config.out.glob("checkpoint_*.mdl"))) == 1
    assert not list(config.out.glob(f"{PREFIX}*"))


def test_a_killed_run_s_store_is_removed_by_the_next(run, config, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    flags = [*FLAGS, "--stream_dir", scratch, "--num_steps", 100000, "--checkpoint_steps", 2]
    process = start(config.path, *flags)
    for line in process.stdout:
        if line.startswith("saved"):
            break
    other = ["--out_dir", tmp_path / "other", "--num_steps", 2]
    assert run("train", config.path, *flags, *other).status == 0
    (living,) = scratch.iterdir()  # that of the run that is still going on
    process.kill()
    process.wait()
    assert (living / "decoder.0").is_file()
    latest = max(Checkpoint(p).step for p in config.out.glob("checkpoint_*.mdl"))
    more = ["--checkpoint_path", "latest", "--num_steps", latest + 2]
    assert run("train", config.path, *flags, *more).status == 0
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("size", [0, 5000])
def test_a_store_that_is_cut_while_training(run, config, size):
    """It stops with the file's name; nothing wrong is ever saved, and what was saved stands."""
    process = start(config.path, *FLAGS, "--num_steps", 100000, "--checkpoint_steps", 5)
    for line in process.stdout:
        if line.startswith("saved"):
            break
    (folder,) = config.out.glob(f"{PREFIX}*")
    os.truncate(folder / "decoder.1", size)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "decoder.1: its size has changed" in err
    assert not list(config.out.glob(f"{PREFIX}*"))
    latest = max(Checkpoint(p).step for p in config.out.glob("checkpoint_*.mdl"))
    flags = ["--checkpoint_path", "latest", "--num_steps", latest + 1]
    assert run("train", config.path, *flags).status == 0


def test_a_full_disk_is_found_before_the_start(config):
    """The store's files are made whole at once: a limit on a file's size stands for a full disk."""
    import resource

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    process = start(config.path, *FLAGS, preexec_fn=small_files)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert f"stream_dir {config.out}: " in err and "are needed" in err
    assert not list(config.out.glob(f"{PREFIX}*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_too_small(config, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("can't mount a tmpfs here")
    try:
        process = start(config.path, *FLAGS, "--stream_dir", small)
        _, err = process.communicate(timeout=60)
    finally:
        subprocess.run(["umount", small], check=True)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert "does not fit" in err and "of disk, there are" in err


def test_bad_folders(run, config, tmp_path):
    flags = [*FLAGS, "--stream_dir", tmp_path / "nowhere"]
    refused(run("train", config.path, *flags), "nowhere is not a folder; make it first")
    flags = [*FLAGS, "--stream_dir", config.path]
    refused(run("train", config.path, *flags), "is not a folder; make it first")
    refused(run("train", config.path, *FLAGS, "--stream_dir", "/proc"), "/proc can't be written to")


@pytest.mark.long
def test_what_does_not_fit_in_memory(config):
    flags = ["--width", 256, "--engine", "streaming", "--memory_limit", "1GB"]
    ram = [*flags, "--stream_to", "ram", "--depth", 64]
    _, err = start(config.path, *ram).communicate(timeout=60)
    assert len(err.splitlines()) == 1
    assert "of memory, there are 950.0 MB; use more memory" in err
    big = [*flags, "--batch_size", 8192, "--micro_batch_size", 8192]
    _, err = start(config.path, *big).communicate(timeout=60)
    assert len(err.splitlines()) == 1
    assert "micro_batch_size: 8192 sequences do not fit in memory, " in err
    assert 1 <= int(err.split("memory, ")[1].split(" do")[0]) < 8192


@pytest.mark.long
def test_peak_memory_does_not_grow_with_depth(config):
    flags = [
        "--engine",
        "streaming",
        "--stream_to",
        "disk",
        "--activation_checkpointing",
        "true",
        "--width",
        512,
    ]
    flags += ["--num_steps", 2, "--batch_size", 1, "--checkpoint_steps", 2, "--eval_batches", 1]
    peaks = []
    for depth in (8, 22):  # as many as fill the buffers, and 14 more, which hold 700 MB of state
        out = ["--depth", depth, "--out_dir", config.out / str(depth)]
        process = start(config.path, *flags, *out)
        peaks.append(peak_memory(process.communicate(timeout=120)[0]))
    assert peaks[1] <= 1.15 * peaks[0] + 0.1


MODEL = (
    (  # the square of a ReLU
        '            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_new" else '
        '"none")\n',
        "            x = F.relu(x).square()\n",
    ),
    (  # attention and MLP in parallel
        "        x = x + self.attn(self.ln_1(x))\n        return x + self.mlp(self.ln_2(x))\n",
        "        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))\n",
    ),
)


@pytest.mark.long
def test_a_changed_model_trains_in_every_engine(config, tmp_path):
    """model.py alone changes, as the README shows; no engine is touched."""
    clone = cloned(tmp_path / "clone")
    model, readme = (clone / "model.py").read_text(), (ROOT / "README.md").read_text()

    def trained(engine: str, name: str, stops: tuple[int, ...]) -> list[dict]:
        for steps in stops:
            flags = ["--engine", engine, "--stream_to", "disk", "--out_dir", str(tmp_path / name)]
            flags += ["--num_steps", str(steps), "--decay_steps", "8", "--bias", "false"]
            flags += ["--checkpoint_path", "latest"]
            done = subprocess.run(
                [sys.executable, "train.py", config.path, *flags], cwd=clone, text=True,
                capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        return records(tmp_path / name)

    unchanged = trained("resident", "unchanged", (8,))
    for before, after in MODEL:
        assert before in readme and after in readme
        assert model.count(before) == 1
        model = model.replace(before, after)
    (clone / "model.py").write_text(model)
    resident = trained("resident", "resident", (8,))
    streaming = trained("streaming", "streaming", (4, 8))  # checkpoint and resume included
    for a, b in zip(resident, streaming, strict=True):
        assert close(b["loss"], a["loss"], 1e-5)
        assert close(b["grad_norm"], a["grad_norm"], 1e-5)
    assert not close(unchanged[-1]["loss"], resident[-1]["loss"], 1e-4)
    assert resident[-1]["loss"] < resident[0]["loss"]
