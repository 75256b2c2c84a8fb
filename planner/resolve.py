"""Replaces every `auto` of a configuration, for this machine or a named one."""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from math import nan

import torch

from common.console import UserError, short, warn
from configuration import Configuration
from engines.store import remove_abandoned
from ops import find_gpu, has_units
from planner.costs import TIERS, Phase, Plan
from planner.machine import Machine, store_folder, this_machine
from planner.report import refusal
from planner.search import closest, engine_plan, engine_plans

# Keys whose other values would round differently
ROUNDING = (
    "micro_batch_size",
    "stream_batch_size",
    "activation_checkpointing",
    "shard_group_size",
    "reshard_after_forward",
)
CEREBRAS = "python3.11 -m venv cs && cs/bin/pip install -r requirements-cerebras.txt"


def resolve(
    config: Configuration, resolved_before: dict, training: bool = True, processes: int = 1
) -> Plan:
    """Return the plan of a run on this machine, with so many of its processes here; its config has
    every `auto` that the engine uses replaced.

    `resolved_before` has the keys of an earlier part of the run, whose choices are kept. Raises
    UserError for what this machine doesn't have and for what does not fit.
    """
    config = resolve_device(config, resolved_before)
    if training:
        check_records(config)
    if config.engine == "cerebras":
        check_package()
        if config.backend == "CSX":  # plans the run itself: its memory is not known here
            nothing = dict.fromkeys(TIERS, 0)
            machine = Machine("Cerebras", "CSX", **nothing)
            return Plan(config, machine, nothing, [Phase(nan, nan)])
    with suppress(OSError):
        remove_abandoned(store_folder(config))  # before the free space is measured
    machine = this_machine(config, processes)
    plan = closest(engine_plans(config, machine, training))
    if plan.missing:
        raise UserError(refusal(config, plan, training))
    same_engine = plan.config.engine == resolved_before.get("engine")
    if same_engine and config.num_systems == resolved_before.get("num_systems"):
        again = keep_rounding(replace(config, engine=plan.config.engine), resolved_before)
        same = engine_plan(again, machine, training)
        if not same.missing and same.config.offload == plan.config.offload:
            plan = same
    timeout = config.step_timeout or max(120, int(3 * plan.seconds))
    return replace(plan, config=replace(plan.config, step_timeout=timeout))


def keep_rounding(config: Configuration, resolved_before: dict) -> Configuration:
    """Replace each `auto` that would let a resumed run round differently by the earlier choice."""
    free = [key for key in ROUNDING if getattr(config, key) in (None, "auto")]
    kept = {key: resolved_before[key] for key in free}
    if config.micro_batch_size and config.micro_batch_size > (kept.get("stream_batch_size") or 0):
        kept.pop("stream_batch_size", None)  # what is configured comes first
    return replace(config, **kept)


def resolve_device(config: Configuration, resolved_before: dict) -> Configuration:
    """Replace `auto` in backend and precision, and what follows from them."""
    backend = config.backend
    engine = config.engine
    gpu, problem = find_gpu()
    if backend == "auto" and engine == "cerebras":
        backend = "CSX"
    elif backend == "auto":
        backend = "GPU" if gpu else "CPU"
        if problem:
            warn(f"the GPU is not used: {problem}")
    elif backend == "CSX" and engine == "auto":
        engine = "cerebras"
    if backend != "CPU" and (backend == "CSX") != (engine == "cerebras"):
        wrong = f"backend: {backend} is not for engine {engine}"
        raise UserError(f"{wrong}: --engine cerebras is for --backend CSX, or CPU to try it")
    if backend == "GPU" and not gpu:
        raise UserError(f"backend: GPU, and {problem or 'there is none'}; use --backend CPU")
    config = replace(config, backend=backend, engine=engine)
    check_engine(config)
    precision = resolve_precision(config, resolved_before.get("precision"))
    compiled = resolve_compile(config, resolved_before.get("compile"))
    return replace(config, precision=precision, compile=compiled)


def resolve_precision(config: Configuration, earlier: str | None) -> str:
    """Return what was asked for, what an earlier part of the run chose, or what is faster."""
    asked = config.precision
    only = None
    if config.engine == "cerebras":
        only = "bf16" if config.backend == "CSX" else "fp32"
    elif not hasattr(torch.Tensor, "grad_dtype"):  # torch 2.4 would sum gradients in bf16
        only = "fp32"
    if asked == "tf32" and config.backend != "GPU":
        raise UserError(f"precision: tf32 needs a GPU, backend is {config.backend}; use fp32")
    if only is not None and asked not in ("auto", only):
        where = f"engine {config.engine} on {config.backend} with torch {torch.__version__}"
        raise UserError(f"precision: {asked} is not for {where}; use {only}")
    if asked != "auto":
        return asked
    if earlier == "tf32" and config.backend != "GPU":
        earlier = "fp32"
    return only or earlier or faster_precision(config)


def faster_precision(config: Configuration) -> str:
    """Return bf16 where the machine multiplies it in hardware; on a CPU not for narrow models,
    which were faster in fp32 (dev/log.md)."""
    if config.backend == "GPU":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    narrow = config.width < (512 if has_units("amx_bf16") else 64)
    return "bf16" if has_units("amx_bf16", "avx512_bf16") and not narrow else "fp32"


def resolve_compile(config: Configuration, earlier: bool | None) -> bool:
    """Return what was asked for, what an earlier part of the run chose, or where it is faster: on a
    GPU. The last two only where there are the compilers it needs."""
    missing = missing_compiler(config.backend)
    asked = config.compile is True
    if asked and config.engine == "cerebras":
        raise UserError("compile: the cerebras engine compiles in its own way; remove it")
    if asked and missing:
        raise UserError(f"compile: true needs {missing}; remove it")
    wanted = config.backend == "GPU" or earlier is True
    if config.compile is False or config.engine == "cerebras" or not (asked or wanted):
        return False
    if missing:
        warn(f"not compiled, which is slower: that needs {missing}")
    return missing is None


def missing_compiler(backend: str) -> str | None:
    """Return what torch.compile lacks here: on a CPU it makes C++, on a GPU Triton makes C."""
    if backend != "GPU":
        found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        return None if found else "a C++ compiler, and there is no g++"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler, and there is no gcc"
    if find_spec("triton") is None:
        return "Triton, which is not installed"
    if torch.cuda.get_device_capability() < (7, 0):
        return "a GPU of compute capability 7.0 or higher"
    return None


def check_engine(config: Configuration) -> None:
    """Raise UserError for what an engine does not support."""
    engine = config.engine
    systems = config.num_systems
    size = config.micro_batch_size
    each = config.batch_size // systems
    if engine == "cerebras" and config.backend == "CPU":
        wrong = "but the cerebras engine on a CPU"
        if systems > 1:
            raise UserError(f"num_systems: {systems}, {wrong} is one; use --backend CSX")
        if size not in (None, each):
            raise UserError(f"micro_batch_size: {size}, {wrong} runs the batch in one piece")
    elif engine == "cerebras" and size is not None and size > each:
        wrong = f"is more than the {each} sequences of the batch for each system"
        raise UserError(f"micro_batch_size: {size} {wrong}")
    group = config.shard_group_size or 1
    if systems % group != 0:
        raise UserError(f"shard_group_size: {group} does not divide num_systems {systems}")
    if systems > 1 and engine in ("resident", "streaming"):
        wrong = f"runs on one system, num_systems is {systems}"
        raise UserError(f"engine: {engine} {wrong}; use --engine auto or --num_systems 1")


def check_records(config: Configuration) -> None:
    """Raise UserError for what an engine can't record, or a profile that is not of the run."""
    for key in ("sample_prompts", "profile"):
        if config.engine == "cerebras" and getattr(config, key) is not None:
            raise UserError(f"{key}: the cerebras engine has none; remove it")
    if config.profile is not None:
        steps = re.fullmatch(r"(\d{1,18}):(\d{1,18})", config.profile)
        if not steps or not 1 <= int(steps[1]) <= int(steps[2]) <= config.num_steps:
            wanted = f"START:STOP, two steps from 1 to num_steps {config.num_steps}"
            raise UserError(f"profile: {short(config.profile)} is not {wanted}")


def check_package() -> None:
    """Raise UserError where Cerebras's package, or the torch that it is built for, is missing."""
    try:
        needs = metadata.requires("cerebras-pytorch")
    except metadata.PackageNotFoundError:
        wrong = "engine: cerebras needs the package cerebras_pytorch, in an environment of its own"
        raise UserError(f"{wrong}: {CEREBRAS}") from None
    found = (re.match(r"torch ?\(?==([\d.]+)", need) for need in needs)
    wanted = next(filter(None, found))[1]
    if torch.__version__.partition("+")[0] != wanted:
        wrong = f"engine: cerebras needs torch {wanted}, this is {torch.__version__}"
        raise UserError(f"{wrong}; make an environment of its own: {CEREBRAS}")
