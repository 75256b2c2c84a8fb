"""Several systems, as processes on this machine, against the resident engine on one."""

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
from conftest import ROOT, cloned, records
from test_streaming import MODEL
from test_train import close, refused

from common.console import UserError
from weights.checkpoint import Checkpoint

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}


@pytest.fixture
def config(config):
    """Eight sequences, odd everywhere, and clipping in every step."""
    config.values |= {"batch_size": 8, "max_gradient_norm": 0.1, "learning_rate": 1e-3}
    Path(config.path).write_text(yaml.safe_dump(config.values))
    return config


def begin(name: str, *arguments: object, root: Path = ROOT, **environment: object):
    """The command, in the background."""
    return subprocess.Popen(
        [sys.executable, f"{name}.py", *map(str, arguments)],
        cwd=root,
        env=ENVIRONMENT | {key: str(value) for key, value in environment.items()},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end(process: subprocess.Popen) -> SimpleNamespace:
    out, err = process.communicate(timeout=120)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def command(*arguments: object, **more) -> SimpleNamespace:
    """The command, and what it left; it must have worked."""
    seen = end(begin(*arguments, **more))
    assert seen.status == 0, seen.err
    return seen


def equal_records(expected: Path, got: Path, of: float = 1e-5) -> None:
    for key in ("loss", "grad_norm", "val_loss"):
        a, b = records(expected, key), records(got, key)
        assert [r["step"] for r in a] == [r["step"] for r in b] and a
        for x, y in zip(a, b, strict=True):
            assert close(y[key], x[key], of), (key, x["step"])


CUTS = {
    "2, shared again, recomputed": (
        *(
            2,
            [
                "--reshard_after_forward",
                "true",
                "--activation_checkpointing",
                "true",
                "--micro_batch_size",
                1,
            ],
        ),
    ),
    "3, uneven": (3, ["--micro_batch_size", 2, "--reshard_after_forward", "false"]),
    "4, two copies, no biases": (
        *(
            4,
            [
                "--shard_group_size",
                2,
                "--reshard_after_forward",
                "true",
                "--micro_batch_size",
                1,
                "--bias",
                "false",
            ],
        ),
    ),
    "4, two copies, whole for a step": (
        *(
            4,
            ["--shard_group_size", 2, "--reshard_after_forward", "false", "--micro_batch_size", 1],
        ),
    ),
}


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(cut, marks=pytest.mark.long if cut[0] != "2" or "again" in cut else ())
        for cut in CUTS
    ],
)
def test_equals_resident(run, config, tmp_path, cut):
    """20 steps, clipping active in each, and an evaluation: every number to 1e-5."""
    systems, flags = CUTS[cut]
    flags = [*flags, "--num_steps", 20, "--eval_steps", 10, "--checkpoint_steps", 20]
    same = ["--bias", "false"] if "--bias" in flags else []
    one = [*same, "--num_steps", 20, "--eval_steps", 10, "--checkpoint_steps", 20]
    assert run("train", config.path, *one, "--out_dir", tmp_path / "one").status == 0
    seen = command("train", config.path, *flags, "--num_systems", systems)
    assert f"{systems} processes, " in seen.out and not seen.err
    assert seen.out.count("step 20/20 | loss") == 1  # one voice
    equal_records(tmp_path / "one", config.out)
    assert all(r["grad_norm"] > 0.1 for r in records(config.out, "grad_norm"))


@pytest.mark.long
def test_bf16_follows_resident(run, config, tmp_path):
    flags = ["--precision", "bf16", "--micro_batch_size", 2, "--num_steps", 10]
    assert run("train", config.path, *flags, "--out_dir", tmp_path / "one").status == 0
    command("train", config.path, *flags, "--num_systems", 2, "--reshard_after_forward", "false")
    for a, b in zip(records(tmp_path / "one"), records(config.out), strict=True):
        assert close(b["loss"], a["loss"], 5e-3)
        assert close(b["grad_norm"], a["grad_norm"], 5e-2)


@pytest.mark.long
def test_a_checkpoint_crosses(run, config, tmp_path):
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
        seen = command("train", *flags, *keys) if systems > 1 else run("train", *flags, *keys)
        assert f"at step {done - 2}" in seen.out or done == 2, seen.err
    for a, b in zip(records(tmp_path / "one"), records(config.out), strict=True):
        assert close(b["loss"], a["loss"], 1e-5)
        assert close(b["grad_norm"], a["grad_norm"], 1e-5)
    four = Checkpoint(config.out / "checkpoint_8.mdl")
    assert four.tensors["embedding.tokens.weight"]["shape"] == [50257, 32]
    parts = [rows for _, rows in four.tensors["embedding.tokens.weight"]["parts"]]
    assert parts == [12565, 12565, 12565, 12562]


@pytest.fixture(scope="module")
def two(tmp_path_factory, dataset) -> SimpleNamespace:
    """A run on two systems: its configuration, its folder and its last checkpoint."""
    folder = tmp_path_factory.mktemp("two")
    values = {"width": 32, "depth": 2, "heads": 2, "vocab_size": 27, "batch_size": 3}
    values |= {"max_position_embeddings": 32, "sequence_length": 32, "num_steps": 6}
    values |= {"dataset": str(dataset), "out_dir": str(folder / "out"), "dropout": 0.1}
    values |= {"backend": "CPU", "checkpoint_steps": 3, "eval_steps": 6, "decay_steps": 9}
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(values))
    command("train", path, "--num_systems", 2)
    out = folder / "out"
    return SimpleNamespace(path=path, out=out, last=out / "checkpoint_6.mdl")


def test_resume_is_exact(two, tmp_path):
    """Bit for bit, with dropout, if as many go on."""
    flags = [two.path, "--num_systems", 2, "--out_dir", tmp_path / "halves"]
    command("train", *flags, "--num_steps", 3)
    seen = command("train", *flags, "--checkpoint_path", "latest")
    assert "at step 3" in seen.out
    for key in ("loss", "grad_norm"):
        a, b = (records(out, key) for out in (two.out, tmp_path / "halves"))
        assert [r[key] for r in a] == [r[key] for r in b]


def test_every_file_of_a_checkpoint_is_needed(two, tmp_path):
    copy = tmp_path / two.last.name
    shutil.copytree(two.last, copy)
    names = sorted(path.name for path in copy.iterdir())
    assert {"decoder.1.1-of-2.safetensors", "exp_avg.head.2-of-2.safetensors"} <= set(names)
    assert len(names) == 2 * 3 * 4 + 2  # systems, kinds, units; tokenizer and manifest
    for name in names:
        (copy / name).rename(tmp_path / name)
        with pytest.raises(UserError, match=re.escape(name)):
            Checkpoint(copy)
        (tmp_path / name).rename(copy / name)
    Checkpoint(copy).verify(0, 1)


@pytest.mark.long
def test_a_changed_file_is_found_by_the_system_that_verifies_it(two, tmp_path):
    copy = tmp_path / two.last.name
    shutil.copytree(two.last, copy)
    file = copy / "exp_avg_sq.head.2-of-2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    flags = ["--num_systems", 2, "--num_steps", 9, "--checkpoint_path", copy]
    seen = end(begin("train", two.path, *flags, "--out_dir", tmp_path / "out"))
    refused(seen, f"{file.name} was changed (its checksum differs)")


@pytest.mark.long
def test_eval_counts_every_token(two, run):
    """val.bin has 300 predictions, in windows that three systems do not divide."""
    flags = [two.path, "--checkpoint_path", two.last, "--json", "--batch_size", 4]
    one = json.loads(run("eval", *flags).out)
    told = json.loads(command("eval", *flags, "--num_systems", 3).out)
    assert told["tokens"] == one["tokens"]
    assert close(told["loss"], one["loss"], 1e-6)


def test_other_commands_take_its_checkpoints(two, run, tmp_path):
    assert run("sample", "--checkpoint_path", two.last, "--prompt", "ab").out.startswith("ab")
    seen = run("export", "--checkpoint_path", two.last, "--out", tmp_path / "exported")
    assert seen.status == 0, seen.err


@pytest.mark.long
def test_a_changed_model_trains_sharded(config, tmp_path):
    """model.py alone changes, as in the test of streaming."""
    clone = cloned(tmp_path / "clone")
    source = (clone / "model.py").read_text()
    for before, after in MODEL:
        assert before in source
        source = source.replace(before, after)
    (clone / "model.py").write_text(source)
    for systems in (1, 2):
        flags = ["--bias", "false", "--out_dir", tmp_path / str(systems), "--num_systems", systems]
        command("train", config.path, *flags, root=clone)
    equal_records(tmp_path / "1", tmp_path / "2")

    fails = "        if __import__('os').environ.get('RANK') == '1':\n            1 / 0\n"
    head = "        self.seed_dropout(dropout_seed, 0)\n"
    (clone / "model.py").write_text(source.replace(head, fails + head))
    flags = ["--bias", "false", "--num_systems", 2]
    seen = end(begin("train", config.path, *flags, root=clone))
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
def test_a_lost_system_ends_the_run(config, checkpoint_steps, hint):
    flags = ["--num_systems", 2, "--num_steps", 10000, "--checkpoint_steps", checkpoint_steps]
    process, seen = begin("train", config.path, *flags), []
    await_steps(process, 5, seen)
    began = time.monotonic()
    os.kill(workers(process)[1], signal.SIGKILL)
    ended = end(process)
    refused(ended, "rank 1 was killed by SIGKILL")
    assert ended.err.endswith(f"the system may have run out of memory{hint}\n")
    assert time.monotonic() - began < 60


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
    for key in ("loss", "grad_norm", "val_loss"):
        a, b = (records(folder, key) for folder in (tmp_path / "undisturbed", config.out))
        assert [r[key] for r in a] == [r[key] for r in b]


def test_sigterm_saves_the_step_on_every_system(config):
    """The parent passes it on and waits as long as the step and the save take."""
    flags = ["--width", 256, "--depth", 8, "--batch_size", 96, "--num_steps", 100]
    process, seen = begin("train", config.path, *flags, "--num_systems", 2), []
    await_steps(process, 1, seen)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    rest = end(process)
    assert rest.status == 0 and "SIGTERM: will save and stop after this step" in rest.err
    step = int(re.search(r"stopped at step (\d+);", rest.out)[1])
    assert Checkpoint(config.out / f"checkpoint_{step}.mdl").step == step


# What a launcher that is there does: a process for each system, with the same environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(config, each: list[list], **environment: object) -> list[SimpleNamespace]:
    """The command on as many systems as there are lists of further arguments."""
    shared = {"WORLD_SIZE": len(each), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        begin("train", config.path, *more, RANK=rank, LOCAL_RANK=rank, **shared | environment)
        for rank, more in enumerate(each)
    ]
    return [end(process) for process in processes]


@pytest.mark.long
def test_a_launcher_is_joined(run, config, tmp_path):
    assert run("train", config.path, "--out_dir", tmp_path / "one").status == 0
    first, second = launched(config, [["--num_systems", 2]] * 2)
    assert (first.status, second.status, second.out) == (0, 0, "")
    equal_records(tmp_path / "one", config.out)


DIFFERENT = {
    "configuration": (["--width", 64], "rank 1: width is 64 on"),
    "out_dir": (["--out_dir", "elsewhere"], "rank 1: out_dir is elsewhere on"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_systems_that_disagree(config, what):
    more, message = DIFFERENT[what]
    first, second = launched(config, [["--num_systems", 2], ["--num_systems", 2, *more]])
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
        return [
            end(process)
            for process in [
                begin("train", config.path, *flags, root=folder, RANK=rank, **shared)
                for rank, folder in enumerate(folders)
            ]
        ]

    first, second = both()
    refused(second, "data/words/meta.json is missing: prepare the dataset")
    assert "error: rank 1: " in second.err
    refused(first, "the connection to another process was lost")
    shutil.copytree(config.values["dataset"], folders[1] / "data/words")
    for seen in both("--out_dir", "model_dir"):
        refused(seen, "out_dir: model_dir of rank 1 is not the folder that rank 0")


def test_a_port_in_use(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = ["--num_systems", 2]
        shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        seen = end(begin("train", config.path, *flags, RANK=0, **shared))
    refused(seen, f"no connection to the other processes at 127.0.0.1:{port}")
    assert "in use" in seen.err


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--num_systems", 9], {}, "batch_size: 8 is smaller than num_systems 9"),
        (["--num_systems", 2, "--backend", "GPU"], {}, "num_systems: 2, and this machine has"),
        (["--num_systems", 2, "--engine", "resident"], {}, "engine: resident runs on one system"),
        (
            ["--num_systems", 4, "--shard_group_size", 3],
            {},
            "shard_group_size: 3 does not divide num_systems",
        ),
        (["--max_restarts", -1], {}, "max_restarts: '-1' should be greater than or equal to 0"),
        (["--num_systems", 2], {"RANK": 0, "WORLD_SIZE": 3}, "the launcher started 3 processes"),
        ([], {"RANK": 0, "WORLD_SIZE": 2}, "num_systems: 1, but the launcher started 2"),
        (["--num_systems", 2], {"RANK": 0, "WORLD_SIZE": 2}, "MASTER_ADDR"),
    ],
)
def test_refusals(config, flags, environment, message):
    refused(end(begin("train", config.path, *flags, **environment)), message)
    assert not config.out.exists()


# The plan


@pytest.mark.parametrize(("size", "systems"), [("13b", 4), ("70b", 24), ("175b", 80)])
def test_from_how_many_systems_a_model_fits(run, size, systems):
    """docs/scale-out.md has the arithmetic."""
    for count, fits in ((systems, True), (systems - (8 if systems > 8 else 1), False)):
        more = ["--device", "h100", "--host_memory", "4TB", "--num_systems", count, "--json"]
        told = json.loads(
            run("plan", ROOT / f"configs/{size}.yaml", *more, "--offload", "false").out
        )
        assert told["fits"] is fits
        assert told["engine"] == "sharded"
    more = ["--device", "h100", "--host_memory", "4TB", "--num_systems", systems]
    assert (
        f"without streaming or offloading: {systems}"
        in run("plan", ROOT / f"configs/{size}.yaml", *more).out
    )
