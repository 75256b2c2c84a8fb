"""Everything that needs a GPU, in one command: python bench/gpu.py [--only NAMES] [--toy true]

The tests marked `gpu` and then the comparisons of docs/performance.md, each of which appends a line
to results.jsonl in `out`, so that what is done is kept if time runs out. It needs no package
registry: the peers are those that this interpreter finds. `toy` runs the same on tiny models, on
any machine, to try the script.
"""

import subprocess
import sys
import time
from pathlib import Path

from jsonargparse import auto_cli

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "111m": {"width": 768, "depth": 10, "heads": 12},
    "1p3b": {"width": 2048, "depth": 24, "heads": 16},
    "2p7b": {"width": 2560, "depth": 32, "heads": 32},
    "6p7b": {"width": 4096, "depth": 32, "heads": 32},
}
TOY = {"width": 64, "depth": 2, "heads": 2, "sequence_length": 64, "vocab_size": 257}
# (name, model, base, sides, sequences in a forward pass, thousands of tokens a step, rounds): sides
# of one comparison share the device's and the host's memory
COMPARISONS = [
    ("resident-111m", "111m", "resident", ["transformers-compiled"], 16, 128, 5),
    ("resident-1p3b", "1p3b", "resident", [], None, 64, 4),
    ("resident-2p7b", "2p7b", "resident", [], None, 64, 4),
    ("streaming-6p7b-128k", "6p7b", "streaming-ram", ["held-block"], 8, 128, 2),
    ("streaming-6p7b-64k", "6p7b", "streaming-ram", ["held-block"], 8, 64, 2),
    ("streaming-6p7b-32k", "6p7b", "streaming-ram", ["held-block"], 8, 32, 2),
    ("streaming-6p7b-16k", "6p7b", "streaming-ram", ["held-block"], 8, 16, 3),
    ("fsdp-6p7b-128k", "6p7b", "fsdp-offload", [], 2, 128, 1),
    ("streaming-2p7b", "2p7b", "streaming-ram", ["fsdp-offload"], 4, 64, 2),
    ("streaming-disk-1p3b", "1p3b", "streaming-ram", ["streaming-disk"], 8, 64, 2),
]


def main(out: str = "out/gpu", only: list[str] | None = None, toy: bool = False) -> None:
    """Runs what is asked for, and tells what failed at the end.

    Args:
        out: folder of results.jsonl and of a log each
        only: names of what to run: tests, and the comparisons; null: all
        toy: tiny models
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    names = ["tests", *(name for name, *_ in COMPARISONS)]
    if unknown := set(only or ()) - set(names):
        sys.exit(f"error: only: {', '.join(unknown)} is not known; known are {', '.join(names)}")
    python, failed = sys.executable, []
    jobs = {"tests": [python, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")]}
    for name, model, base, sides, rows, thousands, rounds in COMPARISONS:
        shape = TOY if toy else SHAPES[model] | {"sequence_length": 2048}
        tokens = 256 if toy else 1024 * thousands
        keys = {**shape, "tokens": tokens, "rounds": rounds, "base": base, "sides": sides}
        keys |= {"name": name, "out": f"{out}/results.jsonl"}
        keys |= {} if toy or rows is None else {"micro_batch_size": rows}
        flags = [f"--{key}={value}" for key, value in keys.items()]
        jobs[name] = [python, str(ROOT / "bench/compare.py"), *flags]
    for name in only or names:
        begin = time.perf_counter()
        with open(Path(out, f"{name}.log"), "w") as log:
            status = subprocess.run(jobs[name], stdout=log, stderr=log).returncode
        lines = Path(out, f"{name}.log").read_text().splitlines()
        print(f"== {name}: {time.perf_counter() - begin:.0f} s, status {status}")
        print("\n".join(line for line in lines[-16:] if not line.startswith("{")), flush=True)
        failed += [name] if status else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
