"""How plans are shown: as text and as data."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from math import ceil

from configuration import Configuration
from planner import costs
from planner.costs import TIERS, Plan
from planner.search import closest, engine_plans, fewest_systems

TIER_NAMES = {"device": "memory", "host": "host memory", "disk": "disk"}
MORE = {"device": "more memory", "host": "more host memory", "disk": "a larger disk (--stream_dir)"}
MOST_EPOCHS = 4  # Muennighoff et al., Scaling Data-Constrained Language Models, 2023


def size_text(number: float) -> str:
    """Write bytes: 12_853_386_240 as '12.85 GB'."""
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number / 1e6:.1f} MB"


def time_text(seconds: float) -> str:
    """Write seconds: 90 as '90 s', 9000 as '2.5 h', 900000 as '10.4 days'."""
    for unit, name in ((365 * 86400, "years"), (86400, "days"), (3600, "h")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def count_text(number: int, one: str, many: str) -> str:
    """Write a number of things: '1 step' or '3,000 steps'."""
    return f"{number:,} {one if number == 1 else many}"


def on_or_off(value: bool) -> str:
    return "on" if value else "off"


def describe(plan: Plan) -> str:
    """Describe a plan that fits, in a few lines."""
    config = plan.config
    headline = costs.headline(config)
    checkpoint = f"checkpoint: {size_text(costs.checkpoint_bytes(config))}"
    if config.backend == "CSX":
        return f"{headline}, Cerebras systems: {config.num_systems}; {checkpoint}"
    micro_batches = ceil(costs.rank_sequences(config) / config.micro_batch_size)
    pieces = count_text(micro_batches, "micro-batch", "micro-batches")
    lines = [f"{headline} in {pieces} of {config.micro_batch_size} × {config.sequence_length}"]
    recomputing = f"activation checkpointing: {on_or_off(config.activation_checkpointing)}"
    received = size_text(plan.total("bytes_in"))
    if config.engine == "streaming":
        written = size_text(plan.total("bytes_out"))
        passes = ceil(config.batch_size / config.stream_batch_size)
        lines.append(
            f"weights and optimizer in {config.stream_to}: a step reads {received} and writes "
            f"{written}, in {count_text(passes, 'pass', 'passes')}; {recomputing}"
        )
    if plan.blocks_on_device:
        without = costs.make_plan(config, plan.machine, blocks=0)
        saved = sum(without.total(way) - plan.total(way) for way in ("bytes_in", "bytes_out"))
        lines.append(
            f"{plan.blocks_on_device} of {config.depth} blocks stay on the device, which saves "
            f"{size_text(saved)} of transfer and about "
            f"{time_text(without.seconds - plan.seconds)} a step"
        )
    if config.engine == "sharded":
        lines.append(
            f"{config.num_systems} processes, {config.shard_group_size} share a copy of the "
            f"weights; reshard after forward: {on_or_off(config.reshard_after_forward)}, "
            f"offload: {on_or_off(config.offload)}, {recomputing}; each receives {received} a step"
        )
    tiers = ", ".join(
        f"{TIER_NAMES[tier]}: {size_text(number)} of {size_text(plan.available[tier])}"
        for tier, number in plan.bytes.items()
        if number
    )
    on_each = " on each" if config.engine == "sharded" else ""
    lines.append(
        f"{tiers}{on_each}, {checkpoint}; about {time_text(plan.seconds)} a step, "
        f"{time_text(plan.run_seconds)} for {count_text(config.num_steps, 'step', 'steps')}"
    )
    if seen := costs.epochs(config):
        lines.append("epochs: " + ", ".join(f"{n:.3g} of {name}" for name, n in seen.items()))
    return "\n".join(lines)


def warnings(plan: Plan) -> Iterator[str]:
    """Yield what is probably a mistake, a line each."""
    config = plan.config
    evaluating = plan.all_evals_seconds
    training = plan.seconds * config.num_steps
    for name, number in costs.epochs(config).items():
        if number > MOST_EPOCHS:
            yield (
                f"{name} is seen {number:.1f} times, and repeated text adds little above "
                f"{MOST_EPOCHS}: lower num_steps or its weight, or prepare more"
            )
    if evaluating > max(60, training):  # seconds
        yield (
            f"evaluations take about {time_text(evaluating)} in all, training "
            f"{time_text(training)}; lower --eval_batches or raise --eval_steps"
        )
    if config.warmup_steps > config.num_steps:
        yield (
            f"warmup_steps {config.warmup_steps} is above num_steps {config.num_steps}: the "
            f"learning rate never reaches its peak"
        )


def refusal(config: Configuration, plan: Plan, training: bool = True) -> str:
    """Say why a configuration does not fit, of which `plan` is the closest, and what would."""
    smaller = replace(config, micro_batch_size=None, stream_batch_size=None)
    fitting = closest(engine_plans(smaller, plan.machine, training))
    if not fitting.missing:
        key = "stream_batch_size" if config.micro_batch_size is None else "micro_batch_size"
        most = getattr(fitting.config, key)
        return f"{key}: {getattr(config, key)} sequences do not fit in memory, {most} do"
    needs = " and ".join(
        f"{size_text(plan.bytes[tier])} of {TIER_NAMES[tier]}, there are "
        f"{size_text(plan.available[tier])}"
        for tier in plan.missing
    )
    cures = [MORE[tier] for tier in plan.missing]
    systems = fewest_systems(config, plan.machine, training)
    if systems and systems > config.num_systems:
        cures.insert(0, f"--num_systems {systems}")
    return (
        f"this model does not fit: with the {plan.config.engine} engine its "
        f"{costs.count(config):,} parameters need {needs}; use {' or '.join(cures)}"
    )


def table(plans: list[Plan]) -> Iterator[str]:
    """Yield the lines of a table of the engines."""
    config = plans[0].config
    machine = plans[0].machine
    tokens = costs.step_tokens(config)
    flops = costs.flops_per_token(config) * tokens
    yield f"{costs.count(config):,} parameters, {tokens:,} tokens and {flops:.3e} FLOPs a step"
    yield (
        f"on {machine.name} ({config.precision}): {machine.matmul / 1e12:,.2f} TFLOP/s, memory "
        f"{machine.bandwidth / 1e9:,.0f}, link {machine.link / 1e9:,.0f}, disk "
        f"{machine.read / 1e9:.1f} read and {machine.write / 1e9:.1f} write GB/s\n"
    )
    yield _row("", *TIERS, "step", "whole run")
    yield _row("available", *map(size_text, plans[0].available.values()))
    for plan in plans:
        cells = [size_text(plan.bytes[tier]) for tier in TIERS]
        cells += [time_text(plan.seconds), time_text(plan.run_seconds)]
        missing = [f"{size_text(n)} of {TIER_NAMES[tier]}" for tier, n in plan.missing.items()]
        note = "  missing: " + " and ".join(missing) if missing else ""
        yield _row(plan.config.engine, *cells) + note
    if systems := fewest_systems(config, machine):
        yield f"such devices that it needs without streaming or offloading: {systems}"
    yield ""


def _row(name: str, *cells: str) -> str:
    return f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells)


def summary(plan: Plan) -> dict:
    """Return the plan for other programs, with the keys of its configuration."""
    config = plan.config
    return {
        **asdict(config),
        "parameters": costs.count(config),
        "fits": not plan.missing,
        "bytes": plan.bytes,
        "missing": plan.missing,
        "blocks_on_device": plan.blocks_on_device,
        "bytes_moved": {"in": plan.total("bytes_in"), "out": plan.total("bytes_out")},
        "flops_per_step": costs.flops_per_token(config) * costs.step_tokens(config),
        "limit": plan.limit,
        "seconds_per_step": plan.seconds,
        "days": plan.run_seconds / 86400,
    }
