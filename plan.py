"""Arithmetic over a configuration and a machine: what fits, and how a run is cut."""

import os
import re
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from configuration import Configuration
from errors import UserError
from model import count_parameters

MOST_TOKENS = {"CPU": 2048, "GPU": 32768}  # in a micro-batch: more is hardly faster

# Dense bf16 tensor-core peaks in FLOP/s, from the vendor's data sheets.
PUBLISHED_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def resolve(config: Configuration, chosen: dict, training: bool = True) -> Configuration:
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
    if config.engine == "streaming":
        return replace(config, backend=backend, precision="bf16", stream_to="disk", recompute=True, activations="device", pass_size=config.batch_size)
    if config.engine not in ("auto", "resident"):
        raise UserError(f"engine: {config.engine} is not there yet; take resident")

    precision = config.precision
    if precision == "auto":
        precision = chosen.get("precision") or faster_precision(config, backend)
    config = replace(config, backend=backend, engine="resident", precision=precision)
    fits = largest_micro_batch(config, training)
    if config.micro_batch_size is not None and config.micro_batch_size > fits:
        raise UserError(
            f"micro_batch_size: {config.micro_batch_size} sequences do not fit in memory, {fits} do"
        )
    fast = max(1, MOST_TOKENS[backend] // config.sequence_length)
    size = config.micro_batch_size or min(chosen.get("micro_batch_size") or fast, fits)
    return replace(config, micro_batch_size=min(size, config.batch_size))


def describe(config: Configuration) -> str:
    """What a resolved configuration is about to run, in a line."""
    micro_batches = -(-config.batch_size // config.micro_batch_size)
    return (
        f"{count_parameters(config):,} parameters, {config.engine} on {config.backend}, "
        f"{config.precision}, {config.batch_size * config.sequence_length:,} tokens a step in "
        f"{micro_batches} micro-batches of {config.micro_batch_size} × {config.sequence_length}"
    )


def faster_precision(config: Configuration, backend: str) -> str:
    """bf16 where the machine multiplies it in hardware; on a CPU for wide models alone, as narrow
    ones were faster in fp32 (docs/log.md)."""
    if backend == "GPU":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if config.width >= 512 and has_bf16_units() else "fp32"


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (torch 2.4 can't tell: no)."""
    units = getattr(torch.cpu, "get_capabilities", dict)()
    return units.get("amx_bf16", False) or units.get("avx512_bf16", False)


def largest_micro_batch(config: Configuration, training: bool) -> int:
    """As many sequences as memory holds."""
    limit = memory_limit(config)
    fixed = state_bytes(config, training) + head_bytes(config)
    sequence = activation_bytes(config) // (1 if training else config.depth)
    if fixed + sequence > limit:
        extra = "their gradients, optimizer and" if training else "the activations of"
        raise UserError(
            f"this model does not fit: {count_parameters(config):,} parameters need "
            f"{(fixed + sequence) / 1e9:,.1f} GB with {extra} one sequence, and there are "
            f"{limit / 1e9:,.1f} GB; take a smaller configuration or a larger machine"
        )
    return (limit - fixed) // sequence


def state_bytes(config: Configuration, training: bool = True) -> int:
    """fp32 weights, in training gradients and two moments too, in bf16 the copy that computes."""
    each = (16 if training else 4) + (2 if config.precision == "bf16" else 0)
    return count_parameters(config) * each


def activation_bytes(config: Configuration) -> int:
    """What one sequence keeps for the backward pass.

    Per block and position, in widths: the two residual sums (2), norms (2), qkv (3), attention out
    (1), its projection (1) and both sides of the activation (8); in bf16 the fp32 inputs of the
    norms (2). With dropout its masks, and on a CPU the probabilities and the mask of heads ×
    length × length.
    """
    size, norms = (2, 8) if config.precision == "bf16" else (4, 0)
    length = config.sequence_length
    block = (17 * size + norms) * length * config.width
    if config.dropout > 0:
        block += 3 * length * config.width
        if config.backend == "CPU":
            block += config.heads * length**2 * (2 * size + 1)
    return config.depth * block


def head_bytes(config: Configuration) -> int:
    """The logits of 1,024 positions in fp32, their log-softmax and their gradient, and the
    gradient of the embedding from a chunk, from all chunks, and from the lookup."""
    return 3 * 4 * 1024 * config.vocab_size + 3 * 4 * config.vocab_size * config.width


def memory_limit(config: Configuration) -> int:
    """Bytes the run may use: memory_limit, or what the GPU, the machine or its container has."""
    if config.memory_limit is not None:
        return parse_bytes(config.memory_limit)
    if config.backend == "GPU":
        return int(0.95 * torch.cuda.mem_get_info()[0])  # free now, less what fragments
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if Path("/proc/self/cgroup").is_file():  # Linux; a line `0::/path` names the group
        group = Path("/proc/self/cgroup").read_text().split("::")[-1].strip()
        folder = Path("/sys/fs/cgroup", group.lstrip("/"))
        for path in (parent / "memory.max" for parent in (folder, *folder.parents)):
            if path.is_file() and path.read_text().strip().isdigit():
                limits.append(int(path.read_text()))
    return min(limits)


def parse_bytes(text: str) -> int:
    """'20GB' -> 20_000_000_000; raises UserError for what is not a size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text)
    if match is None:
        raise UserError(f"memory_limit: {text} is not a size such as 20GB or 16GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** ("KMGT".index(match[2]) + 1))


@cache
def peak_flops(backend: str, precision: str) -> float:
    """FLOP/s of matrix products: the published peak of a known GPU, else measured here, now."""
    if backend == "GPU" and precision == "bf16":
        name = torch.cuda.get_device_name(0)
        for known, peak in PUBLISHED_PEAKS.items():
            if re.search(rf"\b{known}\b", name):
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
