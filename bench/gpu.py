"""What a GPU shows in half an hour: python bench/gpu.py run --stage a (then b, c and d; null: all)

Each part of a stage is a process of its own with a time limit, needs no other part and ends with
this one. All that is said goes to `out`/log, results to `out`/results.jsonl as lines of JSON, as
they come, and a profile of a streamed step to `out`/trace.json.gz. docs/gpu.md says what a machine
without a package registry needs. `toy` runs the same on tiny models, on any machine, to try the
script.
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
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import RandomBatches, end_with_parent

from configuration import Configuration
from engines import open_engine
from engines.base import Engine
from engines.buffers import Array, pin
from engines.store import GRADIENT, DiskStore
from ops import aligned_linear
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
SWEEP = (64, 32, 16, 8)  # sequences of 2,048 tokens a step
PROFILED = 32
MICRO_BATCH = 16  # sequences, of the sweep and of the block that is held


def compared(model: str, base: str, thousands: int, **more: object) -> list:
    """The flags of bench/compare.py, for tokens a step in thousands."""
    keys = {**SHAPES[model], "sequence_length": 2048, "tokens": 1024 * thousands, "sides": []}
    return ["bench/compare.py", {**keys, "base": base, "rounds": 1, **more}]


TESTS = ["-m", "pytest", "-q", "tests/test_gpu.py"]
if find_spec("xdist"):
    TESTS += ["-n", str(min(8, os.cpu_count()))]
# name -> (seconds at most, what Python runs: words, and flags or none); in a stage nine minutes, a
# minute less than a call to a machine that is lent may take
STAGES = {
    "a": {
        "device": (90, ["bench/gpu.py", "device"]),
        "tests": (240, TESTS),
        "resident-1p3b": (90, compared("1p3b", "resident", 64, steps=3)),
        "streaming-2p7b": (120, compared("2p7b", "streaming-ram", 64, micro_batch_size=8)),
    },
    "b": {
        "sweep": (450, ["bench/gpu.py", "sweep"]),
        "held-block": (90, compared("6p7b", "held-block", 64, micro_batch_size=MICRO_BATCH)),
    },
    "c": {
        "resident-111m": (110, compared("111m", "resident", 128, sides=["transformers-compiled"])),
        "resident-2p7b": (70, compared("2p7b", "resident", 64, micro_batch_size=8)),
        "fsdp-2p7b": (
            140,
            compared("2p7b", "streaming-ram", 64, sides=["fsdp-offload"], micro_batch_size=8),
        ),
        "resident-6p7b": (100, compared("6p7b", "resident", 64, micro_batch_size=1)),
        "disk-1p3b": (120, compared("1p3b", "streaming-disk", 64, steps=1)),
    },
    "d": {
        "fsdp-6p7b": (300, compared("6p7b", "fsdp-offload", 128, micro_batch_size=4, steps=1)),
    },
}


def run(
    stage: str | None = None,
    out: str = "out/gpu",
    toy: bool = False,
    host_memory: str | None = None,
    memory_limit: str | None = None,
    activation_checkpointing: bool | Literal["auto"] = "auto",
) -> None:
    """Runs the parts of a stage, or of all, and tells at the end what failed.

    Args:
        stage: a, b, c or d
        out: a folder
        toy: tiny models
        host_memory: as in train.py
        memory_limit: as in train.py
        activation_checkpointing: as in train.py; auto: the sweep recomputes
    """
    if stage is not None and stage not in STAGES:
        sys.exit(f"error: stage: {stage} is not known; known are {', '.join(STAGES)}")
    folder = Path(out).resolve()  # the parts run elsewhere
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"host_memory": host_memory, "memory_limit": memory_limit}
    settings["activation_checkpointing"] = activation_checkpointing
    failed = []
    for name in [stage] if stage else STAGES:
        for part, (limit, words) in STAGES[name].items():
            totals, begin = [memory_total()], time.perf_counter()
            words = command(part, words, folder, toy, settings)
            status = limited(words, limit, folder / "log")
            seconds = time.perf_counter() - begin
            totals.append(memory_total())
            append(folder, name="part", part=part, status=status, seconds=seconds, totals=totals)
            said = (folder / "log").read_text(errors="replace").splitlines()[-12:]
            memory = " and ".join(f"{total / 1e9:.1f} GB" for total in totals)
            print(f"== {part}: {seconds:.0f} s, {status}; MemTotal before and after: {memory}")
            print("\n".join(line for line in said if not line.startswith("{")), flush=True)
            failed += [] if status == "ended well" else [part]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def memory_total() -> int:
    """Bytes of memory that the system has now; virtual machines may get more as they use it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def command(part: str, words: list, folder: Path, toy: bool, settings: dict) -> list[str]:
    """What runs a part."""
    script, *rest = words
    keys = {}
    if script == "bench/gpu.py":
        keys = {"out": str(folder), "toy": toy}
        keys |= settings if rest == ["sweep"] else {}
    elif script == "bench/compare.py":
        keys = {**rest.pop(), "name": part, "out": str(folder / "results.jsonl"), **settings}
        keys |= {**TOY, "tokens": 256, "micro_batch_size": None} if toy else {}
    flags = [f"--{key}={json.dumps(value).strip(chr(34))}" for key, value in keys.items()]
    return [sys.executable, script, *rest, *flags]


def limited(words: list[str], seconds: float, log: Path) -> str:
    """Runs a command and appends what it says to the log; all its processes end at the limit."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = os.pathsep.join(os.path.abspath(path) for path in paths if path)
    with open(log, "a") as file:
        print(f"\n== {' '.join(words[1:])}", file=file, flush=True)
        process = subprocess.Popen(
            words,
            stdout=file,
            stderr=file,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            process_group=0,
            preexec_fn=end_with_parent,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped at its limit of {seconds} s"
    return "ended well" if status == 0 else f"status {status}"


def append(folder: str | Path, **result: object) -> None:
    """Appends a result to the folder's results."""
    with open(Path(folder, "results.jsonl"), "a") as file:
        file.write(f"{json.dumps(result)}\n")


def tell(out: str, **result: object) -> None:
    """Appends a result, and prints it."""
    append(out, **result)
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
        host_memory=memory_total(),
    )
    tell(out, name="products", flops=measure_products("GPU" if ON_GPU else "CPU", "bf16"))
    tell(out, name="copies", **copy_rates(2**20 if toy else 2**28))
    tell(out, name="head", **head_seconds(*((64, 64, 257) if toy else (8192, 4096, 50257))))
    tell(out, name="disk", **disk_rates(Path(out), 2**16 if toy else 2**26))
    tell(out, name="pinning", **pinned(*((2**20, 4) if toy else (2**30, 12))))


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


def pinned(numbers: int, most: int) -> dict[str, object]:
    """Pins arrays one after the other: bytes/s, and the system's memory after each. Memory that is
    pinned twice is refused, and the next kernel must run."""
    arrays, totals, begin = [], [], time.perf_counter()
    while len(arrays) < most and time.perf_counter() - begin < 30:
        arrays.append(Array(numbers, pinned=ON_GPU))
        arrays[-1].tensor.zero_()  # where nothing pins it, this allocates it
        totals.append(memory_total())
    rate = 4 * numbers * len(arrays) / (time.perf_counter() - begin)
    refused = ON_GPU and not pin(arrays[0].tensor)
    works = torch.ones(8, device=DEVICE).sum().item() == 8
    for array in arrays:
        array.unpin()
    return {"rate": rate, "totals": totals, "refused": refused, "works": works}


def sweep(
    out: str,
    toy: bool = False,
    host_memory: str | None = None,
    memory_limit: str | None = None,
    activation_checkpointing: bool | Literal["auto"] = "auto",
) -> None:
    """A model of 6.7B parameters streamed from host memory, with fewer and fewer tokens a step; the
    memory is pinned and the weights are drawn once."""
    sizes = [4, 2, 1] if toy else SWEEP
    shape = TOY if toy else SHAPES["6p7b"] | {"sequence_length": 2048}
    # another size is compiled for itself, as in a run of its own
    torch._dynamo.config.automatic_dynamic_shapes = False
    keys = {"engine": "streaming", "stream_to": "ram", "host_memory": host_memory}
    keys |= {"memory_limit": memory_limit, "micro_batch_size": min(MICRO_BATCH, sizes[0])}
    keys["activation_checkpointing"] = activation_checkpointing is not False
    with TemporaryDirectory() as folder:
        planned = resolve(Configuration(**shape, **keys, batch_size=sizes[0], out_dir=folder), {})
        print(describe(planned), flush=True)
        begin = time.perf_counter()
        engine = open_engine(planned.config, blocks_on_device=planned.blocks_on_device)
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
    forecast = make_plan(config, planned.machine, blocks=planned.blocks_on_device)
    tokens = size * config.sequence_length
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
    """The trace of what runs on the device in a step, and for how much of it each stream was
    busy."""
    trace = Path(out, "trace.json.gz")
    kind = ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
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
