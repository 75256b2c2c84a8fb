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

from configuration import Configuration
from engines.base import find_gpu, has_units
from engines.store import remove_abandoned
from planner.costs import OVERLAP, TIERS, Plan
from planner.machine import Machine, store_folder, this_machine
from planner.report import refusal
from planner.search import engine_plan, engine_plans, first_fitting
from runtime.console import UserError, short, warn

# Keys whose other values would round differently
ROUNDING = (
    *("stream_batch_size", "activation_checkpointing", "shard_group_size"),
    "reshard_after_forward",
)
RATES = ("matmul", "bandwidth", "link", "read", "write", "network", "fabric")


def resolve(config: Configuration, chosen: dict, training: bool = True, processes: int = 1) -> Plan:
    """The plan of a run on this machine, with so many of its processes here; its config has every
    `auto` replaced.

    `chosen` is what an earlier part of the run chose, which is kept. Raises UserError for what this
    machine doesn't have and for what does not fit.
    """
    config = resolve_device(config, chosen)
    if training:
        check_records(config)
    if config.engine == "cerebras":
        check_package()
        if config.backend == "CSX":
            return on_cluster(config)
    with suppress(OSError):
        remove_abandoned(store_folder(config))  # before the free space is measured
    machine = this_machine(config, processes)
    plan = best_plan(config, machine, chosen.get("micro_batch_size"), training)
    same_systems = chosen.get("num_systems") == config.num_systems
    if same_systems and plan.config.engine == chosen.get("engine") != "resident":
        kept = {k: chosen[k] for k in ROUNDING if getattr(config, k) in (None, "auto")}
        if (config.micro_batch_size or 0) > (kept.get("stream_batch_size") or config.batch_size):
            kept.pop("stream_batch_size", None)  # what is configured comes first
        again = replace(config, engine=plan.config.engine, **kept)
        same = engine_plan(again, machine, chosen.get("micro_batch_size"), training)
        plan = plan if same.missing else same
    timeout = config.step_timeout or max(120, int(3 * plan.seconds))
    return replace(plan, config=replace(plan.config, step_timeout=timeout))


def best_plan(
    config: Configuration, machine: Machine, micro_batch: int | None = None, training: bool = True
) -> Plan:
    """The plan of the first engine that fits. Raises UserError where none does."""
    plans = engine_plans(config, machine, micro_batch, training)
    if (plan := first_fitting(plans)) is None:
        raise UserError(refusal(config, plans, training))
    return plan


def resolve_device(config: Configuration, chosen: dict) -> Configuration:
    """Replaces `auto` in backend and precision, and what follows from them."""
    backend, engine = config.backend, config.engine
    if backend == "auto" and engine == "cerebras":
        backend = "CSX"
    there, problem = find_gpu()
    if backend == "auto":
        backend = "GPU" if there else "CPU"
        if problem:
            warn(f"the GPU is not used: {problem}")
    if backend == "CSX" and engine == "auto":
        engine = "cerebras"
    if (backend, engine) == ("GPU", "cerebras") or (backend == "CSX" and engine != "cerebras"):
        raise UserError(
            f"backend: {backend} is not for engine {engine}: use --engine cerebras with "
            f"--backend CSX, or with CPU to try it"
        )
    if backend == "GPU" and not there:
        raise UserError(f"backend: GPU, and {problem or 'there is none'}; use --backend CPU")
    config = replace(config, backend=backend, engine=engine)
    check_engine(config)
    precision = resolve_precision(config, chosen.get("precision"))
    return replace(
        config, precision=precision, compile=resolve_compile(config, chosen.get("compile"))
    )


def resolve_precision(config: Configuration, earlier: str | None) -> str:
    """What was asked for, what an earlier part of the run chose, or what is faster."""
    only = None
    if config.engine == "cerebras":
        only = "bf16" if config.backend == "CSX" else "fp32"
    elif not hasattr(torch.Tensor, "grad_dtype"):  # torch 2.4 would sum gradients in bf16
        only = "fp32"
    if "tf32" in (config.precision, earlier) and config.backend != "GPU":
        if config.precision == "tf32":
            raise UserError(f"precision: tf32 needs a GPU, backend is {config.backend}; use fp32")
        earlier = "fp32"
    if only is not None and config.precision not in ("auto", only):
        raise UserError(
            f"precision: {config.precision} is not for engine {config.engine} on {config.backend} "
            f"with torch {torch.__version__}; use {only}"
        )
    if config.precision != "auto":
        return config.precision
    return only or earlier or faster_precision(config, config.backend)


def resolve_compile(config: Configuration, earlier: bool | None) -> bool:
    """What was asked for, what an earlier part of the run chose, or where it is faster: on a GPU.
    The last two only where there are the compilers it needs."""
    missing = missing_compiler(config.backend)
    if config.compile is not True:
        wanted = config.backend == "GPU" or bool(earlier)
        wanted = wanted and config.compile == "auto" and config.engine != "cerebras"
        if wanted and missing:
            warn(f"not compiled, which is slower: that needs {missing}")
        return wanted and not missing
    if config.engine == "cerebras":
        raise UserError("compile: the cerebras engine compiles in its own way; remove it")
    if missing:
        raise UserError(f"compile: true needs {missing}; remove it")
    return True


def missing_compiler(backend: str) -> str | None:
    """What torch.compile lacks here: on a CPU it makes C++, on a GPU Triton makes C."""
    variable, names = ("CC", ("gcc", "clang")) if backend == "GPU" else ("CXX", ("g++", "clang++"))
    if not os.environ.get(variable) and not any(map(shutil.which, names)):
        return f"a {'C' if backend == 'GPU' else 'C++'} compiler, and there is no {names[0]}"
    if backend == "GPU" and find_spec("triton") is None:
        return "Triton, which is not installed"
    if backend == "GPU" and torch.cuda.get_device_capability() < (7, 0):
        return "a GPU of compute capability 7.0 or higher"
    return None


def check_engine(config: Configuration) -> None:
    """Raises UserError for what an engine does not support."""
    if config.engine == "cerebras" and config.backend == "CPU" and config.num_systems > 1:
        raise UserError(
            f"num_systems: {config.num_systems}, but the cerebras engine on a CPU is one; take "
            f"--backend CSX or --num_systems 1"
        )
    if config.engine == "cerebras" and config.backend == "CPU" and config.micro_batch_size:
        raise UserError(
            f"micro_batch_size: {config.micro_batch_size}, but the cerebras engine on a CPU runs "
            f"the batch in one piece; remove it"
        )
    if config.num_systems % (config.shard_group_size or 1):
        raise UserError(
            f"shard_group_size: {config.shard_group_size} does not divide num_systems "
            f"{config.num_systems}"
        )
    if config.num_systems > 1 and config.engine in ("resident", "streaming"):
        raise UserError(
            f"engine: {config.engine} runs on one system, and num_systems is "
            f"{config.num_systems}; use --engine auto or --num_systems 1"
        )


def check_records(config: Configuration) -> None:
    """Raises UserError for what an engine can't record, or a profile that is not of the run."""
    for key in ("sample_prompts", "profile"):
        if config.engine == "cerebras" and getattr(config, key) is not None:
            raise UserError(f"{key}: the cerebras engine has none; remove it")
    if config.profile is not None:
        steps = re.fullmatch(r"(\d{1,18}):(\d{1,18})", config.profile)
        if not steps or not 1 <= int(steps[1]) <= int(steps[2]) <= config.num_steps:
            raise UserError(
                f"profile: {short(config.profile)} is not START:STOP, two steps from 1 to "
                f"num_steps {config.num_steps}"
            )


def check_package() -> None:
    """Raises UserError where Cerebras's package, or the torch that it is built for, is missing."""
    cure = "python3.11 -m venv cs && cs/bin/pip install -r requirements-cerebras.txt"
    try:
        needs = metadata.requires("cerebras-pytorch")
    except metadata.PackageNotFoundError:
        raise UserError(
            f"engine: cerebras needs the package cerebras_pytorch, in an environment of its own: "
            f"{cure}"
        ) from None
    wanted = next(match[1] for need in needs if (match := re.match(r"torch ?\(?==([\d.]+)", need)))
    if torch.__version__.partition("+")[0] != wanted:
        raise UserError(
            f"engine: cerebras needs torch {wanted}, this is {torch.__version__}; make an "
            f"environment of its own: {cure}"
        )


def on_cluster(config: Configuration) -> Plan:
    """A run on Cerebras systems, which plan it themselves: their memory is not known here."""
    none = dict.fromkeys(TIERS, 0)
    each = config.batch_size // config.num_systems
    if (config.micro_batch_size or 1) > each:
        raise UserError(
            f"micro_batch_size: {config.micro_batch_size} is more than the {each} sequences of the "
            f"batch for each system"
        )
    rates = dict.fromkeys(RATES, nan)
    machine = Machine("Cerebras", "CSX", **none, program=0, **rates, processes=1)
    return Plan(config, machine, none, 0, 0, [(nan, nan)], OVERLAP)


def faster_precision(config: Configuration, backend: str) -> str:
    """bf16 where the machine multiplies it in hardware; on a CPU not for narrow models, which were
    faster in fp32 (dev/log.md)."""
    if backend == "GPU":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    narrow = config.width < (512 if has_units("amx_bf16") else 64)
    return "bf16" if has_units("amx_bf16", "avx512_bf16") and not narrow else "fp32"
