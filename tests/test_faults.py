"""What goes wrong in long runs, done to short ones: after each fault all checkpoints are whole, and
`--checkpoint_path latest` goes on to exactly the numbers of a run that nothing disturbed.

A part of it by default; all of it, and the table of docs/reliability.md: make test-faults.
"""

import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, VOCABULARY, figures, records, text, write_dataset
from faults import Fault, Forks

from common.files import read_sealed
from engines.store import PREFIX
from weights.checkpoint import Checkpoint, find_checkpoints

ENGINES = {
    "resident": ["--engine", "resident"],
    "streaming, RAM": ["--engine", "streaming", "--stream_to", "ram"],
    "streaming, disk": ["--engine", "streaming", "--stream_to", "disk"],
    "sharded": ["--num_systems", 2],
}
LONG = pytest.param("sharded", marks=pytest.mark.long)  # seconds for each of its runs
ALONE = [engine for engine in ENGINES if engine != "sharded"]
LATEST = ["--checkpoint_path", "latest"]
SAME = "all whole, all resumed with equal losses"


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Forks:
    return Forks(tmp_path_factory.mktemp("forks"), ROOT)


@pytest.fixture(scope="module")
def source(request) -> random.Random:
    seed = request.config.getoption("--seed")
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def some(request, source) -> Callable:
    """some(engine, what there is): as many of it as were asked for, at random, in order; of the
    sharded engine fewer, as each of its runs takes seconds."""

    def some(engine: str, there: Iterable) -> list:
        there, count = list(there), request.config.getoption("--faults")
        count = -(-count // 4) if engine == "sharded" else count
        return there if count == 0 or count >= len(there) else sorted(source.sample(there, count))

    return some


class Runs:
    """Runs of an engine in folders of their own: `go` from a checkpoint of step 2 to step 4."""

    def __init__(self, forks: Forks, folder: Path, engine: str):
        self.forks, self.folder, self.engine = forks, folder, engine
        self.systems = 2 if engine == "sharded" else 1
        write_dataset(folder / "words", text(1, 4000), text(1, 301))
        values = {
            **{"width": 32, "depth": 2, "heads": 2, "vocab_size": VOCABULARY, "dropout": 0.1},
            **{"max_position_embeddings": 32, "sequence_length": 32, "batch_size": 4},
            **{"dataset": str(folder / "words"), "backend": "CPU", "learning_rate": 1e-2},
            **{"warmup_steps": 2, "decay_steps": 50, "num_steps": 4, "checkpoint_steps": 2},
            **{
                "eval_steps": 4,
                "log_steps": 1,
                "keep_checkpoints": 1,
                "out_dir": str(folder / "before"),
            },
        }
        self.config = folder / "small.yaml"
        self.config.write_text(yaml.safe_dump(values))
        self.before = folder / "before"
        self.worked(self.train(self.before, "--num_steps", 2))
        self.expected = self.undisturbed()

    def undisturbed(self) -> list[dict]:
        out = self.copy()
        self.worked(self.train(out, *LATEST))
        return figures(out)

    def copy(self) -> Path:
        """A folder in which the checkpoint of step 2 is the only one."""
        out = self.folder / f"out_{next(self.forks.numbers)}"
        shutil.copytree(self.before, out)
        return out

    def begin(self, out: Path, *flags: object, fault: Fault | None = None, struck: int = 0) -> list:
        """The processes of a run; the fault is of the system `struck`."""
        arguments = ["train", self.config, "--out_dir", out, *ENGINES[self.engine], *flags]
        if self.systems == 1:
            return [self.forks.start(*arguments, fault=fault)]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        shared |= {"GLOO_SOCKET_IFNAME": "lo"}
        return [
            self.forks.start(
                *arguments,
                fault=fault if rank == struck else None,
                **shared,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
            )
            for rank in range(self.systems)
        ]

    def train(self, out: Path, *flags: object, **keys: object) -> SimpleNamespace:
        """What the systems said, and the points of the one that was struck."""
        seen = [self.forks.end(process) for process in self.begin(out, *flags, **keys)]
        first = seen[0]
        first.err = "".join(one.err for one in seen)
        first.points = seen[keys.get("struck", 0)].points
        first.statuses = [one.status for one in seen]
        return first

    def worked(self, seen: SimpleNamespace) -> SimpleNamespace:
        assert seen.status == 0, seen.err
        return seen

    def check(self, out: Path) -> None:
        """Nothing is lost: what is there is whole, and goes on to the numbers of `expected`."""
        found = find_checkpoints(out)
        assert found and max(found) in (2, 4), sorted(path.name for path in out.iterdir())
        for path in found.values():
            Checkpoint(path).verify(0, 1)
        seen = self.train(out, *LATEST)
        assert seen.status == 0 or "nothing is left to train" in seen.err, seen.err
        assert figures(out) == self.expected
        Checkpoint(out / "checkpoint_4.mdl").verify(0, 1)
        if seen.status == 0:  # what a killed run left half-done is gone
            left = [p.name for p in out.iterdir() if p.suffix in (".writing", ".deleting")]
            assert not left and not list(out.glob(f"{PREFIX}*"))
        shutil.rmtree(out)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def at_once(function: Callable, items: list) -> list:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def told_in_a_line(seen: SimpleNamespace) -> None:
    """A run that stopped said why in one line, the last."""
    assert seen.status == 1, seen.err
    assert "Traceback" not in seen.err, seen.err
    assert seen.err.splitlines()[-1].startswith("error: "), seen.err


@pytest.fixture(scope="module")
def runs(forks, tmp_path_factory) -> Callable[[str], Runs]:
    made = {}

    def runs(engine: str) -> Runs:
        if engine not in made:
            made[engine] = Runs(forks, tmp_path_factory.mktemp("runs"), engine)
        return made[engine]

    return runs


def points_of(runs: Runs, struck: int = 0, **fault: object) -> range:
    """The points of a run from step 2 to 4, which saves, deletes the one before and evaluates."""
    out = runs.copy()
    where = fault.pop("where", re.escape(str(out)))
    seen = runs.train(out, *LATEST, fault=Fault(at=0, where=where, **fault), struck=struck)
    shutil.rmtree(out)
    return range(1, runs.worked(seen).points + 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_at_every_write(runs, engine, some, tally):
    """At every call that changes a file of out_dir, before it and in the middle of writes."""
    runs = runs(engine)

    def kill(job: tuple[int, int]) -> None:
        struck, point = job
        out = runs.copy()
        fault = Fault("kill", point, re.escape(str(out)))
        seen = runs.train(out, *LATEST, fault=fault, struck=struck)
        assert seen.statuses[struck] == -signal.SIGKILL, seen.err
        runs.check(out)

    jobs = [(s, point) for s in range(runs.systems) for point in points_of(runs, s)]
    jobs = some(engine, jobs)
    at_once(kill, jobs)
    tally("SIGKILL at a write", engine, len(jobs), SAME)


@pytest.mark.parametrize("engine", [*ALONE, LONG])
def test_killed_at_random_moments(runs, engine, source, request, tally):
    """Again and again, until it is through; of several systems one."""
    runs = runs(engine)
    kills = request.config.getoption("--faults") or 25
    steps = 40 * max(1, kills // 10)
    flags = [
        "--num_steps",
        steps,
        "--checkpoint_steps",
        2,
        "--eval_steps",
        10,
        "--keep_checkpoints",
        2,
    ]
    whole, out, done = runs.copy(), runs.copy(), 0
    began = time.monotonic()
    runs.worked(runs.train(whole, *LATEST, *flags))
    longest = (time.monotonic() - began) / 2
    while done < kills:
        processes = runs.begin(out, *LATEST, *flags)
        time.sleep(source.uniform(0, longest))
        source.choice(processes).kill()
        for process in processes:  # a launcher ends one that waits for others to join it
            if not wait([process.sentinel], 30):
                process.kill()
        seen, *_ = [runs.forks.end(process) for process in processes]
        if seen.status == 0 or "nothing is left to train" in seen.err:
            shutil.rmtree(out)  # it was through before: from the start again
            out = runs.copy()
            continue
        done += 1
        for path in find_checkpoints(out).values():
            Checkpoint(path).verify(0, 1)
    seen = runs.train(out, *LATEST, *flags)
    assert seen.status == 0 or "nothing is left to train" in seen.err, seen.err
    assert figures(out) == figures(whole)
    tally("SIGKILL at random moments", engine, done, SAME)


@pytest.mark.parametrize("engine", [*ALONE, LONG])
def test_no_space_at_every_write(runs, engine, some, tally):
    runs = runs(engine)

    def fill(job: tuple[int, int]) -> bool:
        struck, point = job
        out = runs.copy()
        fault = Fault("full", point, re.escape(str(out)))
        seen = runs.train(out, *LATEST, fault=fault, struck=struck)
        if seen.status != 0:
            told_in_a_line(seen)
        runs.check(out)
        return seen.status == 0

    jobs = [(s, point) for s in range(runs.systems) for point in points_of(runs, s)]
    jobs = some(engine, jobs)
    went_on = sum(at_once(fill, jobs))
    note = f"{len(jobs) - went_on} stopped with a line, {went_on} went on; {SAME}"
    tally("no space left at a write", engine, len(jobs), note)


@pytest.mark.parametrize("engine", ALONE)
def test_a_limit_on_files(runs, engine, tally):
    """The system's own error, in the middle of what safetensors writes."""
    runs = runs(engine)
    for limit in (9_000, 30_000):
        out = runs.copy()
        seen = runs.train(out, *LATEST, fault=Fault(file_limit=limit))
        told_in_a_line(seen)
        runs.check(out)
    tally("a limit on the size of files (RLIMIT_FSIZE)", engine, 2, f"stopped with a line; {SAME}")


@pytest.mark.parametrize("engine", [*ALONE, LONG])
def test_reads_that_fail(runs, engine, some, tally):
    """Of the dataset, of the checkpoint, of the store."""
    runs = runs(engine)
    jobs = some(engine, points_of(runs, reads=True, where="words|out_"))

    def fail(point: int) -> bool:
        out = runs.copy()
        seen = runs.train(out, *LATEST, fault=Fault("unread", point, f"words|{out.name}", True))
        if seen.status != 0:  # else it was an evaluation's
            told_in_a_line(seen)
            assert "can't be read" in seen.err or "Input/output error" in seen.err
            assert "/" in seen.err  # a file is named
        again = runs.train(out, *LATEST)
        assert again.status == 0 or "nothing is left to train" in again.err, again.err
        assert figures(out) == runs.expected
        shutil.rmtree(out)
        return seen.status == 0

    went_on = sum(at_once(fail, jobs))
    note = f"{len(jobs) - went_on} stopped with a line, {went_on} went on (evaluations); {SAME}"
    tally("a read that fails (EIO)", engine, len(jobs), note)


@pytest.mark.parametrize("engine", [*ALONE, LONG])
def test_reads_that_are_short(runs, engine, tally):
    runs = runs(engine)
    out = runs.copy()
    runs.worked(runs.train(out, *LATEST, fault=Fault("short", 0, "words|out_", True)))
    assert figures(out) == runs.expected
    tally("every read gives half of what was asked for", engine, 1, "equal losses")


@pytest.mark.parametrize("engine", [*ALONE, LONG])
def test_a_clock_that_jumps(runs, engine, source, tally):
    runs = runs(engine)
    out = runs.copy()
    fault = Fault(clock=source.randrange(1, 10**6))
    runs.worked(runs.train(out, *LATEST, fault=fault))
    assert figures(out) == runs.expected
    tally("the clock jumps by years, at every look", engine, 1, "equal losses")


@pytest.mark.parametrize("engine", [*ALONE, LONG])
def test_sigterm_at_every_write(runs, engine, some, tally):
    """While it starts, saves, deletes, and draws: the step is saved, and it ends with status 0."""
    runs = runs(engine)

    def stop(point: int) -> None:
        out = runs.copy()
        seen = runs.train(out, *LATEST, fault=Fault("stop", point, re.escape(str(out))))
        assert seen.status == 0 or seen.status == -signal.SIGTERM, seen.err
        assert "Traceback" not in seen.err
        found = find_checkpoints(out)
        assert found
        for path in found.values():
            Checkpoint(path).verify(0, 1)
        again = runs.train(out, *LATEST)
        assert again.status == 0 or "nothing is left to train" in again.err, again.err
        assert figures(out) == runs.expected
        shutil.rmtree(out)

    jobs = some(engine, points_of(runs))
    at_once(stop, jobs)
    tally("SIGTERM at a write", engine, len(jobs), f"saved, status 0; {SAME}")


@pytest.mark.parametrize("engine", ["resident", "streaming, RAM", LONG])
def test_sigterm_in_an_evaluation(runs, engine, tally):
    runs = runs(engine)
    out = runs.copy()
    seen = runs.worked(runs.train(out, *LATEST, fault=Fault("stop", 3, "val.bin", True)))
    assert "SIGTERM: will save" in seen.err and "val_loss" not in seen.out
    runs.worked(runs.train(out, *LATEST))
    assert figures(out) == runs.expected
    tally("SIGTERM in an evaluation", engine, 1, "equal losses")


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "with a flipped bit": lambda path: flip(path),
    "renamed": lambda path: path.rename(path.with_name(f"{path.name}.old")),
    "deleted": lambda path: path.unlink(),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("engine", ["resident", LONG])
def test_a_damaged_file_of_a_checkpoint(runs, engine, damage, some, tally):
    """It is refused by name; without that checkpoint the one before goes on to the same numbers."""
    runs = runs(engine)
    whole = runs.copy()
    runs.worked(runs.train(whole, *LATEST, "--keep_checkpoints", 5))

    def try_file(name: str) -> None:
        out = whole.with_name(f"{whole.name}_{name}")
        shutil.copytree(whole, out)
        DAMAGES[damage](out / "checkpoint_4.mdl" / name)
        seen = runs.train(out, *LATEST, "--num_steps", 6)
        told_in_a_line(seen)
        assert "checkpoint_4.mdl is damaged: " in seen.err and name in seen.err
        assert "move it away to use the one before" in seen.err
        shutil.rmtree(out / "checkpoint_4.mdl")
        runs.worked(runs.train(out, *LATEST, "--keep_checkpoints", 5))
        assert figures(out)[-3:] == runs.expected[-3:]
        shutil.rmtree(out)

    names = some(engine, sorted(path.name for path in (whole / "checkpoint_4.mdl").iterdir()))
    at_once(try_file, names)
    tally(f"a file of a checkpoint is {damage}", engine, len(names), f"named and refused; {SAME}")


def copied(source: Path, names: list[str], folder: Path) -> None:
    """A copy that broke off: these files, and half of the last."""
    folder.mkdir()
    for name in names:
        shutil.copyfile(source / name, folder / name)
    os.truncate(folder / names[-1], (source / names[-1]).stat().st_size // 2)


@pytest.mark.parametrize("fault", ["manifest lost", "half copied"])
@pytest.mark.parametrize("engine", ["resident", LONG])
def test_a_checkpoint_in_part(runs, engine, fault, some, tally):
    """It is refused by name by every start in its folder, which deletes nothing; moved away, the
    one before goes on to the same numbers."""
    runs = runs(engine)
    whole = runs.copy()
    runs.worked(runs.train(whole, *LATEST, "--keep_checkpoints", 5))
    names = sorted(path.name for path in (whole / "checkpoint_4.mdl").iterdir())
    orders = [[name for name in names if name != "manifest.json"]]
    if fault == "half copied":
        orders = [["manifest.json", *orders[0]], [*orders[0], "manifest.json"]]
    parts = {tuple(order[:count]) for order in orders for count in range(1, len(order) + 1)}

    def resume(part: tuple[str, ...]) -> None:
        out = whole.with_name(f"{whole.name}_{fault}_{len(part)}_{part[0]}")
        shutil.copytree(whole, out)
        shutil.rmtree(out / "checkpoint_4.mdl")
        copied(whole / "checkpoint_4.mdl", list(part), out / "checkpoint_4.mdl")
        before = {path: path.read_bytes() for path in out.glob("*.mdl/*")}
        before[out / "metrics.jsonl"] = (out / "metrics.jsonl").read_bytes()
        for flags, said in (
            (LATEST, "checkpoint_4.mdl is damaged: "),
            ([], "already has checkpoint_4.mdl; "),
            (["--checkpoint_path", out / "checkpoint_2.mdl"], "already has checkpoint_4.mdl; "),
        ):
            seen = runs.train(out, *flags)
            told_in_a_line(seen)
            assert said in seen.err
        assert all(path.read_bytes() == content for path, content in before.items())
        (out / "checkpoint_4.mdl").rename(out / "away")
        runs.check(out)

    tried = some(engine, sorted(parts))
    at_once(resume, tried)
    note = f"refused by name, nothing deleted; moved away: {SAME.removeprefix('all whole, ')}"
    tally(fault, engine, len(tried), note)


@pytest.mark.long
def test_killed_while_samples_are_recorded(runs, tally):
    """An evaluation without its samples makes up for them, and no record is there twice."""
    runs = runs("resident")
    flags = [*LATEST, "--sample_prompts", "[abc, the ship]"]
    whole = runs.copy()
    runs.worked(runs.train(whole, *flags))
    assert [record["step"] for record in records(whole, "samples")] == [4]
    seen = runs.train(runs.copy(), *flags, fault=Fault(where="metrics.jsonl"))

    def kill(point: int) -> None:
        out = runs.copy()
        killed = runs.train(out, *flags, fault=Fault("kill", point, "metrics.jsonl"))
        assert killed.status == -signal.SIGKILL
        again = runs.train(out, *flags)
        assert again.status == 0 or "nothing is left to train" in again.err, again.err
        assert figures(out) == figures(whole)
        shutil.rmtree(out)

    at_once(kill, list(range(1, seen.points + 1)))
    tally("SIGKILL at a record, with samples", "resident", seen.points, "all resumed, none missing")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_dataset(runs, damage, tally):
    runs = runs("resident")
    words, names = runs.folder / "words", ("train.bin", "val.bin", "meta.json", "tokenizer.json")
    for name in names:
        broken, out = runs.folder / "broken", runs.copy()
        shutil.copytree(words, broken)
        DAMAGES[damage](broken / name)
        seen = runs.train(out, *LATEST, "--dataset", broken)
        if name == "val.bin" and damage == "with a flipped bit":  # seen when it is read
            assert "warning: evaluation after step 4 failed" in seen.err
            assert "val.bin was changed" in seen.err
        else:
            told_in_a_line(seen)
            assert f"broken/{name}" in seen.err or "broken/meta.json" in seen.err
        shutil.rmtree(broken)
        runs.check(out)
    tally(f"a file of a dataset is {damage}", "resident", len(names), f"named; {SAME}")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_store(runs, damage, source, tally):
    """Between two steps: it is refused, or what was damaged was written anew before it was read, or
    only the file's name is gone; then the losses are those of an undisturbed run."""
    runs = runs("streaming, disk")
    flags = [*LATEST, "--num_steps", 50, "--checkpoint_steps", 50, "--eval_steps", 50]
    undisturbed = runs.copy()
    runs.worked(runs.train(undisturbed, *flags))

    def refused() -> bool:
        out = runs.copy()
        (process,) = runs.begin(out, *flags)
        DAMAGES[damage](source.choice(await_files(out, process)))
        seen = runs.forks.end(process)
        assert not list(out.glob(f"{PREFIX}*"))
        if seen.status == 0:
            assert figures(out) == figures(undisturbed)
            return False
        told_in_a_line(seen)
        assert "resume from the last checkpoint" in seen.err
        return True

    if damage in ("renamed", "deleted"):
        assert not refused()
        tries, outcome = 1, "went on to equal losses"
    else:
        tries = next(count for count in range(1, 11) if refused())
        outcome = f"1 stopped with a line, {tries - 1} written over: equal losses"
    tally(f"a file of the store is {damage}", "streaming, disk", tries, outcome)


def await_files(out: Path, process: object) -> list[Path]:
    """The files of the store, once it trains."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and "step 4/" not in said(process):
        time.sleep(0.02)
    return [path for path in out.glob(f"{PREFIX}*/*") if path.stat().st_size]


def said(process: object) -> str:
    """What it has written to stdout so far."""
    path = Path(process.files[0])
    return path.read_text() if path.is_file() else ""


def test_two_runs_in_one_folder(runs, tally):
    """The second is refused with the first's number; a lock that a killed run left is no lock."""
    runs = runs("resident")
    out = runs.copy()
    flags = ["--num_steps", 100_000, "--checkpoint_steps", 100_000]
    (process,) = runs.begin(out, *LATEST, *flags)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and "step 3/" not in said(process):
        time.sleep(0.02)
    seen = runs.train(out, *LATEST)
    told_in_a_line(seen)
    assert f"{out} is in use by process {process.pid}; use another --out_dir" in seen.err
    process.kill()
    runs.forks.end(process)
    assert (out / "lock").is_file()
    runs.check(out)
    tally("two runs in one out_dir, a stale lock", "resident", 2, "refused; not in the way")


def test_a_read_only_folder(runs, tally):
    runs = runs("resident")
    out = runs.copy()
    for path in (out, *out.iterdir()):
        path.chmod(0o555)
    seen = runs.train(out, *LATEST, fault=Fault(read_only=True))
    told_in_a_line(seen)
    assert f"{out}/lock: Permission denied" in seen.err
    for path in (out, *out.iterdir()):
        path.chmod(0o755)
    runs.check(out)
    tally("a read-only out_dir", "resident", 1, "refused by name; nothing changed")


@pytest.mark.parametrize("what", ["activation", "gradient"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(runs, what, factor, tally):
    """In every engine the same step changes nothing, is told with its batch, and is not saved; and
    the steps after it give the same numbers, in the sharded engine to rounding."""
    told = {}
    for engine in ENGINES:
        there = runs(engine)
        out = there.folder / f"spoiled_{what}_{factor}"
        flags = [
            "--num_steps",
            8,
            "--checkpoint_steps",
            4,
            "--eval_steps",
            8,
            "--keep_checkpoints",
            9,
        ]
        flags += ["--dropout", 0.0]  # systems draw other masks
        fault = Fault(spoiled={4: (what, factor), 6: (what, factor)})
        seen, *_ = [there.forks.end(p) for p in there.begin(out, *flags, fault=fault)]
        there.worked(seen)
        assert seen.out.count("not finite: update skipped; the sequences begin") == 2
        records = {r["step"]: r for r in figures(out) if "loss" in r}
        assert [step for step, r in records.items() if "sequences" in r] == [4, 6]
        assert len(records[4]["sequences"]) == 4
        assert records[4]["loss"] is None or records[4]["grad_norm"] is None
        assert sorted(find_checkpoints(out)) == [5, 8]  # 4 was put off
        manifest = read_sealed(out / "checkpoint_8.mdl" / "manifest.json")
        assert (manifest["step"], manifest["optimizer_steps"]) == (8, 6)
        told[engine] = [records[step]["loss"] for step in (1, 2, 3, 5, 7, 8)]
    for engine, losses in told.items():
        assert losses == pytest.approx(told["resident"], rel=1e-5), engine
    tally(f"{what} {factor}", "every engine", 2 * len(ENGINES), "the step changed nothing")


@pytest.mark.parametrize("engine", [*ALONE, LONG])
def test_ten_steps_that_are_not_finite(runs, engine, tally):
    """The last checkpoint that is good is named, and still the newest."""
    runs = runs(engine)
    out = runs.copy()
    spoiled = {step: ("gradient", float("nan")) for step in range(5, 40)}
    flags = [
        "--num_steps",
        40,
        "--checkpoint_steps",
        1,
        "--keep_checkpoints",
        1,
        "--eval_steps",
        40,
    ]
    seen = runs.train(out, *LATEST, *flags, fault=Fault(spoiled=spoiled))
    told_in_a_line(seen)
    assert "stopped at step 14: 10 steps in a row had a loss or gradient that is not fi" in seen.err
    assert f"{out}/checkpoint_4.mdl in another --out_dir" in seen.err
    assert list(find_checkpoints(out)) == [4]
    tally("ten steps in a row are not finite", engine, 1, "stopped, the last good one named")


@pytest.mark.parametrize("engine", ALONE)
def test_a_weight_that_is_not_finite(runs, engine, tally):
    """As a checkpoint could hold it that another program wrote."""
    from safetensors.torch import load_file, save_file

    from common.files import write_sealed
    from weights.checkpoint import _describe

    runs = runs(engine)
    out = runs.copy()
    path = out / "checkpoint_2.mdl" / "decoder.1.safetensors"
    tensors = load_file(path)
    tensors["decoder.1.mlp.fc.weight"][3, 5] = float("nan")
    save_file(tensors, path)
    manifest = read_sealed(path.parent / "manifest.json")
    manifest["files"][path.name] = _describe(path)
    write_sealed(path.parent / "manifest.json", manifest)
    seen = runs.train(out, *LATEST, "--num_steps", 40, "--checkpoint_steps", 3, "--eval_steps", 40)
    told_in_a_line(seen)
    assert "stopped at step 12: 10 steps in a row" in seen.err
    assert list(find_checkpoints(out)) == [2]
    tally("a weight that is NaN", engine, 1, "every step refused, stopped after ten")


def test_data_that_are_not_of_the_model(runs, tally):
    """An id above the vocabulary, in a file whose checksums are right."""
    from common.tokens import write_meta

    runs = runs("resident")
    broken, out = runs.folder / "large", runs.copy()
    shutil.copytree(runs.folder / "words", broken)
    ids = np.fromfile(broken / "train.bin", np.uint16)
    ids[:] = VOCABULARY
    ids.tofile(broken / "train.bin")
    meta = read_sealed(broken / "meta.json")
    write_meta(broken, meta)
    seen = runs.train(out, *LATEST, "--dataset", broken)
    told_in_a_line(seen)
    assert f"train.bin has token id {VOCABULARY} near position" in seen.err
    runs.check(out)
    tally("token ids above the vocabulary", "resident", 1, "named with their place")


SPIKE = {70: ("gradient", 1e6)}


@pytest.mark.parametrize("engine", ["resident", "streaming, RAM", LONG])
def test_the_guard_against_spikes(runs, engine, tally):
    """It leaves out the step, is off by default, and a resumed run knows the steps before it."""
    runs = runs(engine)
    flags = ["--num_steps", 72, "--checkpoint_steps", 68, "--eval_steps", 100]
    flags += ["--max_gradient_norm", 1e9, "--keep_checkpoints", 9]
    told = {}
    for guard in ("true", "false"):
        out = runs.copy()
        fault = Fault(spoiled=SPIKE)
        more = [*LATEST, *flags, "--skip_loss_spikes", guard]
        seen = runs.worked(runs.train(out, *more, fault=fault))
        told[guard] = figures(out)
        assert seen.out.count("loss spike: update skipped") == (guard == "true")
        if guard == "true":
            shutil.rmtree(out / "checkpoint_72.mdl")
            runs.worked(runs.train(out, *more, fault=fault))
            assert figures(out) == told["true"]
    skipped = [r["step"] for r in told["true"] if "sequences" in r]
    assert skipped == [70]
    losses = {g: {r["step"]: r["loss"] for r in f if "loss" in r} for g, f in told.items()}
    assert losses["true"][70] == losses["false"][70]
    assert losses["true"][71] != losses["false"][71]
    tally("a gradient a million times too large", engine, 1, "left out by skip_loss_spikes")


def test_what_is_beside_the_training(runs, tally):
    """A failing TensorBoard, picture or evaluation is told, and the training goes on."""
    runs = runs("resident")
    out = runs.copy()
    shutil.rmtree(out / "tensorboard")
    (out / "tensorboard").write_text("not a folder")
    (out / "loss.png").unlink()
    (out / "loss.png").mkdir()
    seen = runs.worked(runs.train(out, *LATEST))
    assert "warning: TensorBoard failed (" in seen.err
    assert "warning: loss.png failed (" in seen.err
    assert figures(out) == runs.expected
    out = runs.copy()
    seen = runs.worked(runs.train(out, *LATEST, fault=Fault("unread", 1, "val.bin", True)))
    assert "warning: evaluation after step 4 failed (" in seen.err
    assert "checkpoint_4.mdl" in seen.out
    runs.worked(runs.train(out, *LATEST))  # makes up for it
    assert figures(out) == runs.expected
    tally("TensorBoard, picture, evaluation fail", "resident", 3, "told; the training went on")


@pytest.mark.long
def test_the_same_run_twice(runs, tally):
    """From the start, bit for bit, in each engine; streaming from RAM and from disk are one."""
    told = {}
    for engine in ENGINES:
        there, outs = runs(engine), []
        for number in range(2):
            outs.append(there.folder / f"twice_{number}")
            there.worked(there.train(outs[-1]))
        assert figures(outs[0]) == figures(outs[1]), engine
        sums = [
            {
                name: entry["sha256"]
                for name, entry in Checkpoint(out / "checkpoint_4.mdl").files.items()
            }
            for out in outs
        ]
        assert sums[0] == sums[1]
        told[engine] = figures(outs[0])
    assert told["streaming, RAM"] == told["streaming, disk"]
    tally("none: the same run twice", "every engine", 2 * len(ENGINES), "equal bit for bit")
