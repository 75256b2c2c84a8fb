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
    kills = [train(config, folders[0], None), train(config, folders[1], seconds, seed)]
    same = figures(folders[0]) == figures(folders[1]) and sums(folders[0]) == sums(folders[1])
    print(f"losses, evaluations and weights are {'equal bit for bit' if same else 'NOT equal'}")
    if record is not None:
        runs = [
            {"run": out.name, "losses": [r["loss"] for r in records(out)], "kills": steps}
            for out, steps in zip(folders, kills, strict=True)
        ]
        record.write_text("".join(f"{json.dumps(run)}\n" for run in runs))
    return not same


def train(config: str, out: Path, seconds: float | None, seed: int = 0) -> list[int]:
    """Starts it again until it is through; the steps at which it was killed."""
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, ROOT / "train.py", config, "--out_dir", out, *FLAGS]
    source = random.Random(seed)
    kills = []
    began = time.monotonic()
    done = None
    while done is None:
        limit = seconds and source.uniform(0, 2 * seconds)
        try:  # a run that lasts longer is killed
            done = subprocess.run(words, timeout=limit, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            found = list(read_records(out / "metrics.jsonl"))
            kills.append(found[-1]["step"] if found else 0)
            seconds *= 1.05 if kills[-2:-1] == kills[-1:] else 1  # it may start slowly here
        saved = f"checkpoints of steps {list(find_checkpoints(out))}"
        print(f"{out}: {time.monotonic() - began:.0f} s, {len(kills)} kills, {saved}")
    if done.returncode and "nothing is left to train" not in done.stderr:  # killed after its end
        sys.exit(done.stderr)
    return kills


def sums(out: Path) -> dict[str, str]:
    """The checksums of the files of the newest checkpoint, which must be right."""
    found = find_checkpoints(out)
    checkpoint = Checkpoint(found[max(found)])
    checkpoint.verify(0, 1)
    return {name: entry["sha256"] for name, entry in checkpoint.files.items()}


if __name__ == "__main__":
    sys.exit(auto_cli(killed))
