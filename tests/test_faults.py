"""What goes wrong in long runs, done to short ones: after each fault all checkpoints are whole, and
`--checkpoint_path latest` goes on to exactly the numbers of a run that nothing disturbed.

A part of it by default; all of it, and the table of docs/reliability.md: make test-faults.
"""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from math import inf, nan
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import VOCABULARY, figures, records, text, write_dataset
from faults import Fault, Forks
from helpers import free_port

from common.files import read_sealed
from engines.store import PREFIX
from weights.checkpoint import Checkpoint, find_checkpoints

ENGINES = {
    "resident": ["--engine", "resident"],
    "streaming, RAM": ["--engine", "streaming", "--stream_to", "ram"],
    "streaming, disk": ["--engine", "streaming", "--stream_to", "disk"],
    "sharded": ["--num_systems", 2],
}
LATER = [pytest.param(name, marks=pytest.mark.long) for name in ("streaming, RAM", "sharded")]
EVERY = ["resident", "streaming, disk", *LATER]  # the first two have every kind of file
LATEST = ["--checkpoint_path", "latest"]
SAME = "all whole, all resumed with equal losses"


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
        self.before = folder / "before"
        write_dataset(folder / "words", text(1, 4000), text(1, 301))
        values = {
            **{"width": 32, "depth": 2, "heads": 2, "vocab_size": VOCABULARY, "dropout": 0.1},
            **{"max_position_embeddings": 32, "sequence_length": 32, "batch_size": 4},
            **{"dataset": str(folder / "words"), "backend": "CPU", "learning_rate": 1e-2},
            **{"warmup_steps": 2, "decay_steps": 50, "num_steps": 4, "checkpoint_steps": 2},
            **{"eval_steps": 4, "log_steps": 1, "keep_checkpoints": 1},
        }
        if engine == "resident":  # an evaluation that lacks them makes up for them
            values["sample_prompts"] = ["abc", "the ship"]
        self.config = folder / "small.yaml"
        self.config.write_text(yaml.safe_dump(values))
        worked(self.train(self.before, "--num_steps", 2))

    @cached_property
    def undisturbed(self) -> Path:
        """The out_dir of a run to step 4, with the checkpoints of steps 2 and 4."""
        out = self.copy()
        worked(self.train(out, *LATEST, "--keep_checkpoints", 5))
        return out

    @cached_property
    def expected(self) -> list[dict]:
        return figures(self.undisturbed)

    def copy(self, source: Path | None = None) -> Path:
        """A copy of an out_dir, by default of one with the checkpoint of step 2 alone."""
        out = self.folder / f"out_{next(self.forks.numbers)}"
        shutil.copytree(source or self.before, out)
        return out

    def begin(self, out: Path, *flags: object, fault: Fault | None = None, struck: int = 0) -> list:
        """The processes of a run; the fault is of the system `struck`."""
        arguments = ["train", self.config, "--out_dir", out, *ENGINES[self.engine], *flags]
        if self.systems == 1:
            return [self.forks.start(*arguments, fault=fault)]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
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
        struck = seen[keys.get("struck", 0)]
        return SimpleNamespace(
            status=seen[0].status,
            out=seen[0].out,
            err="".join(one.err for one in seen),
            points=struck.points,
            end=struck.status,
        )

    def resume(self, out: Path, *flags: object) -> SimpleNamespace:
        seen = self.train(out, *LATEST, *flags)
        assert seen.status == 0 or "nothing is left to train" in seen.err, seen.err
        return seen

    def check(self, out: Path) -> None:
        """Nothing is lost: what is there is whole, and goes on to the numbers of `expected`."""
        verify(out)
        seen = self.resume(out)
        assert figures(out) == self.expected
        Checkpoint(out / "checkpoint_4.mdl").verify(0, 1)
        if seen.status == 0:  # what a killed run left half-done is gone
            left = [p.name for p in out.iterdir() if p.suffix in (".writing", ".deleting")]
            assert not left and not list(out.glob(f"{PREFIX}*"))
        shutil.rmtree(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forks) -> Callable[[str], Runs]:
    made = {}

    def runs(engine: str) -> Runs:
        if engine not in made:
            made[engine] = Runs(forks, tmp_path_factory.mktemp("runs"), engine)
        return made[engine]

    return runs


def at_once(function: Callable, items: list) -> list:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def worked(seen: SimpleNamespace) -> SimpleNamespace:
    assert seen.status == 0, seen.err
    return seen


def told_in_a_line(seen: SimpleNamespace) -> None:
    """A run that stopped said why in one line, the last."""
    assert seen.status == 1, seen.err
    assert "Traceback" not in seen.err, seen.err
    assert seen.err.splitlines()[-1].startswith("error: "), seen.err


def verify(out: Path) -> None:
    """There are checkpoints, all of them whole."""
    found = find_checkpoints(out)
    assert found, sorted(path.name for path in out.iterdir())
    for path in found.values():
        Checkpoint(path).verify(0, 1)


AT_EVERY = {  # name: kind, whether at reads
    "SIGKILL at a write": ("kill", False),
    "no space left at a write": ("full", False),
    "a read that fails (EIO)": ("unread", True),
    "SIGTERM at a write": ("stop", False),
    "SIGTERM at a read": ("stop", True),
}


@pytest.mark.parametrize("name", AT_EVERY)
@pytest.mark.parametrize("engine", EVERY)
def test_at_every_write_or_read(runs, engine, name, some, tally):
    """In a run that saves, deletes the checkpoint before and evaluates: at every call that changes
    a file of out_dir, before it and in the middle of writes; or at every read of the dataset, the
    checkpoint and the store."""
    runs, (kind, reads) = runs(engine), AT_EVERY[name]

    def train(struck: int, kind: str, point: int) -> tuple[Path, SimpleNamespace]:
        out = runs.copy()
        where = f"words|{out.name}" if reads else re.escape(str(out))
        fault = Fault(kind, point, where, reads)
        return out, runs.train(out, *LATEST, fault=fault, struck=struck)

    def strike(job: tuple[int, int]) -> bool:
        struck, point = job
        out, seen = train(struck, kind, point)
        if kind == "kill":  # threads that write at times of their own may have made fewer points
            assert seen.end == -signal.SIGKILL or seen.points < point, seen.err
        elif kind == "stop":
            assert seen.status in (0, -signal.SIGTERM) and "Traceback" not in seen.err, seen.err
        elif seen.status != 0:
            told_in_a_line(seen)
            if reads:  # a file is named
                assert re.search("/.*(can't be read|Input/output error)", seen.err)
        runs.check(out)
        return seen.status == 0

    systems = range(runs.systems if kind in ("kill", "full") else 1)
    points = {struck: worked(train(struck, "", 0)[1]).points for struck in systems}
    jobs = [(struck, point) for struck in systems for point in range(1, points[struck] + 1)]
    jobs = some(engine, jobs)
    went_on = sum(at_once(strike, jobs))
    note = f"{len(jobs) - went_on} stopped with a line, {went_on} went on"
    note = {"kill": "", "stop": "saved, status 0; "}.get(kind, f"{note}; ")
    tally(name, engine, len(jobs), note + SAME)


@pytest.mark.parametrize("engine", EVERY)
def test_killed_at_random_moments(runs, engine, source, request, tally):
    """Again and again, until it is through; of several systems one."""
    runs = runs(engine)
    kills = request.config.getoption("--faults") or 25
    flags = ["--num_steps", 20 * max(1, kills // 5), "--checkpoint_steps", 2]
    flags += ["--eval_steps", 10, "--keep_checkpoints", 2]
    whole, out, done = runs.copy(), runs.copy(), 0
    began = time.monotonic()
    worked(runs.train(whole, *LATEST, *flags))
    longest = (time.monotonic() - began) / 2
    while done < kills:
        processes = runs.begin(out, *LATEST, *flags)
        time.sleep(source.uniform(0, longest))
        source.choice(processes).kill()
        for process in processes:  # a launcher ends one that waits for others to join it
            if not wait([process.sentinel], 5):
                process.kill()
        seen, *_ = [runs.forks.end(process) for process in processes]
        if seen.status == 0 or "nothing is left to train" in seen.err:
            shutil.rmtree(out)  # it was through before: from the start again
            out = runs.copy()
            continue
        done += 1
        verify(out)
    runs.resume(out, *flags)
    assert figures(out) == figures(whole)
    tally("SIGKILL at random moments", engine, done, SAME)


@pytest.mark.parametrize("engine", ["resident", "streaming, disk"])
def test_a_limit_on_files(runs, engine, tally):
    """The system's own error, in the middle of what safetensors or the store writes."""
    runs = runs(engine)

    def stop(limit: int) -> None:
        out = runs.copy()
        told_in_a_line(runs.train(out, *LATEST, fault=Fault(file_limit=limit)))
        runs.check(out)

    at_once(stop, [9_000, 30_000])
    tally("a limit on the size of files (RLIMIT_FSIZE)", engine, 2, f"stopped with a line; {SAME}")


@pytest.mark.parametrize("engine", EVERY)
def test_short_reads_and_a_clock_that_jumps(runs, engine, source, tally):
    runs = runs(engine)
    out = runs.copy()
    fault = Fault("short", 0, "words|out_", True, clock=source.randrange(1, 10**6))
    worked(runs.train(out, *LATEST, fault=fault))
    assert figures(out) == runs.expected
    fault = "every read gives half of what was asked for; the clock jumps by years, at every look"
    tally(fault, engine, 1, "equal losses")


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


def break_off(path: Path) -> None:
    """Leaves what a copy of the folder has that broke off in the middle of this file."""
    for other in path.parent.iterdir():
        if other.name > path.name:  # the manifest is in the middle, so that it may be lost or not
            other.unlink()
    DAMAGES["truncated"](path)


@pytest.mark.parametrize("damage", [*DAMAGES, "half copied"])
@pytest.mark.parametrize("engine", ["resident", LATER[1]])
def test_a_damaged_checkpoint(runs, engine, damage, some, tally):
    """It is refused by name by every start in its folder, which deletes nothing; moved away, the
    one before goes on to the same numbers."""
    runs = runs(engine)

    def resume(name: str) -> None:
        out = runs.copy(runs.undisturbed)
        newest = out / "checkpoint_4.mdl"
        DAMAGES.get(damage, break_off)(newest / name)
        before = {path: path.read_bytes() for path in (*out.glob("*.mdl/*"), out / "metrics.jsonl")}
        for flags, said in (
            ([*LATEST, "--num_steps", 6], "checkpoint_4.mdl is damaged: "),
            ([], "already has checkpoint_4.mdl; "),
            (["--checkpoint_path", out / "checkpoint_2.mdl"], "already has checkpoint_4.mdl; "),
        ):
            seen = runs.train(out, *flags)
            told_in_a_line(seen)
            assert said in seen.err
            if said.endswith("damaged: "):
                assert "move it away to use the one before" in seen.err
                assert name in seen.err or damage == "half copied"
        assert all(path.read_bytes() == content for path, content in before.items())
        newest.rename(out / "away")
        runs.check(out)

    names = some(engine, sorted(path.name for path in runs.undisturbed.glob("checkpoint_4.mdl/*")))
    at_once(resume, names)
    name = damage if damage == "half copied" else f"a file of a checkpoint is {damage}"
    note = f"refused by name, nothing deleted; moved away: {SAME.removeprefix('all whole, ')}"
    tally(name, engine, len(names), note)


AT_A_RECORD = Fault("pause", 2, r"metrics\.jsonl$")  # the first; the file was opened before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_store(runs, damage, source, tally):
    """Between two steps: it is refused, or what was damaged was written anew before it was read, or
    only the file's name is gone; then the losses are those of an undisturbed run."""
    runs = runs("streaming, disk")

    def refused() -> bool:
        out = runs.copy()
        (process,) = runs.begin(out, *LATEST, fault=AT_A_RECORD)
        runs.forks.await_pause(process)
        try:
            files = [path for path in out.glob(f"{PREFIX}*/*") if path.stat().st_size]
            DAMAGES[damage](source.choice(sorted(files)))
        finally:
            os.kill(process.pid, signal.SIGCONT)
        seen = runs.forks.end(process)
        assert not list(out.glob(f"{PREFIX}*"))
        if seen.status == 0:
            assert figures(out) == runs.expected
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


def test_two_runs_in_one_folder(runs, tally):
    """The second is refused with the first's number; a lock that a killed run left is no lock."""
    runs = runs("resident")
    out = runs.copy()
    (process,) = runs.begin(out, *LATEST, fault=AT_A_RECORD)
    runs.forks.await_pause(process)
    seen = runs.train(out, *LATEST)
    process.kill()
    runs.forks.end(process)
    told_in_a_line(seen)
    assert f"{out} is in use by process {process.pid}; use another --out_dir" in seen.err
    assert (out / "lock").is_file()
    runs.check(out)
    tally("two runs in one out_dir, a stale lock", "resident", 2, "refused; not in the way")


NOT_FINITE = {
    3: ("activation", nan),
    5: ("gradient", nan),
    6: ("activation", inf),
    8: ("gradient", inf),
}
SPOILED = NOT_FINITE | dict.fromkeys(range(11, 40), ("gradient", nan))


def test_numbers_that_are_not_finite(runs, tally):
    """In every engine the same step changes nothing, is told with its batch, and is not saved; and
    the steps after it give the same numbers, in the sharded engine to rounding. Ten in a row stop
    the run, which names the last checkpoint that is good."""
    losses = {}
    flags = ["--num_steps", 40, "--checkpoint_steps", 5, "--eval_steps", 40]
    flags += ["--keep_checkpoints", 2, "--dropout", 0.0]  # systems draw other masks
    for engine in ENGINES:
        there = runs(engine)
        out = there.folder / "spoiled"
        seen = there.train(out, *flags, fault=Fault(spoiled=SPOILED))
        told_in_a_line(seen)
        assert "stopped at step 20: 10 steps in a row had a loss or gradient that is n" in seen.err
        assert f"{out}/checkpoint_10.mdl in another --out_dir" in seen.err
        assert seen.out.count("not finite: update skipped; the sequences begin") == 14
        steps = {record["step"]: record for record in records(out)}
        skipped = [step for step, record in steps.items() if "sequences" in record]
        assert skipped == [*NOT_FINITE, *range(11, 21)]
        for step in skipped:
            assert len(steps[step]["sequences"]) == 4
            assert steps[step]["loss"] is None or steps[step]["grad_norm"] is None
        assert sorted(find_checkpoints(out)) == [7, 10]  # 5 was put off
        manifest = read_sealed(out / "checkpoint_10.mdl" / "manifest.json")
        assert (manifest["step"], manifest["optimizer_steps"]) == (10, 6)
        losses[engine] = [record["loss"] for step, record in steps.items() if step not in skipped]
    for engine in ENGINES:
        assert losses[engine] == pytest.approx(losses["resident"], rel=1e-5), engine
    fault = "an activation or a gradient NaN or infinite, then in ten steps in a row"
    note = "the step changed nothing; stopped, the last good checkpoint named"
    tally(fault, "every engine", 14 * len(ENGINES), note)


@pytest.mark.parametrize("engine", ["resident", *LATER])
def test_the_guard_against_spikes(runs, engine, tally):
    """It leaves out the step, is off by default, and a resumed run knows the steps before it."""
    runs, spike = runs(engine), Fault(spoiled={70: ("gradient", 1e6)})
    flags = [*LATEST, "--num_steps", 72, "--checkpoint_steps", 68, "--eval_steps", 100]
    flags += ["--max_gradient_norm", 1e9, "--keep_checkpoints", 9]
    guarded = [*flags, "--skip_loss_spikes", "true"]
    whole = runs.copy()
    worked(runs.train(whole, *guarded, fault=spike))
    resumed, unguarded = runs.copy(whole), runs.copy(whole)
    for out, more, skipped in ((resumed, guarded, 1), (unguarded, flags, 0)):
        shutil.rmtree(out / "checkpoint_72.mdl")
        seen = worked(runs.train(out, *more, fault=spike))
        assert seen.out.count("loss spike: update skipped") == skipped
    assert figures(resumed) == figures(whole)
    steps, others = ({r["step"]: r for r in records(out)} for out in (whole, unguarded))
    assert [step for step, record in steps.items() if "sequences" in record] == [70]
    assert steps[70]["loss"] == others[70]["loss"]
    assert steps[71]["loss"] != others[71]["loss"]
    tally("a gradient a million times too large", engine, 1, "left out by skip_loss_spikes")


def test_what_is_beside_the_training(runs, tally):
    """A failing TensorBoard, picture or evaluation is told, and the training goes on."""
    runs = runs("resident")
    out = runs.copy()
    shutil.rmtree(out / "tensorboard")
    (out / "tensorboard").write_text("not a folder")
    (out / "loss.png").unlink()
    (out / "loss.png").mkdir()
    seen = worked(runs.train(out, *LATEST, fault=Fault("unread", 1, "val.bin", True)))
    for what in ("TensorBoard", "loss.png", "evaluation after step 4"):
        assert f"warning: {what} failed (" in seen.err
    assert "checkpoint_4.mdl" in seen.out
    worked(runs.train(out, *LATEST))  # makes up for it
    assert figures(out) == runs.expected
    tally("TensorBoard, picture, evaluation fail", "resident", 3, "told; the training went on")


@pytest.mark.long
def test_the_same_run_twice(runs, tally):
    """From the start, bit for bit, in each engine; streaming from RAM and from disk are one."""
    for engine in ENGINES:
        there = runs(engine)
        out = there.folder / "again"
        worked(there.train(out, "--num_steps", 2))
        a, b = (Checkpoint(o / "checkpoint_2.mdl") for o in (out, there.before))
        assert figures(out) == figures(there.before) and a.files == b.files, engine
    assert runs("streaming, RAM").expected == runs("streaming, disk").expected
    tally("none: the same run twice", "every engine", 2 * len(ENGINES), "equal bit for bit")
