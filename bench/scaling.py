"""Two systems of one core each beside one system of two: python bench/scaling.py [--tokens 8192]

The shape of 111m, the same global batch, in turns, each time in processes of its own; the best step
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
from step import alternate, ours

import plan
from configuration import Configuration
from systems import joined

EXCHANGES = ("FSDP::all_gather", "FSDP::post_backward_reduce", "FSDP::all_gather_copy_out")


def main(tokens: int = 8192, rounds: int = 3, steps: int = 2, precision: str = "auto") -> None:
    results = {1: [], 2: []}
    for _ in range(rounds):
        for systems, result in results.items():
            keys = {"tokens": tokens, "steps": steps, "systems": systems, "precision": precision}
            flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
            command = [sys.executable, __file__, "one", *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result.append(json.loads(done.stdout.splitlines()[-1]))
            print(systems, result[-1], file=sys.stderr)
    seconds = {n: [s for r in result for s in r["seconds"]] for n, result in results.items()}
    one, two = (min(taken) for taken in seconds.values())
    told = {
        "tokens_per_second": {"one system": tokens / one, "two systems": tokens / two},
        "ratio": one / two,
        "spread": [max(taken) / min(taken) for taken in seconds.values()],
        "communication": min(result["communication"] for result in results[2]),
    }
    print(json.dumps(told))


def one(tokens: int, steps: int, systems: int, precision: str) -> None:
    """Some steps of one side; the first system prints how long they took."""
    config = Configuration(
        width=768,
        depth=10,
        heads=12,
        sequence_length=1024,
        batch_size=tokens // 1024,
        precision=precision,
        num_systems=systems,
        backend="CPU",
    )
    with joined(config, training=False) as world:
        planned = plan.resolve(config, {}, here=world.here) if world.rank == 0 else None
        config = world.gather(planned)[0].config
        step = ours(config)
        seconds = alternate({"it": step}, steps)["it"]
        with torch.profiler.profile() as profiler:
            step()
        times = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
        exchanged = sum(time for key, time in times.items() if key.split(" ")[0] in EXCHANGES)
        if world.rank == 0:
            share = exchanged / min(seconds)
            cut = {key: getattr(config, key) for key in ("engine", "micro_batch_size", "reshard")}
            print(json.dumps({"seconds": seconds, "communication": share, **cut}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        auto_cli({"one": one}, as_positional=False)
    else:
        auto_cli(main, as_positional=False)
