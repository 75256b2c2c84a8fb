"""The search for the fastest way to run a configuration that fits a machine."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from configuration import Configuration
from planner.costs import Plan, make_plan, rank_sequences
from planner.machine import PER_MACHINE, Machine

MOST_TOKENS = {"CPU": 2048, "GPU": 32768}  # in a micro-batch: more is hardly faster
SIMILAR = 1.02  # times as slow as the fastest: then the least memory decides


def engine_plans(
    config: Configuration, machine: Machine, micro_batch: int | None = None, training: bool = True
) -> list[Plan]:
    """The best plan of each possible engine, the preferred first. micro_batch: the size to use if
    the configuration has none and it fits."""
    engines = (config.engine,)
    if config.engine == "auto":
        engines = ("resident", "streaming") if config.num_systems == 1 else ("sharded",)
    return [
        engine_plan(replace(config, engine=engine), machine, micro_batch, training)
        for engine in engines
    ]


def first_fitting(plans: list[Plan]) -> Plan | None:
    return next((plan for plan in plans if not plan.missing), None)


def closest(plans: list[Plan]) -> Plan:
    """The one with the fewest missing bytes."""
    return min(plans, key=lambda plan: sum(plan.missing.values()))


def engine_plan(
    config: Configuration, machine: Machine, micro_batch: int | None, training: bool
) -> Plan:
    """The fastest plan of one engine, or the closest to fitting."""
    plans = [
        _largest(choice, machine, micro_batch, training)
        for choice in _choices(config, machine, training)
    ]
    fitting = [plan for plan in plans if not plan.missing]
    if not fitting:
        return closest(plans)
    # host memory or other machines only where the devices of this one are not enough
    nearest = min(_distance(plan.config) for plan in fitting)
    fitting = [plan for plan in fitting if _distance(plan.config) == nearest]
    best = min(plan.seconds for plan in fitting)
    fast = [plan for plan in fitting if plan.seconds <= SIMILAR * best]
    return min(fast, key=lambda p: (p.config.activation_location == "host", sum(p.bytes.values())))


def _distance(config: Configuration) -> tuple[bool, int]:
    """How far away a shard of the sharded engine may be."""
    return (config.offload is True, config.shard_group_size or 0)


def _choices(config: Configuration, machine: Machine, training: bool) -> Iterator[Configuration]:
    """Every way to replace the `auto` of an engine's keys."""
    values = {"activation_checkpointing": (False, True) if training else (True,)}
    if config.engine == "streaming":
        values["stream_to"] = ("ram", "disk")
        values["activation_location"] = ("device", "host") if machine.on_gpu else ("device",)
    elif config.engine == "sharded":
        groups = [config.num_systems]
        if config.num_systems % machine.processes == 0 and machine.processes > 1:
            groups.insert(0, machine.processes)  # a copy of the weights on each machine
        values["shard_group_size"] = tuple(dict.fromkeys(groups))
        values["offload"] = (False, True) if machine.on_gpu else (False,)
        values["reshard_after_forward"] = (False, True)
    else:
        values = {}
    free = {k: v for k, v in values.items() if getattr(config, k) in ("auto", None)}
    for choice in product(*free.values()):
        chosen = replace(config, **dict(zip(free, choice, strict=True)))
        # only the inputs of recomputed blocks can be on the host
        useless = chosen.activation_location == "host" and not chosen.activation_checkpointing
        if not useless or "activation_location" not in free:
            yield chosen


def _largest(
    config: Configuration, machine: Machine, micro_batch: int | None, training: bool
) -> Plan:
    """With the largest micro-batch that fits, or 1, and as few passes as fit."""
    if config.engine == "cerebras":
        return make_plan(config, machine, training)
    fast = max(1, MOST_TOKENS[machine.backend] // config.sequence_length)
    most = min(rank_sequences(config), config.stream_batch_size or config.batch_size)
    size = min(config.micro_batch_size or micro_batch or fast, most)
    smallest = size if config.micro_batch_size else 1
    while True:
        plan = _fewest_passes(replace(config, micro_batch_size=size), machine, training)
        if size == smallest or not plan.missing:
            return plan
        size = max(smallest, size // 2)


def _fewest_passes(config: Configuration, machine: Machine, training: bool) -> Plan:
    """With the largest stream_batch_size that fits, or one micro-batch."""
    if config.engine != "streaming":
        return make_plan(config, machine, training)
    size = config.micro_batch_size
    micro_batches = ceil(config.batch_size / size)

    def plan(passes: int) -> Plan:
        together = ceil(micro_batches / passes) * size
        return make_plan(replace(config, stream_batch_size=together), machine, training)

    if config.stream_batch_size is not None:
        together = max(1, min(config.stream_batch_size // size, micro_batches)) * size
        fixed = make_plan(replace(config, stream_batch_size=together), machine, training)
        return replace(fixed, eval_sequences=together)
    passes = range(1, micro_batches)
    fewest = bisect_left(passes, True, key=lambda number: not plan(number).missing)
    return plan(fewest + 1)


def fewest_systems(config: Configuration, machine: Machine, training: bool = True) -> int | None:
    """The smallest number of such GPUs, 1 to 8 or whole machines, on which the model fits without
    offloading; None where the batch has too few sequences."""

    def fits(systems: int) -> bool:
        here = min(systems, PER_MACHINE)
        keys = {"num_systems": systems, "engine": "sharded", "shard_group_size": systems}
        keys |= {"offload": False, "reshard_after_forward": True, "micro_batch_size": 1}
        config_there = replace(config, activation_checkpointing=True, **keys)
        plan = make_plan(config_there, replace(machine, processes=here), training)
        return "device" not in plan.missing

    machines = range(2 * PER_MACHINE, config.batch_size + 1, PER_MACHINE)
    for counts in (range(1, min(PER_MACHINE, config.batch_size) + 1), machines):
        if (place := bisect_left(counts, True, key=fits)) < len(counts):
            return counts[place]
    return None
