"""What a machine has and how fast it is: this one, measured in a second or two, or a named GPU."""

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
from math import nan
from pathlib import Path

import torch

from common.console import UserError, short
from common.files import replacing
from configuration import Configuration
from engines.heap import memory_now
from planner.measure import block

STATUS = Path("/proc/self/status")  # of Linux
SAMPLE = 32 * 2**20  # bytes that are copied, written and read to measure
CUDA_BYTES = 3 * 2**30  # of host memory that a process with CUDA takes before it holds a model
DRIVE = {"read": 6.9e9, "write": 4.1e9}  # bytes/s of PCIe 4.0 (Samsung PM9A3, data sheet)


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
        """Return the FLOP/s of a precision; tf32 has half of bf16's, as in all data sheets."""
        return {"bf16": self.bf16, "tf32": self.bf16 / 2, "fp32": self.fp32}[precision]


GEN4 = 25e9  # PCIe with 16 lanes
GEN5 = 55e9
C2C = 297e9  # NVLink-C2C between Grace and Hopper, of 450 (Schieffer et al. 2024, arXiv 2407.07850)
# A data sheet's figures with sparsity are twice these. The RTX cards: of the architecture's white
# paper, bf16 with sums in fp32; b200 and b300: an eighth of an HGX board
DEVICES = {
    "b300": Device(2250e12, 75e12, 288e9, 8.0e12, GEN5, 900e9),
    "b200": Device(2250e12, 75e12, 180e9, 8.0e12, GEN5, 900e9),
    "gh200": Device(989e12, 67e12, 96e9, 4.0e12, C2C, 450e9),
    "h200": Device(989e12, 67e12, 141e9, 4.8e12, GEN5, 450e9),
    "h100 pcie": Device(756e12, 51e12, 80e9, 2.0e12, GEN5, GEN5),
    "h100 nvl": Device(835e12, 60e12, 94e9, 3.9e12, GEN5, GEN5),
    "h100": Device(989e12, 67e12, 80e9, 3.35e12, GEN5, 450e9),
    "a100": Device(312e12, 19.5e12, 80e9, 2.0e12, GEN4, 300e9),
    "l40s": Device(362e12, 91.6e12, 48e9, 0.864e12, GEN4, GEN4),
    "l4": Device(121e12, 30.3e12, 24e9, 0.3e12, GEN4, GEN4),
    "a10": Device(125e12, 31.2e12, 24e9, 0.6e12, GEN4, GEN4),
    "a6000": Device(154.8e12, 38.7e12, 48e9, 0.768e12, GEN4, GEN4),
    "rtx pro 6000": Device(503.8e12, 126e12, 96e9, 1.792e12, GEN5, GEN5),
    "rtx 5090": Device(209.5e12, 104.8e12, 32e9, 1.792e12, GEN5, GEN5),
    "rtx 4090": Device(165e12, 82.6e12, 24e9, 1.0e12, GEN4, GEN4),
}
FABRIC = 50e9  # bytes/s each way of a GPU to other machines: an adapter of 400 Gb/s (ConnectX-7)
PER_MACHINE = 8  # GPUs of one machine, as in the vendors' servers
GLOO = 0.4e9  # bytes/s that a process receives from others on a CPU (docs/performance.md)


@dataclass
class Machine:
    """What one of `processes` has of a machine. Sizes in bytes, rates in bytes/s, matmul, the peak
    matrix multiplication throughput, in FLOP/s; a rate that is not known is nan. On a CPU `device`
    and `host` memory are the same; `program` is what the process uses before it holds a model.
    `network` is the rate to processes on the same machine, `fabric` to those on others."""

    name: str
    backend: str
    device: int
    host: int
    disk: int
    program: int = 0
    matmul: float = nan
    bandwidth: float = nan
    link: float = nan
    read: float = nan
    write: float = nan
    network: float = nan
    fabric: float = nan
    processes: int = 1

    @property
    def on_gpu(self) -> bool:
        return self.backend == "GPU"


def this_machine(config: Configuration, processes: int) -> Machine:
    """Measure this process's share of this machine, for a resolved backend and precision."""
    block(config)  # first, as what it imports is part of the program's memory
    disk = free_disk(config)
    if config.backend == "CPU":
        rates = measured_rates(config) | {"network": GLOO, "fabric": GLOO}
        memory = host_memory(config.host_memory)
        return machine_share(config, "this CPU", memory, disk, processes, rates)
    name = torch.cuda.get_device_name(0)
    known = known_device(name)
    rates = measured_rates(config, known)
    rates["network"] = known.network if known else rates["link"]
    rates["fabric"] = FABRIC
    return machine_share(config, name, torch.cuda.mem_get_info()[0], disk, processes, rates)


def named_machine(name: str, config: Configuration) -> Machine:
    """Return a machine with a GPU of DEVICES and a drive like DRIVE; host memory and disk are this
    machine's. The words of the name may be joined by spaces, dashes, underscores or nothing."""
    known = {key.replace(" ", ""): device for key, device in DEVICES.items()}
    device = known.get(re.sub("[ _-]", "", name.lower()))
    if device is None:
        raise UserError(f"device: {name} is not known; known are {', '.join(DEVICES)}")
    processes = min(config.num_systems, PER_MACHINE)
    disk = shutil.disk_usage(store_folder(config)).free
    rates = {rate: getattr(device, rate) for rate in ("bandwidth", "link", "network")}
    rates |= {"matmul": device.matmul(config.precision), "fabric": FABRIC, **DRIVE}
    return machine_share(config, name, device.memory, disk, processes, rates)


def machine_share(
    config: Configuration, name: str, memory: float, disk: int, processes: int, rates: dict
) -> Machine:
    """Return the share of one of `processes`. memory: bytes of a CPU's host or of each GPU."""
    on_gpu = config.backend == "GPU"
    if config.memory_limit is not None:
        memory = parse_bytes(config.memory_limit, "memory_limit")
    if on_gpu or config.memory_limit is not None:
        memory *= 0.95  # the rest is lost to fragments, by a few percent more or less
    device = int(memory) if on_gpu else int(memory) // processes
    host = host_memory(config.host_memory) // processes if on_gpu else device
    program = program_bytes(on_gpu)
    return Machine(name, config.backend, device, host, disk, program, processes=processes, **rates)


def known_device(name: str) -> Device | None:
    """Return the one of DEVICES whose name is part of a GPU's own; those for laptops and with less
    power are others."""
    other = r"(?!.*\b(laptop|max-q|d)\b)"
    for key, device in DEVICES.items():
        if re.search(rf"\b{key}\b{other}", name.lower()):
            return device
    return None


def host_memory(configured: str | None = None) -> int:
    """Return the bytes of the machine or its container, whichever has less, without the system's
    share; or what is configured."""
    if configured is not None:
        return parse_bytes(configured, "host_memory")
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):  # Linux; a line `0::/path` names the group
        group = Path("/proc/self/cgroup").read_text().split("::")[-1].strip()
        folder = Path("/sys/fs/cgroup", group.lstrip("/"))
        for parent in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # it has no limit
                limits.append(int((parent / "memory.max").read_text()))
    return int(0.9 * min(limits))


def program_bytes(gpu: bool) -> int:
    """Return what this process has in memory now, or what CUDA takes with it."""
    return CUDA_BYTES if gpu else memory_now() or peak_resident()


def peak_resident() -> int:
    """Return the peak bytes of this process in memory."""
    if STATUS.is_file():  # where getrusage begins with the peak of the parent
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parse_bytes(text: str, key: str) -> int:
    """Parse '20GB' as 20_000_000_000; raise UserError, which names the key, for what is no size."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT])(i?)B", text)
    if match is None:
        raise UserError(f"{key}: {short(text)} is not a size such as 20GB or 16GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** ("KMGT".index(match[2]) + 1))


def store_folder(config: Configuration) -> Path:
    """Return where the streaming engine's files go, or the nearest folder above that exists."""
    if config.stream_dir is not None:
        if not Path(config.stream_dir).is_dir():
            raise UserError(f"stream_dir: {config.stream_dir} is not a folder; make it first")
        return Path(config.stream_dir).resolve()
    folder = Path(config.out_dir).resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def free_disk(config: Configuration) -> int:
    """Return the bytes that the streaming engine's files may take; 0 where none can be written."""
    folder = store_folder(config)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        if config.stream_dir is None:
            return 0
        reason = f"{folder} can't be written to ({error.strerror})"
        raise UserError(f"stream_dir: {reason}; use another") from None
    return shutil.disk_usage(folder).free


def measured_rates(config: Configuration, known: Device | None = None) -> dict[str, float]:
    """Return rates of this machine, as `Machine` names them, measured now, or by another process in
    this hour; `matmul` of a known GPU as published. For a disk that can't be measured they are
    those of DRIVE, and not kept."""
    folder = store_folder(config)
    disk = os.stat(folder).st_dev
    key = f"{config.backend} {config.precision} {torch.get_num_threads()} {disk}"
    kept = {"hour": time.time() // 3600}
    with suppress(OSError, ValueError, RecursionError, AttributeError):  # it may be damaged
        found = json.loads(rates_file().read_text())
        if found.get("hour") == kept["hour"]:
            kept = found
    if key in kept:
        return kept[key]
    rates = measure_copies(config.backend)
    if known and config.precision != "fp32":
        rates["matmul"] = known.matmul(config.precision)
    else:
        rates["matmul"] = measure_products(config.backend, config.precision)
    try:
        rates |= measure_disk(folder)
    except OSError:
        return rates | DRIVE
    with suppress(OSError, UserError):  # else they are measured again
        rates_file().parent.mkdir(parents=True, exist_ok=True)
        with replacing(rates_file()) as writing:
            writing.write_text(json.dumps(kept | {key: rates}))
    return rates


def rates_file() -> Path:
    """Return where measured rates are kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # a user may have no home
        cache = cache or Path.home() / ".cache"
    return Path(cache or tempfile.gettempdir(), "gigagpt/rates.json")


def measure_products(backend: str, precision: str) -> float:
    """Measure the FLOP/s of a large matrix product."""
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


def measure_copies(backend: str) -> dict[str, float]:
    """Measure the bytes/s that the device's memory reads and writes in a copy, and the bytes/s that
    come from the host."""
    gpu = backend == "GPU"
    host = torch.ones(SAMPLE, dtype=torch.uint8, pin_memory=gpu)
    source = host.to("cuda") if gpu else host
    target = torch.empty_like(source).copy_(source)

    def copy(source: torch.Tensor) -> None:
        target.copy_(source)
        target[0].item()

    bandwidth = 2 * SAMPLE / best_of(lambda: copy(source), 0.1)
    link = SAMPLE / best_of(lambda: copy(host), 0.1) if gpu else bandwidth
    return {"bandwidth": bandwidth, "link": link}


def measure_disk(folder: Path) -> dict[str, float]:
    """Measure the bytes/s read from and written to a file there, past the page cache where that can
    be; raise OSError where a file of SAMPLE bytes can't be written."""
    data = mmap.mmap(-1, SAMPLE)  # direct input and output takes whole pages
    data[:] = os.urandom(SAMPLE // 64) * 64

    def write() -> None:
        if os.pwrite(descriptor, data, 0) < SAMPLE:
            raise OSError(f"{folder} is full")
        os.fsync(descriptor)

    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            descriptor = os.open(file.name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
        except OSError:  # not every file system can
            descriptor = os.open(file.name, os.O_RDWR)
        try:
            writing = best_of(write, 0.2)
            reading = best_of(lambda: os.preadv(descriptor, [data], 0), 0.2)
        finally:
            os.close(descriptor)
    return {"read": SAMPLE / reading, "write": SAMPLE / writing}


def best_of(work: Callable[[], object], seconds: float) -> float:
    """Return the shortest time of `work`, tried for so many seconds, and at least twice."""
    times = []
    while len(times) < 2 or sum(times) < seconds:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
