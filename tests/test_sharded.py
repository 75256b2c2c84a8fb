"""What several systems alone have, as processes on this machine: shards of a checkpoint, lost
systems, launchers. What they share with the other engines is in test_engines.py."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, cloned, figures, records, refused
from helpers import (
    ENVIRONMENT,
    begin,
    begin_systems,
    changed,
    close,
    command,
    end,
    equal_records,
    fork,
    free_port,
)

from common.console import UserError
from weights.checkpoint import Checkpoint

HEAD = "        self.seed_dropout(dropout_seed, 0)\n"
FAILS = "        if __import__('os').environ.get('RANK') == '1':\n            1 / 0\n"


@pytest.fixture
def config(config):
    """Eight sequences, odd everywhere, and clipping in every step."""
    config.values |= {"batch_size": 8, "max_gradient_norm": 0.1, "learning_rate": 1e-3}
    Path(config.path).write_text(yaml.safe_dump(config.values))
    return config


def on_two(forks, config, *flags: object) -> SimpleNamespace:
    """What the first of two systems said, in forks."""
    words = [config.path, "--num_systems", 2, *flags]
    first, _ = [forks.end(process) for process in begin_systems(forks, [words] * 2)]
    return first


@pytest.mark.long
def test_a_checkpoint_goes_to_any_number_of_systems(run, config, tmp_path):
    """resident, 2, 1, 4, 3, streaming, resident: the numbers are those of one resident run."""
    flags = [config.path, "--vocab_size", 50257, "--eval_batches", 1, "--decay_steps", 30]
    assert run("train", *flags, "--num_steps", 14, "--out_dir", tmp_path / "one").status == 0
    flags += ["--checkpoint_path", "latest"]
    done = 0
    for engine, systems in (
        *(("resident", 1), ("sharded", 2), ("sharded", 1), ("sharded", 4), ("sharded", 3)),
        *(("streaming", 1), ("resident", 1)),
    ):
        done += 2
        keys = ["--engine", engine, "--num_systems", systems, "--num_steps", done]
        seen = (
            command("train", *flags, *keys) if engine == "sharded" else run("train", *flags, *keys)
        )
        assert f"at step {done - 2}" in seen.out or done == 2, seen.err
    equal_records(tmp_path / "one", config.out, evaluations=False)
    four = Checkpoint(config.out / "checkpoint_8.mdl")
    assert four.tensors["embedding.tokens.weight"]["shape"] == [50257, 32]
    parts = [rows for _, rows in four.tensors["embedding.tokens.weight"]["parts"]]
    assert parts == [12565, 12565, 12565, 12562]


def test_every_file_of_a_checkpoint_is_needed(config, forks):
    """One that was changed is found by the system that verifies it."""
    assert on_two(forks, config, "--num_steps", 3).status == 0
    last = config.out / "checkpoint_3.mdl"
    names = sorted(path.name for path in last.iterdir())
    assert {"decoder.1.1-of-2.safetensors", "exp_avg.head.2-of-2.safetensors"} <= set(names)
    assert len(names) == 2 * 3 * 4 + 2  # systems, kinds, units; tokenizer and manifest
    for name in names:
        (last / name).rename(config.out / name)
        with pytest.raises(UserError, match=re.escape(name)):
            Checkpoint(last)
        (config.out / name).rename(last / name)
    Checkpoint(last).verify(0, 1)
    file = last / "exp_avg_sq.head.2-of-2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    words = [config.path, "--num_systems", 2, "--checkpoint_path", last]
    seen = [forks.end(process) for process in begin_systems(forks, [words] * 2)]
    (told,) = [one for one in seen if "(its checksum differs)" in one.err]
    refused(told, f"{file.name} was changed (its checksum differs)")


@pytest.mark.long
def test_eval_counts_every_token(config, run):
    """In windows that three systems do not divide."""
    assert run("train", config.path, "--num_steps", 3).status == 0
    flags = ["eval", config.path, "--checkpoint_path", "latest", "--json"]
    one = json.loads(run(*flags).out)
    told = json.loads(command(*flags, "--num_systems", 3).out)
    assert told["tokens"] == one["tokens"]
    assert close(told["loss"], one["loss"], 1e-6)


@pytest.mark.long
def test_a_bug_of_one_system_is_reported_once(config, tmp_path):
    clone = changed(tmp_path / "clone", {HEAD: FAILS + HEAD})
    seen = end(begin("train", config.path, "--num_systems", 2, root=clone))
    assert seen.status == 1
    assert seen.err.count("ZeroDivisionError") == 1
    assert seen.err.count("error: ") == seen.err.count("error: rank 1 failed") == 1


def workers(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def await_lines(process: subprocess.Popen, words: str, count: int, seen: list[str]) -> None:
    """Until so many more lines have these words, or the end."""
    while count and (line := process.stdout.readline()):
        seen.append(line)
        count -= words in line


def await_steps(process: subprocess.Popen, count: int, seen: list[str]) -> None:
    await_lines(process, " | loss ", count, seen)


@pytest.mark.parametrize(
    ("checkpoint_steps", "hint"),
    [
        (3, "; resume with --checkpoint_path latest"),
        pytest.param(10000, "", marks=pytest.mark.long),
    ],
)
def test_a_lost_system_ends_the_run(run, config, tmp_path, checkpoint_steps, hint):
    """Until then the systems, which the command starts, train as one and speak with one voice."""
    flags = ["--checkpoint_steps", checkpoint_steps, "--decay_steps", 10000, "--num_steps"]
    assert run("train", config.path, *flags, 5, "--out_dir", tmp_path / "one").status == 0
    process, seen = begin("train", config.path, *flags, 10000, "--num_systems", 2), []
    await_steps(process, 5, seen)
    began = time.monotonic()
    os.kill(workers(process)[1], signal.SIGKILL)
    ended = end(process)
    refused(ended, "rank 1 was killed by SIGKILL")
    assert ended.err.endswith(f"the system may have run out of memory{hint}\n")
    assert time.monotonic() - began < 60
    told = "".join(seen)
    assert "2 processes, " in told and told.count("step 3/10000 | loss") == 1
    for a, b in zip(records(tmp_path / "one"), records(config.out)[:5], strict=True):
        assert close(b["loss"], a["loss"], 1e-5)
        assert close(b["grad_norm"], a["grad_norm"], 1e-5)


@pytest.mark.parametrize("words", ["checkpoint_6", "val_loss"])
@pytest.mark.long
def test_a_run_that_was_lost_after_its_last_step_ends_well(run, config, words):
    """All is trained and saved; a restart, or a second start, evaluates if that is missing."""
    process = begin("train", config.path, "--num_systems", 2, "--max_restarts", 1)
    for line in process.stdout:
        if words in line:
            os.kill(workers(process)[0], signal.SIGKILL)
            break
    seen = end(process)
    assert (seen.status, seen.err.count("was killed by SIGKILL")) == (0, 1)
    assert [r["step"] for r in records(config.out, "val_loss")] == [6]
    if words == "val_loss":
        return
    (config.out / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(r)}\n" for r in records(config.out))
    )
    for _ in range(2):  # the second has nothing to do
        seen = run("train", config.path, "--checkpoint_path", "latest")
        assert [r["step"] for r in records(config.out, "val_loss")] == [6]
    refused(seen, "nothing is left to train")


@pytest.mark.long
def test_nohup_holds(config):
    """A hang-up that the caller has ignored is ignored in every process."""
    script = f"trap '' HUP; exec {sys.executable} train.py {config.path} --num_systems 2"
    process = subprocess.Popen(
        ["bash", "-c", script], cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE
    )
    await_steps(process, 1, [])
    for pid in (process.pid, *workers(process)):
        os.kill(pid, signal.SIGHUP)
    assert process.wait(timeout=60) == 0


@pytest.mark.long
def test_lost_systems_restart_the_run(run, config, tmp_path, request):
    """SIGKILL of a random worker at random moments, saving included: the numbers are those of a run
    that nothing disturbed."""
    kills, seed = request.config.getoption("kills"), time.time_ns()
    print(f"seed {seed}")
    source, steps = random.Random(seed), 20 * kills
    flags = [config.path, "--num_steps", steps, "--checkpoint_steps", 2, "--eval_steps", steps]
    flags += ["--keep_checkpoints", 2]
    command("train", *flags, "--num_systems", 2, "--out_dir", tmp_path / "undisturbed")
    process, seen = begin("train", *flags, "--num_systems", 2, "--max_restarts", kills), []
    for _ in range(kills):
        await_steps(process, source.randint(1, 12), seen)
        time.sleep(source.uniform(0, 0.1))
        os.kill(source.choice(workers(process)), signal.SIGKILL)
        # lines that are still in the pipe are not of the next start: two kills would be one loss
        await_lines(process, "restarting: ", 1, seen)
    rest = end(process)
    assert rest.status == 0, rest.err
    out = "".join(seen) + rest.out
    assert out.count("restarting: ") == kills
    assert rest.err.count("was killed by SIGKILL") == kills
    assert figures(config.out) == figures(tmp_path / "undisturbed")


def test_sigterm_saves_the_step_on_every_system(config):
    """The parent passes it on and waits as long as the step and the save take."""
    flags = ["--width", 256, "--depth", 4, "--batch_size", 64, "--num_steps", 100]
    process, seen = begin("train", config.path, *flags, "--num_systems", 2), []
    await_steps(process, 1, seen)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    rest = end(process)
    assert rest.status == 0 and "SIGTERM: will save and stop after this step" in rest.err
    step = int(re.search(r"stopped at step (\d+);", rest.out)[1])
    assert Checkpoint(config.out / f"checkpoint_{step}.mdl").step == step


# What a launcher that is there does: a process for each system, with the same environment


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--width", 64], "rank 1: width is 64 on"),
        (["--out_dir", "elsewhere"], "rank 1: out_dir is elsewhere on"),
    ],
)
def test_systems_that_disagree(config, forks, more, message):
    words = [config.path, "--num_systems", 2]
    first, second = [forks.end(p) for p in begin_systems(forks, [words, [*words, *more]])]
    refused(second, message)
    refused(first, "the connection to another process was lost")


@pytest.mark.long
def test_a_dataset_that_one_system_lacks(config, tmp_path):
    """In folders of their own, as nodes have: relative paths lead each to another place."""
    folders = [cloned(tmp_path / name) for name in ("a", "b")]
    shutil.copytree(config.values["dataset"], folders[0] / "data/words")

    def both(*more: object) -> list[SimpleNamespace]:
        shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        flags = ["--num_systems", 2, "--dataset", "data/words", *more]
        started = [
            begin("train", config.path, *flags, root=folder, RANK=rank, **shared)
            for rank, folder in enumerate(folders)
        ]
        return [end(process) for process in started]

    first, second = both()
    refused(second, "data/words/meta.json is missing: prepare the dataset")
    assert "error: rank 1: " in second.err
    refused(first, "the connection to another process was lost")
    shutil.copytree(config.values["dataset"], folders[1] / "data/words")
    for seen in both("--out_dir", "model_dir"):
        refused(seen, "out_dir: model_dir of rank 1 is not the folder that rank 0")


def test_a_port_in_use(config, forks):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0"}
        seen = fork(forks, config.path, "--num_systems", 2, **place)
    refused(seen, f"no connection to the other processes at 127.0.0.1:{port}")
    assert "in use" in seen.err


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--num_systems", 9], {}, "batch_size: 8 is smaller than num_systems 9"),
        (["--num_systems", 2, "--backend", "GPU"], {}, "num_systems: 2, and this machine has"),
        (["--num_systems", 2, "--engine", "resident"], {}, "engine: resident runs on one system"),
        (["--num_systems", 4, "--shard_group_size", 3], {}, "3 does not divide num_systems"),
        (["--max_restarts", -1], {}, "max_restarts: '-1' should be greater than or equal to 0"),
        (["--num_systems", 2], {"WORLD_SIZE": "3"}, "the launcher started 3 processes"),
        ([], {"WORLD_SIZE": "2"}, "num_systems: 1, but the launcher started 2"),
        (["--num_systems", 2], {"WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_refusals(config, forks, flags, environment, message):
    environment = environment and environment | {"RANK": "0"}
    refused(fork(forks, config.path, *flags, **environment), message)
    assert not config.out.exists()


# The plan


@pytest.mark.parametrize(("size", "systems"), [("13b", 4), ("70b", 24), ("175b", 80)])
def test_from_how_many_systems_a_model_fits(run, size, systems):
    """docs/scale-out.md has the arithmetic."""
    for count, fits in ((systems, True), (systems - (8 if systems > 8 else 1), False)):
        more = ["--device", "h100", "--host_memory", "4TB", "--num_systems", count, "--json"]
        flags = ["plan", ROOT / f"configs/{size}.yaml", *more, "--offload", "false"]
        told = json.loads(run(*flags).out)
        assert told["fits"] is fits
        assert told["engine"] == "sharded"
    more = ["--device", "h100", "--host_memory", "4TB", "--num_systems", systems]
    seen = run("plan", ROOT / f"configs/{size}.yaml", *more)
    assert f"without streaming or offloading: {systems}" in seen.out
