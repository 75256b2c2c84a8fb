"""What a machine has and how fast it is: this one, measured in a second or two, or a named GPU."""

import errno
import json
import mmap
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from configuration import Configuration
from planner.measure import block
from runtime.console import UserError, short
from runtime.files import replacing

MAX_AGE = 3600  # seconds that measured rates are reused
SAMPLE = 128 * 2**20  # bytes that are copied, written and read to measure
CUDA_BYTES = 3 * 2**30  # of host memory that a process with CUDA takes before it holds a model
DRIVE = (6.9e9, 4.1e9)  # bytes/s read and written by a PCIe 4.0 drive (Samsung PM9A3, data sheet)


@dataclass(frozen=True)
class Device:
    """A GPU by its vendor's data sheet: dense bf16 and fp32 FLOP/s, bytes and bytes/s of its
    memory, bytes/s each way between it and the host, as measured over such a link, and between it
    and the others of its machine."""

    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float

    def matmul(self, precision: str) -> float:
        """FLOP/s; of tf32 half of bf16's, as in all of these data sheets."""
        return {"bf16": self.bf16, "tf32": self.bf16 / 2, "fp32": self.fp32}[precision]


GEN4, GEN5 = 25e9, 55e9  # PCIe with 16 lanes
DEVICES = {
    "h200": Device(989e12, 67e12, 141e9, 4.8e12, GEN5, 450e9),
    "h100 pcie": Device(756e12, 51e12, 80e9, 2.0e12, GEN5, GEN5),
    "h100 nvl": Device(835e12, 60e12, 94e9, 3.9e12, GEN5, GEN5),
    "h100": Device(989e12, 67e12, 80e9, 3.35e12, GEN5, 450e9),
    "a100": Device(312e12, 19.5e12, 80e9, 2.0e12, GEN4, 300e9),
    "l40s": Device(362e12, 91.6e12, 48e9, 0.864e12, GEN4, GEN4),
    "l4": Device(121e12, 30.3e12, 24e9, 0.3e12, GEN4, GEN4),
    "rtx 4090": Device(165e12, 82.6e12, 24e9, 1.0e12, GEN4, GEN4),
}
FABRIC = 50e9  # bytes/s each way of a GPU to other machines: an adapter of 400 Gb/s (ConnectX-7)
PER_MACHINE = 8  # GPUs of one machine, as in the vendors' servers
GLOO = 0.4e9  # bytes/s that a process receives from others on a CPU (docs/performance.md)


@dataclass
class Machine:
    """What one of `processes` has of a machine. Sizes in bytes, rates in bytes/s, matmul, the peak
    matrix multiplication throughput, in FLOP/s. On a CPU `device` and `host` memory are the same;
    `program` is what the process uses before it holds a model. `network` is the rate to processes
    on the same machine, `fabric` to those on others."""

    name: str
    backend: str
    device: int
    host: int
    disk: int
    program: int
    matmul: float
    bandwidth: float
    link: float
    read: float
    write: float
    network: float
    fabric: float
    processes: int

    @property
    def on_gpu(self) -> bool:
        return self.backend == "GPU"


def this_machine(config: Configuration, processes: int) -> Machine:
    """This process's share of this machine; config has its backend and precision resolved."""
    gpu = config.backend == "GPU"
    block(config)  # first, as what it imports is part of the program's memory
    host = host_memory(config) // processes
    device = int(0.95 * torch.cuda.mem_get_info()[0]) if gpu else host  # less what fragments
    if config.memory_limit is not None:
        device = parse_bytes(config.memory_limit, "memory_limit")
        if not gpu:  # where it is the machine's
            host = device = device // processes
    folder = store_folder(config)
    disk = shutil.disk_usage(folder).free
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        if config.stream_dir is not None:
            reason = f"{folder} can't be written to ({error.strerror})"
            raise UserError(f"stream_dir: {reason}; use another") from None
        disk = 0
    rates = measured_rates(config.backend, config.precision, folder)
    name = torch.cuda.get_device_name(0) if gpu else "this CPU"
    known = known_device(name)
    return Machine(
        name=name,
        backend=config.backend,
        device=device,
        host=host,
        disk=disk,
        program=program_bytes(gpu),
        network=known.network if known else rates["link"] if gpu else GLOO,
        fabric=FABRIC if gpu else GLOO,
        processes=processes,
        **rates,
    )


def known_device(name: str) -> Device | None:
    """The one of DEVICES whose name is part of a GPU's own."""
    found = (d for key, d in DEVICES.items() if re.search(rf"\b{key}\b", name.lower()))
    return next(found, None)


def named_machine(name: str, config: Configuration) -> Machine:
    """A machine with a GPU of DEVICES, by its name with spaces, dashes, underscores or nothing
    between the words, and a drive like DRIVE; host memory and disk are this machine's."""
    known = {key.replace(" ", ""): device for key, device in DEVICES.items()}
    device = known.get(re.sub("[ _-]", "", name.lower()))
    if device is None:
        raise UserError(f"device: {name} is not known; known are {', '.join(DEVICES)}")
    memory, processes = config.memory_limit, min(config.num_systems, PER_MACHINE)
    return Machine(
        name=name,
        backend="GPU",
        device=parse_bytes(memory, "memory_limit") if memory else int(0.95 * device.memory),
        host=host_memory(config) // processes,
        disk=shutil.disk_usage(store_folder(config)).free,
        program=CUDA_BYTES,
        matmul=device.matmul(config.precision),
        bandwidth=device.bandwidth,
        link=device.link,
        read=DRIVE[0],
        write=DRIVE[1],
        network=device.network,
        fabric=FABRIC,
        processes=processes,
    )


def host_memory(config: Configuration | None = None) -> int:
    """Bytes of the machine or its container, whichever has less, without the system's share; or
    what is configured."""
    if config is not None and config.host_memory is not None:
        return parse_bytes(config.host_memory, "host_memory")
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if Path("/proc/self/cgroup").is_file():  # Linux; a line `0::/path` names the group
        group = Path("/proc/self/cgroup").read_text().split("::")[-1].strip()
        folder = Path("/sys/fs/cgroup", group.lstrip("/"))
        for path in (parent / "memory.max" for parent in (folder, *folder.parents)):
            if path.is_file() and path.read_text().strip().isdigit():
                limits.append(int(path.read_text()))
    return int(0.9 * min(limits))


def program_bytes(gpu: bool) -> int:
    """What this process has in memory now, or what CUDA takes with it."""
    if gpu:
        return CUDA_BYTES
    if Path("/proc/self/statm").is_file():
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        return resident * os.sysconf("SC_PAGE_SIZE")
    return peak_resident()


def peak_resident() -> int:
    """Peak bytes of this process in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parse_bytes(text: str, key: str) -> int:
    """'20GB' -> 20_000_000_000; raises UserError, which names the key, for what is not a size."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT])(i?)B", text)
    if match is None:
        raise UserError(f"{key}: {short(text)} is not a size such as 20GB or 16GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** ("KMGT".index(match[2]) + 1))


def store_folder(config: Configuration) -> Path:
    """Where the streaming engine's files go, or the nearest folder above that exists."""
    if config.stream_dir is not None:
        if not Path(config.stream_dir).is_dir():
            raise UserError(f"stream_dir: {config.stream_dir} is not a folder; make it first")
        return Path(config.stream_dir).resolve()
    folder = Path(config.out_dir).resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def measured_rates(backend: str, precision: str, folder: Path) -> dict[str, float]:
    """Rates of this machine, as `Machine` names them; for a disk on which none can be measured
    those of DRIVE."""
    key = f"{backend} {precision} {torch.get_num_threads()}"
    rates = remembered(
        key,
        ("matmul", "bandwidth", "link"),
        lambda: (peak_flops(backend, precision), *measure_copies(backend)),
    )
    key, disk = f"disk {os.stat(folder).st_dev}", dict(zip(("read", "write"), DRIVE, strict=True))
    with suppress(OSError):
        disk = remembered(key, tuple(disk), lambda: measure_disk(folder))
    return rates | disk


def remembered(
    key: str, names: tuple[str, ...], measure: Callable[[], tuple[float, ...]]
) -> dict[str, float]:
    """What `measure` returns, by name, now or up to MAX_AGE ago in another process. An error that
    it raises is not kept."""
    path, known = rates_file(), {}
    with suppress(OSError, ValueError, TypeError, RecursionError):
        known = dict(json.loads(path.read_text()))
    with suppress(LookupError, ValueError, TypeError, OverflowError):
        rates = {name: float(known[key]["rates"][name]) for name in names}
        if (
            all(0 < r < inf for r in rates.values())
            and abs(time.time() - known[key]["time"]) < MAX_AGE
        ):
            return rates
    rates = dict(zip(names, measure(), strict=True))
    with suppress(OSError, UserError):  # else it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as writing:
            writing.write_text(json.dumps(known | {key: {"time": time.time(), "rates": rates}}))
    return rates


def rates_file() -> Path:
    """Where measured rates are kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # a user may have no home
        cache = cache or Path.home() / ".cache"
    return Path(cache or tempfile.gettempdir(), "gigagpt/rates.json")


def peak_flops(backend: str, precision: str) -> float:
    """FLOP/s of matrix matmul: the published peak of a known GPU, else measured here, now."""
    known = known_device(torch.cuda.get_device_name(0)) if backend == "GPU" else None
    if known is not None and precision != "fp32":
        return known.matmul(precision)
    return measure_products(backend, precision)


def measure_products(backend: str, precision: str) -> float:
    """FLOP/s of a large matrix product, now."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    device = "cuda" if backend == "GPU" else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if backend == "GPU" else 1024
    a = torch.randn(size, size, device=device).to(dtype)  # zeros and ones take less power

    def rate(b: torch.Tensor) -> float:
        seconds = best_of(lambda: (a @ b)[0, 0].item(), 0.2)  # item() waits for the device
        return 2 * a.numel() * b.shape[1] / seconds

    # the second as a linear layer has it: four times as wide, its weight transposed
    return max(rate(a), rate(torch.randn(4 * size, size, device=device).to(dtype).T))


def measure_copies(backend: str) -> tuple[float, float]:
    """bytes/s that the device's memory reads and writes in a copy, and that come from the host."""
    gpu = backend == "GPU"
    host = torch.ones(SAMPLE, dtype=torch.uint8, pin_memory=gpu)
    source = host.to("cuda") if gpu else host
    target = torch.empty_like(source).copy_(source)

    def copy(source: torch.Tensor) -> None:
        target.copy_(source)
        target[0].item()

    bandwidth = 2 * SAMPLE / best_of(lambda: copy(source), 0.1)
    return bandwidth, SAMPLE / best_of(lambda: copy(host), 0.1) if gpu else bandwidth


def measure_disk(folder: Path) -> tuple[float, float]:
    """bytes/s read from and written to a file there, past the page cache where that can be; OSError
    where a file of SAMPLE bytes can't be written."""
    data = mmap.mmap(-1, SAMPLE)  # direct input and output takes whole pages
    data[:] = os.urandom(SAMPLE // 64) * 64

    def write() -> None:
        if os.pwrite(descriptor, data, 0) < SAMPLE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)

    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            descriptor = os.open(file.name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
        except OSError:
            descriptor = os.open(file.name, os.O_RDWR)
        try:
            writing = best_of(write, 0.2)
            reading = best_of(lambda: os.preadv(descriptor, [data], 0), 0.2)
        finally:
            os.close(descriptor)
    return SAMPLE / reading, SAMPLE / writing


def best_of(work: Callable[[], object], seconds: float) -> float:
    """The shortest time that `work` took, tried for so long, and at least twice."""
    times = []
    while len(times) < 2 or sum(times) < seconds:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
