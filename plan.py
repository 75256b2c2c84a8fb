"""Arithmetic over a configuration and a machine: what fits, and how a run is cut."""

import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from configuration import Configuration, parse_bytes
from errors import UserError
from model import count_parameters

MOST_TOKENS = {"CPU": 4096, "GPU": 32768}  # in a micro-batch: more is no faster

# Dense bf16 tensor-core peaks in FLOP/s, from the vendor's data sheets.
PUBLISHED_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


def resolve(
    config: Configuration, chosen: dict | None = None, training: bool = True
) -> Configuration:
    """Replaces every `auto` and the open micro-batch.

    `chosen` holds what an earlier part of the run chose, which is kept. Raises UserError for what
    this machine doesn't have, what is not built yet, and what does not fit.
    """
    backend = config.backend
    if backend == "auto":
        backend = "GPU" if torch.cuda.is_available() else "CPU"
    if backend == "CSX":
        raise UserError("backend: CSX is not there yet; take CPU or GPU")
    if backend == "GPU" and not torch.cuda.is_available():
        raise UserError("backend: GPU was asked for and there is none; take --backend CPU")
    if config.num_systems > 1:
        raise UserError(f"num_systems: {config.num_systems} is not there yet; take 1")
    if config.engine not in ("auto", "resident"):
        raise UserError(f"engine: {config.engine} is not there yet; take resident")

    precision = config.precision
    if precision == "auto":
        precision = (chosen or {}).get("precision") or faster_precision(config, backend)
    config = replace(config, backend=backend, engine="resident", precision=precision)
    micro_batch_size = config.micro_batch_size or (chosen or {}).get("micro_batch_size")
    micro_batch_size = micro_batch_size or largest_micro_batch(config, training)
    return replace(config, micro_batch_size=min(micro_batch_size, config.batch_size))


def faster_precision(config: Configuration, backend: str) -> str:
    """bf16 where the machine multiplies it in hardware; on a CPU for wide models alone, as narrow
    ones were faster in fp32 (docs/log.md)."""
    if backend == "GPU":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if config.width >= 512 and torch.cpu._is_amx_tile_supported() else "fp32"


def largest_micro_batch(config: Configuration, training: bool) -> int:
    """As many sequences as memory holds, up to the point where more is no faster."""
    limit = memory_limit(config)
    fixed = state_bytes(config, training) + head_bytes(config)
    sequence = activation_bytes(config)
    if fixed + sequence > limit:
        raise UserError(
            f"this model does not fit: {count_parameters(config):,} parameters need "
            f"{(fixed + sequence) / 1e9:,.1f} GB with their gradients, optimizer and one sequence, "
            f"and there are {limit / 1e9:,.1f} GB; take a smaller configuration or a larger machine"
        )
    most = max(1, MOST_TOKENS[config.backend] // config.sequence_length)
    return min(most, (limit - fixed) // sequence)


def state_bytes(config: Configuration, training: bool = True) -> int:
    """fp32 weights, in training gradients and two moments too, in bf16 the copy that computes."""
    each = (16 if training else 4) + (2 if config.precision == "bf16" else 0)
    return count_parameters(config) * each


def activation_bytes(config: Configuration) -> int:
    """What one sequence keeps for the backward pass.

    Per block and position, in widths: the two residual sums (2), norms (2), qkv (3), attention out
    (1), its projection (1) and both sides of the activation (8). With dropout its masks, and on a
    CPU the probabilities and the mask of heads × length × length.
    """
    size = 2 if config.precision == "bf16" else 4
    length = config.sequence_length
    block = 17 * length * config.width * size
    if config.dropout > 0:
        block += 3 * length * config.width
        if config.backend == "CPU":
            block += config.heads * length**2 * (2 * size + 1)
    return config.depth * block


def head_bytes(config: Configuration) -> int:
    """The logits of a chunk of positions in fp32, their log-softmax and their gradient."""
    return 3 * 4 * 1024 * config.vocab_size


def memory_limit(config: Configuration) -> int:
    """Bytes the run may use: memory_limit, or all of the GPU, the machine or its container."""
    if config.memory_limit is not None:
        return parse_bytes(config.memory_limit)
    if config.backend == "GPU":
        return torch.cuda.get_device_properties(0).total_memory
    limits = [int(_proc_meminfo()["MemTotal"]) * 1024]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        path = Path("/sys/fs/cgroup") / name
        if path.is_file() and path.read_text().strip().isdigit():
            limits.append(int(path.read_text()))
    return min(limits)


def _proc_meminfo() -> dict[str, str]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        raise UserError("this system does not tell its memory; add --memory_limit 16GB") from None
    return {line.split(":")[0]: line.split()[1] for line in lines}


@cache
def peak_flops(backend: str, precision: str) -> float:
    """FLOP/s of matrix products: the published peak of a known GPU, else measured here, now."""
    if backend == "GPU" and precision == "bf16":
        name = torch.cuda.get_device_name(0)
        for known, peak in PUBLISHED_PEAKS.items():
            if known in name:
                return peak
    device = "cuda" if backend == "GPU" else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if backend == "GPU" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, spent = float("inf"), 0.0
    while spent < 0.4:
        begin = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        took = time.perf_counter() - begin
        best, spent = min(best, took), spent + took
    return 2 * size**3 / best


def flops_per_token(config: Configuration) -> int:
    """Of training: 6 a parameter (Kaplan et al. 2020, 2.1), without attention's own products."""
    return 6 * count_parameters(config)
