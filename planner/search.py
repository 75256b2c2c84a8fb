"""The search for the fastest way to run a configuration that fits a machine."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from configuration import Configuration
from planner.costs import Plan, boundary_bytes, make_plan, rank_sequences, streaming_phases
from planner.machine import PER_MACHINE, Machine

MOST_TOKENS = {"CPU": 2048, "GPU": 32768}  # in a micro-batch: more is hardly faster
SIMILAR = 1.02  # times as slow as the fastest: then the least memory decides


def engine_plans(config: Configuration, machine: Machine, training: bool = True) -> list[Plan]:
    """Return the best plan of each possible engine, the preferred first."""
    engines = [config.engine]
    if config.engine == "auto":
        engines = ["resident", "streaming"] if config.num_systems == 1 else ["sharded"]
    return [engine_plan(replace(config, engine=e), machine, training) for e in engines]


def closest(plans: list[Plan]) -> Plan:
    """Return the first plan that fits, or the one with the fewest missing bytes."""
    return min(plans, key=lambda plan: sum(plan.missing.values()))


def engine_plan(config: Configuration, machine: Machine, training: bool) -> Plan:
    """Return the fastest plan of one engine that fits, or the closest to fitting."""
    choices = candidates(config, machine, training)
    plans = [largest_plan(choice, machine, training) for choice in choices]
    first = closest(plans)
    if first.missing:
        return first
    # host memory or other machines only where the devices of this one are not enough
    fitting = [plan for plan in plans if not plan.missing]
    near = [plan for plan in fitting if location(plan) == location(first)]
    enough = SIMILAR * min(plan.seconds for plan in near)
    fast = [plan for plan in near if plan.seconds <= enough]
    best = min(fast, key=memory_used)
    if config.engine == "streaming" and config.stream_batch_size is None:
        best.eval_sequences = most_eval_sequences(best, training)
    return best


def location(plan: Plan) -> tuple:
    """Return where the sharded engine keeps its shards."""
    return plan.config.offload, plan.config.shard_group_size


def memory_used(plan: Plan) -> tuple:
    """Return what similarly fast plans are ordered by: none should keep activations in host memory
    without need."""
    return plan.config.activation_location == "host", sum(plan.bytes.values())


def candidates(config: Configuration, machine: Machine, training: bool) -> Iterator[Configuration]:
    """Yield every way to replace the `auto` of an engine's keys, in order of preference."""
    recompute = [False, True] if training else [True]
    values = {}
    if config.engine == "streaming":
        values = {
            "activation_location": ["device", "host"] if machine.on_gpu else ["device"],
            "stream_to": ["ram", "disk"],
            "activation_checkpointing": recompute,
        }
    if config.engine == "sharded":
        groups = [config.num_systems]
        if machine.processes > 1 and config.num_systems % machine.processes == 0:
            groups.insert(0, machine.processes)  # a copy of the weights on each machine
        values = {
            "offload": [False, True] if machine.on_gpu else [False],
            "shard_group_size": groups,
            "activation_checkpointing": recompute,
            "reshard_after_forward": [False, True],
        }
    free = [key for key in values if getattr(config, key) in ("auto", None)]
    for choice in product(*(values[key] for key in free)):
        yield replace(config, **dict(zip(free, choice, strict=True)))


def largest_plan(config: Configuration, machine: Machine, training: bool) -> Plan:
    """Return the plan with the largest micro-batch that fits, or 1, and as few passes as fit."""
    if config.engine == "cerebras":  # it has no micro-batches
        return make_plan(replace(config, micro_batch_size=config.batch_size), machine, training)
    fast = max(1, MOST_TOKENS[machine.backend] // config.sequence_length)
    most = min(rank_sequences(config), config.stream_batch_size or config.batch_size)
    size = min(config.micro_batch_size or fast, most)
    while True:
        plan = fewest_passes(replace(config, micro_batch_size=size), machine, training)
        if config.micro_batch_size or size == 1 or not plan.missing:
            return plan
        size //= 2


def fewest_passes(config: Configuration, machine: Machine, training: bool) -> Plan:
    """Return the plan with the largest stream_batch_size that fits, or one micro-batch."""
    if config.engine != "streaming":
        return make_plan(config, machine, training)
    micro_batches = ceil(config.batch_size / config.micro_batch_size)

    def plan(together: int) -> Plan:
        sequences = together * config.micro_batch_size
        return make_plan(replace(config, stream_batch_size=sequences), machine, training)

    if config.stream_batch_size is not None:
        together = config.stream_batch_size // config.micro_batch_size
        return plan(min(together, micro_batches))
    passes = range(1, micro_batches)
    fewer = bisect_left(passes, True, key=lambda n: not plan(ceil(micro_batches / n)).missing)
    return plan(ceil(micro_batches / (fewer + 1)))


def most_eval_sequences(plan: Plan, training: bool) -> int:
    """Return how many sequences an evaluation sends through the layers together: with their sides
    of a block they take no more memory than a step does, or if there is none, than there is."""
    config = plan.config
    spare = plan.available["device"] - plan.bytes["device"]
    if training:
        step = max(streaming_phases(config, plan.machine, True).values())
        spare = step - max(streaming_phases(config, plan.machine, False).values())
    more = int(spare / (3 * boundary_bytes(config, config.micro_batch_size)))
    return config.stream_batch_size + more * config.micro_batch_size


def fewest_systems(config: Configuration, machine: Machine, training: bool = True) -> int | None:
    """Return the smallest number of such GPUs, 1 to 8 or whole machines, on which the model fits
    without offloading; None where the batch has too few sequences, or on a CPU."""
    smallest = replace(
        config,
        engine="sharded",
        micro_batch_size=1,
        activation_checkpointing=True,
        reshard_after_forward=True,
        offload=False,
    )

    def fits(systems: int) -> bool:
        there = replace(smallest, num_systems=systems, shard_group_size=systems)
        return "device" not in make_plan(there, machine, training).missing

    most = config.batch_size if machine.on_gpu else 0
    counts = [n for n in range(1, most + 1) if n <= PER_MACHINE or n % PER_MACHINE == 0]
    place = bisect_left(counts, True, key=fits)
    return counts[place] if place < len(counts) else None
