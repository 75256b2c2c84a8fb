"""Memory through the command: forecasts, limits, and a depth that takes none."""

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from common.tokens import write_meta
from ops import has_units

STATUS = Path("/proc/self/status")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not STATUS.is_file(), reason="needs Linux's peak of a process"),
]

# VmHWM is of the process alone; what getrusage tells begins with the parent's
TRAIN = """
import atexit, runpy, sys
from pathlib import Path

def tell():
    lines = Path("/proc/self/status").read_text().splitlines()
    print(*(line for line in lines if line.startswith("VmHWM")))

atexit.register(tell)
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""
DISK = {"engine": "streaming", "stream_to": "disk", "activation_checkpointing": True}
ENGINES = (
    {"engine": "resident"},
    {"engine": "streaming", "stream_to": "ram", "activation_checkpointing": False},
    DISK | {"stream_to": "ram"},
    DISK | {"activation_checkpointing": False},
    DISK,
)
GPT2 = {"vocab_size": 50257}
LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "positions": "rotary"}
LLAMA |= {"bias": False, "tied_head": False}
WORK = {"fp32": 6e10, "bf16": 2.5e10}  # FLOPs of a step: CPUs without units for bf16 are slow


def train(folder: Path, **keys: object) -> tuple[float, float, str]:
    """Trains in a process of its own, and returns the megabytes that were planned, those that it
    had at its peak, and what it printed."""
    data = folder / f"data-{keys['vocab_size']}"
    if not data.exists():
        data.mkdir(parents=True)
        tokens = np.random.default_rng(0).integers(0, keys["vocab_size"], 300_000)
        tokens.astype(np.uint16).tofile(data / "train.bin")
        tokens[:9000].astype(np.uint16).tofile(data / "val.bin")
        write_meta(data, {"vocab_size": keys["vocab_size"], "dtype": "uint16"})
    keys |= {"backend": "CPU", "dataset": data, "out_dir": folder / "out", "warmup_steps": 1}
    keys |= {"max_position_embeddings": keys["sequence_length"], "tracker": "null"}
    config = folder / "empty.yaml"
    config.write_text("{}\n")
    command = [sys.executable, "-c", TRAIN, config, *(f"--{k}={v}" for k, v in keys.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number, unit = re.search(r"memory: ([\d.]+) (MB|GB)", done.stdout + done.stderr).groups()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024 / 1e6
    return float(number) * {"MB": 1, "GB": 1000}[unit], peak, done.stdout + done.stderr


def depth_takes(folder: Path, shallow: int, deep: int, width: int) -> float:
    """Returns the megabytes that a block more takes, streamed from disk and recomputed in bf16. If
    the CPU has no units for it, fp32 with half as many tokens, whose inputs are as large."""
    fast = has_units("amx_bf16", "avx512_bf16")
    precision = {"precision": "bf16" if fast else "fp32", "sequence_length": 512 if fast else 256}
    keys = DISK | precision | {"width": width, "heads": width // 64, "vocab_size": 300}
    keys |= {"batch_size": 1, "num_steps": 2, "checkpoint_steps": 9}
    peaks = [train(folder / str(depth), depth=depth, **keys)[1] for depth in (shallow, deep)]
    return (peaks[1] - peaks[0]) / (deep - shallow)


def test_memory_does_not_grow_with_depth(tmp_path):
    """A block of this width left 1.1 MB behind once, beside its inputs of 0.26 MB. With few blocks
    the holes of the heap still grow to their limit."""
    assert depth_takes(tmp_path, 104, 220, 256) < 0.9


def test_memory_of_wide_blocks_does_not_grow_with_depth(tmp_path):
    """A block of this width left 18 MB behind once, beside its inputs of 1 MB; 64 MB of holes."""
    assert depth_takes(tmp_path, 4, 20, 1024) < 1 + 64 / 16


WIDE = GPT2 | {"width": 256, "depth": 6, "sequence_length": 256}
DEEP = LLAMA | {"vocab_size": 300, "width": 64, "depth": 16, "sequence_length": 512}
LIMITS = {  # in MB
    "resident": (1300, WIDE),
    "streaming": (1200, DISK | WIDE),
    "llama": (800, DEEP | {"precision": "bf16", "dropout": 0.1}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_a_limit(tmp_path, name):
    """With as many sequences at a time as fit."""
    limit, keys = LIMITS[name]
    keys = {"precision": "fp32"} | keys | {"memory_limit": f"{limit}MB", "heads": 4}
    keys |= {"batch_size": 32, "num_steps": 2, "eval_steps": 2, "eval_batches": 1}
    planned, peak, output = train(tmp_path, **keys)
    assert peak <= limit, output
    assert planned > 0.7 * limit, output


def shape(number: int) -> dict:
    """Returns a random shape whose step takes at most WORK; the engines take turns."""
    choose = random.Random(number).choice
    precision = choose(list(WORK))
    length = choose((16, 128, 512, 1024, 2048))
    vocab_size = choose((300, 5000, 50257))
    keys = ENGINES[number % len(ENGINES)] | choose(({}, LLAMA))
    keys |= {"precision": precision, "sequence_length": length, "vocab_size": vocab_size}
    keys |= {"dropout": choose((0.0, 0.1))}
    while True:
        width = choose((32, 64, 128, 256))
        depth = choose((1, 2, 4, 8, 16))
        micro_batch_size = choose((1, 2, 4, 16, 64))
        batch_size = micro_batch_size * choose((1, 2, 4))
        weights = width * (12 * width * depth + vocab_size)
        flops = 6 * batch_size * length * (weights + width * depth * length)
        if WORK[precision] / 20 <= flops <= WORK[precision]:
            keys |= {"width": width, "depth": depth, "heads": width // 32}
            return keys | {"micro_batch_size": micro_batch_size, "batch_size": batch_size}


def test_forecasts_hold_for_any_shape(tmp_path, shape_number):
    keys = shape(shape_number) | {"num_steps": 2, "eval_steps": 2, "eval_batches": 1}
    planned, peak, _ = train(tmp_path, **keys)
    assert peak <= 1.15 * planned + 100, keys
