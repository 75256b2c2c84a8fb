"""How plans are shown: as text and as data."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from math import ceil
from pathlib import Path

from configuration import MODEL_KEYS, Configuration
from planner.costs import (
    TIERS,
    Plan,
    checkpoint_bytes,
    count,
    flops_per_token,
    headline,
    rank_sequences,
    step_tokens,
)
from planner.machine import Machine
from planner.search import closest, engine_plans, fewest_systems, first_fitting
from runtime.arguments import read_yaml
from runtime.console import UserError

TIER_NAMES = {"device": "memory", "host": "host memory", "disk": "disk"}
CURES = {
    "device": "more memory",
    "host": "more host memory",
    "disk": "a larger disk (--stream_dir)",
}


def size_text(number: float) -> str:
    """12_853_386_240 -> '12.85 GB'."""
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number / 1e6:.1f} MB"


def time_text(seconds: float) -> str:
    """90 -> '90 s', 9000 -> '2.5 h', 900000 -> '10.4 days'."""
    for unit, name in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def describe(plan: Plan) -> str:
    """A plan that fits, in a few lines."""
    config, lines = plan.config, [headline(plan.config)]
    if config.backend == "CSX":
        lines[0] += f", {config.num_systems} Cerebras system{'s' * (config.num_systems > 1)}"
        return f"{lines[0]}; checkpoint: {size_text(checkpoint_bytes(config))}"
    size = config.micro_batch_size or config.batch_size  # the cerebras engine on a CPU
    micro_batches = ceil(rank_sequences(config) / size)
    lines[0] += f" in {micro_batches} micro-batches of {size} × {config.sequence_length}"
    recomputing = f"activation checkpointing: {'on' if config.activation_checkpointing else 'off'}"
    if config.engine == "streaming":
        passes = ceil(config.batch_size / config.stream_batch_size)
        lines.append(
            f"weights and optimizer in {config.stream_to}: a step reads {size_text(plan.bytes_in)} "
            f"and writes {size_text(plan.bytes_out)}, in {passes} pass{'es' * (passes > 1)}; "
            f"{recomputing}"
        )
    if config.engine == "sharded":
        lines.append(
            f"{config.num_systems} processes, {config.shard_group_size} share a copy of the "
            f"weights; reshard after forward: {'on' if config.reshard_after_forward else 'off'}, "
            f"offload: {'on' if config.offload else 'off'}, {recomputing}; each receives "
            f"{size_text(plan.bytes_in)} a step"
        )
    tiers = ", ".join(
        f"{TIER_NAMES[tier]}: {size_text(number)} of {size_text(plan.available[tier])}"
        for tier, number in plan.bytes.items()
        if number
    )
    lines.append(
        f"{tiers}{' on each' if config.num_systems > 1 else ''}, checkpoint: "
        f"{size_text(checkpoint_bytes(config))}; about {time_text(plan.seconds)} a step, "
        f"{time_text(plan.run_seconds)} for {config.num_steps:,} steps"
    )
    return "\n".join(lines)


def warnings(plan: Plan) -> list[str]:
    """What is probably a mistake, a line each."""
    config, lines = plan.config, []
    evaluating, training = plan.all_evals_seconds, plan.seconds * config.num_steps
    if evaluating > training:
        lines.append(
            f"evaluations take about {time_text(evaluating)} in all, training "
            f"{time_text(training)}; lower --eval_batches or raise --eval_steps"
        )
    if config.warmup_steps >= config.num_steps:
        lines.append(
            f"warmup_steps {config.warmup_steps} is not below num_steps {config.num_steps}: the "
            f"learning rate never reaches its peak"
        )
    return lines


def refusal(config: Configuration, plans: list[Plan], training: bool = True) -> str:
    """Why nothing fits, and what would."""
    plan = closest(plans)
    smaller = replace(config, micro_batch_size=None, stream_batch_size=None)
    if smaller != config:
        fitting = first_fitting(engine_plans(smaller, plan.machine, None, training))
        if fitting is not None:
            key = "stream_batch_size" if config.micro_batch_size is None else "micro_batch_size"
            most = getattr(fitting.config, key)
            return f"{key}: {getattr(config, key)} sequences do not fit in memory, {most} do"
    needs = " and ".join(
        f"{size_text(plan.bytes[tier])} of {TIER_NAMES[tier]}, there are "
        f"{size_text(plan.available[tier])}"
        for tier in plan.missing
    )
    cures = [CURES[tier] for tier in plan.missing]
    enough = fewest_systems(config, plan.machine, training) if plan.machine.on_gpu else None
    if enough and enough > config.num_systems:
        cures.insert(0, f"--num_systems {enough}")
    cure = f"use {' or '.join(dict.fromkeys(cures))}"
    if fitting := _largest_fitting(config, plan.machine, training):
        cure += f"; {fitting} fits here"
    return (
        f"this model does not fit: with the {plan.config.engine} engine its {count(config):,} "
        f"parameters need {needs}; {cure}"
    )


def _largest_fitting(config: Configuration, machine: Machine, training: bool) -> str | None:
    """The largest model of configs/ that fits with the other keys of a configuration."""
    best = (0, None)
    for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"):
        with suppress(UserError, ValueError):  # fewer positions than the sequence has
            values = {key: value for key, value in read_yaml(path).items() if key in MODEL_KEYS}
            smaller = replace(config, **values)
            between = best[0] < count(smaller) < count(config)
            if between and first_fitting(engine_plans(smaller, machine, None, training)):
                best = (count(smaller), f"configs/{path.name}")
    return best[1]


def table(plans: list[Plan], machine: Machine) -> Iterator[str]:
    """The engines side by side, a line each."""
    config = plans[0].config
    tokens = step_tokens(config)
    flops = flops_per_token(config) * tokens
    yield f"{count(config):,} parameters, {tokens:,} tokens and {flops:.3e} FLOPs a step"
    yield (
        f"on {machine.name} ({config.precision}): {machine.matmul / 1e12:,.2f} TFLOP/s, memory "
        f"{machine.bandwidth / 1e9:,.0f}, link {machine.link / 1e9:,.0f}, disk "
        f"{machine.read / 1e9:.1f} read and {machine.write / 1e9:.1f} write GB/s"
    )
    yield ""
    yield _row("", *TIERS, "step", "whole run")
    yield _row("available", *(size_text(getattr(machine, tier)) for tier in TIERS))
    for plan in plans:
        times = (time_text(plan.seconds), time_text(plan.run_seconds))
        missing = (f"{size_text(n)} of {TIER_NAMES[tier]}" for tier, n in plan.missing.items())
        note = "  missing: " + " and ".join(missing) if plan.missing else ""
        yield _row(plan.config.engine, *(size_text(plan.bytes[t]) for t in TIERS), *times) + note
    if machine.on_gpu and (systems := fewest_systems(config, machine)):
        yield f"without streaming or offloading it fits on {systems} or more such devices"
    yield ""


def _row(name: str, *cells: str) -> str:
    return f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells)


def summary(plan: Plan) -> dict:
    """The plan for other programs."""
    config = plan.config
    keys = ("engine", "micro_batch_size", "precision")
    if config.engine == "streaming":
        keys += ("stream_to", "activation_checkpointing", "activation_location")
        keys += ("stream_batch_size",)
    if config.engine == "sharded":
        keys += ("num_systems", "shard_group_size", "reshard_after_forward")
        keys += ("activation_checkpointing", "offload")
    return {
        "parameters": count(config),
        **{key: getattr(config, key) for key in keys},
        "fits": not plan.missing,
        "bytes": plan.bytes,
        "missing": plan.missing,
        "bytes_moved": {"in": plan.bytes_in, "out": plan.bytes_out},
        "flops_per_step": flops_per_token(config) * step_tokens(config),
        "limit": plan.limit,
        "seconds_per_step": plan.seconds,
        "days": plan.run_seconds / 86400,
    }
