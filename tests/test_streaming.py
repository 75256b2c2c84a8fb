"""What the streaming engine alone has: a store, in RAM or on disk, threads, and blocks that stay.
What it shares with the others is in test_engines.py."""

import os
import subprocess
import time

import pytest
import torch
from conftest import figures, refused
from faults import Fault
from helpers import (
    await_text,
    begin_fork,
    equal_records,
    fork,
    streaming_config,
    weights,
)

from engines import open_engine, store
from engines.store import PREFIX
from weights.checkpoint import find_checkpoints

FLAGS = ("--engine", "streaming", "--stream_to", "disk", "--dropout", 0.2, "--decay_steps", 30)
ENDLESS = ("--num_steps", 100000, "--checkpoint_steps", 2, "--keep_checkpoints", 3)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks a layer, as real models have."""
    monkeypatch.setattr(store, "CHUNK", {"ram": 2048, "disk": 2048})


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
    equal_records(config.out, out)


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


@pytest.mark.parametrize(
    "more", [("--sample_prompts", "[ab, c]"), ("--stream_batch_size", 2, "--dropout", 0.0)]
)
def test_blocks_that_stay_change_nothing(run, config, tmp_path, monkeypatch, more):
    """Bit for bit: steps, evaluations, texts and checkpoints, also where a resumed run has another
    number of them."""
    flags = [*FLAGS, "--micro_batch_size", 2, "--depth", 3, *more, "--num_steps", 8]
    flags += ["--checkpoint_steps", 4, "--eval_steps", 4, "--checkpoint_path", "latest"]
    streamed, stayed = tmp_path / "streamed", tmp_path / "stayed"
    seen = run("train", config.path, *flags, "--out_dir", streamed)
    assert seen.status == 0 and "stay on the device" not in seen.out, seen.err
    for blocks, steps in ((1, 4), (3, 8)):
        monkeypatch.setattr("planner.costs.fitting_blocks", lambda *arguments, n=blocks: n)
        seen = run("train", config.path, *flags, "--out_dir", stayed, "--num_steps", steps)
        assert seen.status == 0 and f"\n{blocks} of 3 blocks stay on the device, " in seen.out
    a, b = (weights(out / "checkpoint_8.mdl") for out in (streamed, stayed))
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert figures(streamed) == figures(stayed)


def test_a_killed_run_s_store_is_removed_by_the_next(run, config, tmp_path, forks):
    """That of a run that is still going on is left alone."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    flags = [config.path, *FLAGS, *ENDLESS, "--stream_dir", scratch]
    process = begin_fork(forks, *flags)
    await_text(process, "saved")
    other = ["--out_dir", tmp_path / "other", "--num_steps", 2]
    assert run("train", *flags, *other).status == 0
    (living,) = scratch.iterdir()
    process.kill()
    forks.end(process)
    assert (living / "decoder.0").is_file()
    latest = max(find_checkpoints(config.out))
    more = ["--checkpoint_path", "latest", "--num_steps", latest + 2]
    assert run("train", *flags, *more).status == 0
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("size", [0, 5000])
def test_a_store_that_is_cut_while_training(run, config, forks, size):
    """It stops with the file's name; nothing wrong is ever saved, and what was saved stands."""
    process = begin_fork(forks, config.path, *FLAGS, *ENDLESS)
    await_text(process, "saved")
    (folder,) = config.out.glob(f"{PREFIX}*")
    os.truncate(folder / "decoder.1", size)
    refused(forks.end(process), "decoder.1: its size has changed")
    assert not list(config.out.glob(f"{PREFIX}*"))
    latest = max(find_checkpoints(config.out))
    flags = ["--checkpoint_path", "latest", "--num_steps", latest + 1]
    assert run("train", config.path, *flags).status == 0


def test_a_full_disk_is_found_before_the_start(config, forks):
    """The store's files are made whole at once: a limit on a file's size stands for a full disk."""
    seen = fork(forks, config.path, *FLAGS, fault=Fault(file_limit=50_000))
    refused(seen, f"stream_dir {config.out}: ")
    assert "are needed" in seen.err
    assert not list(config.out.glob(f"{PREFIX}*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_too_small(run, config, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("can't mount a tmpfs here")
    try:
        seen = run("train", config.path, *FLAGS, "--stream_dir", small)
    finally:
        subprocess.run(["umount", small], check=True)
    refused(seen, "of disk, there are")
    assert "does not fit" in seen.err and len(seen.err.splitlines()) == 1


def test_bad_folders(run, config, tmp_path):
    flags = [*FLAGS, "--stream_dir", tmp_path / "nowhere"]
    refused(run("train", config.path, *flags), "nowhere is not a folder; make it first")
    flags = [*FLAGS, "--stream_dir", config.path]
    refused(run("train", config.path, *flags), "is not a folder; make it first")
    refused(run("train", config.path, *FLAGS, "--stream_dir", "/proc"), "/proc can't be written to")


def test_what_does_not_fit_in_memory(run, config):
    flags = ["train", config.path, "--engine", "streaming", "--memory_limit", "4GB"]
    seen = run(*flags, "--stream_to", "ram", "--width", 1024, "--depth", 24)
    refused(seen, "of memory, there are 3.80 GB; use more memory")
    seen = run(*flags, "--width", 256, "--batch_size", 8192, "--micro_batch_size", 8192)
    refused(seen, "micro_batch_size: 8192 sequences do not fit in memory, ")
    assert 1 <= int(seen.err.split("memory, ")[1].split(" do")[0]) < 8192
