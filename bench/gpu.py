"""What a GPU shows in half an hour: python bench/gpu.py run --stage a (then b, then c; null: all)

Each part of a stage is a process of its own with a time limit, and needs no other part. All that is
said goes to `out`/log, results to `out`/results.jsonl as lines of JSON, as they come, and a profile
of a streamed step to `out`/trace.json.gz. docs/gpu.md says what a machine without a package
registry needs. `toy` runs the same on tiny models, on any machine, to try the script.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import auto_cli
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import RandomBatches

from configuration import Configuration
from engines import open_engine
from engines.base import Engine
from engines.buffers import Array
from engines.store import GRADIENT, DiskStore
from loss import aligned_linear
from planner.costs import Plan, flops_per_token, make_plan
from planner.machine import best_of, measure_products
from planner.report import describe
from planner.resolve import resolve

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES = {
    "111m": {"width": 768, "depth": 10, "heads": 12},
    "1p3b": {"width": 2048, "depth": 24, "heads": 16},
    "2p7b": {"width": 2560, "depth": 32, "heads": 32},
    "6p7b": {"width": 4096, "depth": 32, "heads": 32},
}
TOY = {"width": 64, "depth": 2, "heads": 2, "sequence_length": 64, "vocab_size": 257}
TOY |= {"max_position_embeddings": 64}
SWEEP = (64, 32, 16, 8)  # sequences of 2,048 tokens a step
PROFILED = 32


def compared(model: str, base: str, sides: list[str], thousands: int, rounds: int, **more) -> list:
    """The flags of bench/compare.py, for tokens a step in thousands."""
    keys = {**SHAPES[model], "sequence_length": 2048, "tokens": 1024 * thousands, **more}
    return ["bench/compare.py", {**keys, "base": base, "sides": sides, "rounds": rounds}]


# name -> (seconds at most, what Python runs: words, and flags or none)
STAGES = {
    "a": {
        "device": (60, ["bench/gpu.py", "device"]),
        "tests": (300, ["-m", "pytest", "-q", "-m", "gpu", "tests"]),
        "resident-111m": (80, compared("111m", "resident", ["transformers-compiled"], 128, 4)),
        "resident-1p3b": (60, compared("1p3b", "resident", [], 64, 3)),
        "resident-2p7b": (60, compared("2p7b", "resident", [], 64, 3)),
    },
    "b": {
        "sweep": (520, ["bench/gpu.py", "sweep"]),
        "held-block": (70, compared("6p7b", "held-block", [], 32, 2)),
    },
    "c": {
        "streaming-2p7b": (150, compared("2p7b", "streaming-ram", ["fsdp-offload"], 64, 2)),
        "disk-1p3b": (100, compared("1p3b", "streaming-ram", ["streaming-disk"], 64, 2)),
        "fsdp-6p7b": (
            170,
            compared("6p7b", "fsdp-offload", [], 128, 1, micro_batch_size=8),
        ),
    },
}


def run(stage: str | None = None, out: str = "out/gpu", toy: bool = False) -> None:
    """Runs the parts of a stage, or of all, and tells at the end what failed.

    Args:
        stage: a, b or c
        out: a folder
        toy: tiny models
    """
    if stage is not None and stage not in STAGES:
        sys.exit(f"error: stage: {stage} is not known; known are {', '.join(STAGES)}")
    Path(out).mkdir(parents=True, exist_ok=True)
    failed = []
    for name in [stage] if stage else STAGES:
        for part, (limit, words) in STAGES[name].items():
            begin = time.perf_counter()
            status = limited(command(part, words, out, toy), limit, Path(out, "log"))
            said = Path(out, "log").read_text(errors="replace").splitlines()[-12:]
            print(f"== {part}: {time.perf_counter() - begin:.0f} s, {status}")
            print("\n".join(line for line in said if not line.startswith("{")), flush=True)
            failed += [] if status == "ended well" else [part]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def command(part: str, words: list, out: str, toy: bool) -> list[str]:
    """What runs a part."""
    command, keys = [sys.executable], {}
    for word in words:
        if isinstance(word, dict):
            keys = word | {"name": part, "out": f"{out}/results.jsonl"}
            keys |= {k: TOY[k] for k in ("width", "depth", "heads", "vocab_size")} if toy else {}
            keys |= {"sequence_length": 64, "tokens": 256, "micro_batch_size": None} if toy else {}
        else:
            command.append(word)
    if words[0] == "bench/gpu.py":
        keys = {"out": out, "toy": toy}
    return command + [f"--{key}={json.dumps(value).strip(chr(34))}" for key, value in keys.items()]


def limited(command: list[str], seconds: float, log: Path) -> str:
    """Runs a command and appends what it says to the log; all its processes end at the limit."""
    with open(log, "a") as file:
        print(f"\n== {' '.join(command[1:])}", file=file, flush=True)
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped at its limit of {seconds} s"
    return "ended well" if status == 0 else f"status {status}"


def tell(out: str, **result: object) -> None:
    """Appends a result."""
    with open(Path(out, "results.jsonl"), "a") as file:
        file.write(f"{json.dumps(result)}\n")
    print(json.dumps(result, indent=1), flush=True)


def device(out: str, toy: bool = False) -> None:
    """What the machine is and how fast its parts are."""
    properties = torch.cuda.get_device_properties(0) if ON_GPU else None
    tell(
        out,
        name="device",
        torch=torch.__version__,
        device=properties.name if ON_GPU else "CPU",
        memory=properties.total_memory if ON_GPU else 0,
        cudnn=torch.backends.cudnn.version(),
        processors=os.cpu_count(),
        host_memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    tell(out, name="products", flops=measure_products("GPU" if ON_GPU else "CPU", "bf16"))
    tell(out, name="copies", **copy_rates(2**20 if toy else 2**28))
    tell(out, name="head", **head_seconds(*((64, 64, 257) if toy else (8192, 4096, 50257))))
    tell(out, name="disk", **disk_rates(Path(out), 2**16 if toy else 2**26))


def copy_rates(numbers: int) -> dict[str, float]:
    """bytes/s of copies between pinned host memory and the device, alone and both ways at once."""
    streams = torch.get_device_module(DEVICE)
    arrays = [Array(numbers, pinned=ON_GPU) for _ in range(2)]
    assert all(array.pinned for array in arrays) or not ON_GPU
    there = [torch.zeros(numbers, device=DEVICE) for _ in range(2)]
    lanes = [streams.Stream(), streams.Stream()]

    def copy(*ways: int) -> None:
        for way in ways:
            pair = [there[way], arrays[way].tensor]
            with streams.stream(lanes[way]):
                pair[way].copy_(pair[1 - way], non_blocking=True)
        streams.synchronize()

    ways = {"to_device": (0,), "to_host": (1,), "both": (0, 1)}
    rates = {name: 4 * numbers / best_of(lambda: copy(*way), 0.5) for name, way in ways.items()}  # noqa: B023
    for array in arrays:
        array.unpin()
    return rates


def head_seconds(rows: int, width: int, columns: int) -> dict[str, float]:
    """Logits and both of their gradients, with rows as they come and aligned ones."""
    x, weight = (
        torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for n in (rows, columns)
    )

    def products(linear) -> None:
        logits = linear(x, weight)
        torch.autograd.grad(logits, (x, weight), logits.detach())[0][0, 0].item()

    linears = {"plain": torch.nn.functional.linear, "aligned": aligned_linear}
    return {name: best_of(lambda: products(f), 0.5) for name, f in linears.items()}  # noqa: B023


def disk_rates(folder: Path, numbers: int) -> dict[str, float]:
    """bytes/s of the disk store with pinned memory; what was written is read again."""
    store = DiskStore({"layer": numbers}, 4, ON_GPU, folder)
    expected, seconds = torch.rand(numbers), []
    for write in (True, False):
        begin = time.perf_counter()
        for index, (first, end) in enumerate(store.spans("layer")):
            if write:
                chunk = store.buffer("layer", index, GRADIENT)
                chunk.data[0] = expected[first:end]
            else:
                chunk = store.read("layer", index, GRADIENT).result()
                assert torch.equal(chunk.data[0], expected[first:end])
            none = torch.get_device_module(DEVICE).Event()
            store.give_back(chunk, none, write=slice(0, 1) if write else None)
        store.wait("layer")
        seconds.append(time.perf_counter() - begin)
    store.close()
    return {"write": 4 * numbers / seconds[0], "read": 4 * numbers / seconds[1]}


def sweep(out: str, toy: bool = False) -> None:
    """A model of 6.7B parameters streamed from host memory, with fewer and fewer tokens a step; the
    memory is pinned and the weights are drawn once."""
    sizes = [4, 2, 1] if toy else SWEEP
    shape = TOY if toy else SHAPES["6p7b"] | {"sequence_length": 2048}
    keys = {"engine": "streaming", "stream_to": "ram", "activation_checkpointing": True}
    with TemporaryDirectory() as folder:
        planned = resolve(Configuration(**shape, **keys, batch_size=sizes[0], out_dir=folder), {})
        print(describe(planned), flush=True)
        begin = time.perf_counter()
        engine = open_engine(planned.config)
        engine.initialize()
        tell(out, name="begin", seconds=time.perf_counter() - begin)
        for size in sizes:
            streamed(engine, planned, size, out)
            if size == (2 if toy else PROFILED):
                profiled(engine, size, out)
        engine.close()


def with_sequences(config: Configuration, size: int) -> Configuration:
    """The same with so many sequences a step."""
    micro_batch = min(size, config.micro_batch_size)
    return replace(config, batch_size=size, stream_batch_size=size, micro_batch_size=micro_batch)


def streamed(engine: Engine, planned: Plan, size: int, out: str) -> None:
    """Steps of so many sequences, beside what the planner says."""
    config = with_sequences(engine.config, size)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    steps = engine.run(RandomBatches(config), 0, 3, lambda fraction: None)
    seconds = [stats.seconds for stats in steps]
    forecast, tokens = make_plan(config, planned.machine), size * config.sequence_length
    tell(
        out,
        name="sweep",
        tokens=tokens,
        seconds=seconds,
        planned_seconds=forecast.seconds,
        flops=flops_per_token(config) * tokens / min(seconds[1:]),
        bytes=torch.cuda.max_memory_allocated() if ON_GPU else 0,
        planned_bytes=forecast.bytes["device"],
    )


def profiled(engine: Engine, size: int, out: str) -> None:
    """The trace of a step, and for how much of it each stream was busy."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    trace = Path(out, "trace.json.gz")
    with profile(activities=kinds) as profiler:
        batches = RandomBatches(with_sequences(engine.config, size))
        list(engine.run(batches, 0, 1, lambda fraction: None))
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace) as file:
        events = [e for e in json.load(file)["traceEvents"] if "dur" in e]
    on_device = [e for e in events if "stream" in e.get("args", {})]
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    busy = defaultdict(float)
    for event in on_device:
        busy[str(event["args"]["stream"])] += event["dur"] / span
    tell(out, name="overlap", tokens=size * engine.config.sequence_length, busy=busy)


if __name__ == "__main__":
    auto_cli({"run": run, "device": device, "sweep": sweep}, as_positional=False)
