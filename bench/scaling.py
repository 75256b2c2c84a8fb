"""The sharded engine: python bench/scaling.py cores

Two systems of one core each, compared with one system of two, on the shape of 111m, with the same
global batch. The sides take turns, each time in processes of their own, and the best step
counts, as machines are noisy. The share of communication is what PyTorch's profiler finds in FSDP's
gathering and reducing, in one more step.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import RandomBatches, running

from configuration import Configuration
from planner.report import summary
from planner.resolve import resolve
from runtime.distributed import joined
from runtime.metrics import memory_used

SHAPE_111M = {"width": 768, "depth": 10, "heads": 12}
EXCHANGES = ("FSDP::all_gather", "FSDP::post_backward_reduce", "FSDP::all_gather_copy_out")


def cores(tokens: int = 8192, rounds: int = 3, steps: int = 2) -> None:
    same = {**SHAPE_111M, "sequence_length": 1024, "batch_size": tokens // 1024, "backend": "CPU"}
    compare({f"{n} systems": {**same, "num_systems": n} for n in (1, 2)}, rounds, steps)


def compare(sides: dict[str, dict], rounds: int, steps: int) -> None:
    """The ratio is the speed of the second side over that of the first."""
    results = {name: [] for name in sides}
    for _ in range(rounds):
        for name, keys in sides.items():
            command = [sys.executable, __file__, "one", "--steps", str(steps)]
            command += ["--keys", json.dumps(keys)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {results[name][-1]}", file=sys.stderr)
    told = {}
    for name, result in results.items():
        seconds = [s for r in result for s in r["seconds"]]
        tokens = sides[name]["batch_size"] * sides[name]["sequence_length"]
        told[name] = {
            "tokens_per_second": tokens / min(seconds),
            "spread": max(seconds) / min(seconds),
            "communication": min(r["communication"] for r in result),
            "gigabytes": max(r["gigabytes"] for r in result),
        }
    first, second = (side["tokens_per_second"] for side in told.values())
    print(json.dumps({**told, "ratio": second / first}))


def one(keys: str, steps: int) -> None:
    """Some steps of one side, given as JSON; the first system tells how long they took."""
    config = Configuration(**json.loads(keys))
    with joined(config, training=False) as group:
        planned = group.on_first(resolve, config, {}, True, group.local_size)
        config = planned.config
        running_steps = running(planned, RandomBatches(config))
        next(running_steps)  # to warm up
        seconds = [next(running_steps).seconds for _ in range(steps)]
        gigabytes = memory_used() / 1e9
        with torch.profiler.profile() as profiler:
            next(running_steps)
        times = {event.key.split(" ")[0]: event.cpu_time_total for event in profiler.key_averages()}
        exchanged = sum(time for key, time in times.items() if key in EXCHANGES) / 1e6
        if group.rank == 0:
            told = {"seconds": seconds, "communication": exchanged / min(seconds)}
            told |= {"gigabytes": gigabytes, "cut": summary(planned)}
            print(json.dumps(told))


if __name__ == "__main__":
    auto_cli({"cores": cores, "one": one}, as_positional=False)
