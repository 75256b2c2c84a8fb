"""Trains twice, undisturbed and killed every few seconds until it is done, and says whether the
losses, evaluations and weights are the same.

    python tests/killed.py [--config configs/demo.yaml] [--seconds 5] [--record FILE]
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from conftest import ROOT, figures, records
from jsonargparse import auto_cli

from runtime.metrics import read_records
from weights.checkpoint import Checkpoint, find_checkpoints

FLAGS = ["--checkpoint_path", "latest", "--checkpoint_steps", "20", "--keep_checkpoints", "2"]
FLAGS += ["--engine", "resident", "--micro_batch_size", "16"]  # what auto takes can change


def killed(
    config: str = "configs/demo.yaml",
    seconds: float = 5,
    seed: int = 0,
    record: Path | None = None,
) -> int:
    """Train twice and compare; status 1 if a number or a weight differs.

    Args:
        config: what to train; its runs are out/undisturbed and out/killed
        seconds: between two kills, in the mean
        seed: of the moments of the kills
        record: a file for the losses of both runs and the steps of the kills
    """
    folders = [Path("out/undisturbed"), Path("out/killed")]
    source, kills = random.Random(seed), [[], []]
    for number, out in enumerate(folders):
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        while not train(config, out, source.uniform(0, 2 * seconds) if number else None):
            kills[number].append(last_step(out))
            count = len(kills[number])
            print(f"{out}: {time.monotonic() - began:.0f} s, kill {count}, {reached(out)}")
        count = len(kills[number])
        print(f"{out}: {time.monotonic() - began:.0f} s, {count} kills, {reached(out)}")
    same = figures(folders[0]) == figures(folders[1]) and sums(folders[0]) == sums(folders[1])
    print(f"losses, evaluations and weights are {'equal bit for bit' if same else 'NOT equal'}")
    if record is not None:
        runs = [
            {"run": out.name, "losses": [r["loss"] for r in records(out)], "kills": steps}
            for out, steps in zip(folders, kills, strict=True)
        ]
        record.write_text("".join(f"{json.dumps(run)}\n" for run in runs))
    return not same


def train(config: str, out: Path, seconds: float | None) -> bool:
    """Whether it came to its end before it was killed."""
    words = [sys.executable, ROOT / "train.py", config, "--out_dir", out, *FLAGS]
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        run.kill()
        run.communicate()
        return False
    if run.returncode and "nothing is left to train" not in errors:  # killed after its end
        sys.exit(errors)
    return True


def last_step(out: Path) -> int:
    """Of metrics.jsonl, 0 before the first."""
    found = list(read_records(out / "metrics.jsonl"))
    return found[-1]["step"] if found else 0


def reached(out: Path) -> str:
    return f"checkpoints of steps {list(find_checkpoints(out))}"


def sums(out: Path) -> dict[str, str]:
    """The checksums of the files of the newest checkpoint, which must be right."""
    found = find_checkpoints(out)
    checkpoint = Checkpoint(found[max(found)])
    checkpoint.verify(0, 1)
    return {name: entry["sha256"] for name, entry in checkpoint.files.items()}


if __name__ == "__main__":
    sys.exit(auto_cli(killed))
