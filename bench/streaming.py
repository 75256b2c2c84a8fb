"""What streaming takes on this machine: python bench/streaming.py WHAT

memory: peak resident memory at depth 4, 8, 16 and 32, width 1,024, streamed from disk and
recomputed: it must not grow. plan: the planner's memory and seconds a step beside what was
measured, for resident and streaming configurations.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import RandomBatches, running

from configuration import Configuration
from planner.resolve import resolve
from runtime.metrics import memory_used

SHAPE_111M = {"width": 768, "depth": 10, "heads": 12}
SMALL = {"width": 512, "depth": 8, "heads": 8, "precision": "fp32"}


def one(keys: str, steps: int = 3) -> None:
    """Runs some steps of a configuration, given as JSON, and prints the plan and what it was."""
    with TemporaryDirectory() as folder:
        planned = resolve(Configuration(**json.loads(keys), out_dir=folder), {})
        running_steps = running(planned, RandomBatches(planned.config))
        seconds = [next(running_steps).seconds for _ in range(steps)]
    # the store goes past the page cache, so that the process's own memory is all there is
    measured = {"bytes": memory_used(), "seconds": min(seconds[1:])}
    told = {"bytes": planned.bytes["device"], "seconds": planned.seconds}
    print(json.dumps({"planned": told, "measured": measured}))


def in_own_process(steps: int = 3, **keys: object) -> dict:
    command = [sys.executable, __file__, "one", "--keys", json.dumps(keys), "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def memory(width: int = 1024) -> None:
    """Peak memory by depth."""
    peaks = {}
    for depth in (4, 8, 16, 32):
        keys = {"width": width, "depth": depth, "heads": width // 64, "precision": "bf16"}
        keys |= {"engine": "streaming", "stream_to": "disk", "activation_checkpointing": True}
        keys |= {"batch_size": 1, "sequence_length": 512}
        peaks[depth] = in_own_process(**keys)["measured"]["bytes"]
        print(f"depth {depth:>2}: {peaks[depth] / 1e6:,.0f} MB", file=sys.stderr)
    allowed = 1.15 * peaks[4] + 100e6
    print(json.dumps({"peak_bytes": peaks, "allowed_at_32": allowed, "ok": peaks[32] <= allowed}))


def plans() -> None:
    """Four configurations, each in a process of its own, with rates measured in the same minute."""
    from planner.machine import rates_file

    run = {"sequence_length": 1024, "batch_size": 2}
    disk = {"engine": "streaming", "stream_to": "disk"}
    cases = {
        "resident 111m": {**SHAPE_111M, **run, "engine": "resident"},
        "resident fp32": {**SMALL, **run, "engine": "resident"},
        "streaming 111m, kept": {**SHAPE_111M, **run, **disk, "activation_checkpointing": False},
        "streaming fp32, recomputed": {**SMALL, **run, **disk, "activation_checkpointing": True},
    }
    for name, keys in cases.items():
        rates_file().unlink(missing_ok=True)
        result = in_own_process(steps=6, **keys)
        for kind, unit in (("bytes", 1e9), ("seconds", 1)):
            told, seen = result["planned"][kind] / unit, result["measured"][kind] / unit
            ratio = seen / told
            print(f"{name}: {kind} planned {told:.2f}, measured {seen:.2f}, ratio {ratio:.2f}")


if __name__ == "__main__":
    auto_cli({"memory": memory, "plan": plans, "one": one}, as_positional=False)
