"""What a run needs: bytes in each tier, and seconds of a step. docs/streaming.md and
docs/scale-out.md explain the arithmetic; bench/streaming.py compares it with measurements."""

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf, log2, prod

from configuration import Configuration
from engines.base import has_own_operations, has_sparse_lookup, loss_rows
from engines.buffers import AHEAD
from engines.store import BUFFERS, CHUNK
from planner.machine import Machine
from planner.measure import block, sizes
from runtime.files import count_of, read_sealed
from runtime.tokens import find_folder

# The part of its matrix multiplication rate that a step reaches (docs/performance.md)
EFFICIENCY = {"CPU": 0.7, "GPU": 0.5}
# Bytes of a logit with what its loss needs: itself, its log-softmax and two gradients in fp32, in
# bf16 one more of each; on a CPU as the heap grew (docs/performance.md)
LOGIT_BYTES = {
    ("GPU", "fp32"): 16,
    ("GPU", "tf32"): 16,
    ("GPU", "bf16"): 20,
    ("CPU", "fp32"): 29,
    ("CPU", "bf16"): 24,
}
# Itself and its gradient in one place, and one in fp32, which on a CPU is of a few rows (loss.py)
CHUNKED_LOGIT_BYTES, CACHED_LOGIT_BYTES = 8, 4
# glibc's heap fragments: multiply temporary memory by this, with and without resharding
FRAGMENTATION = {True: 2.0, False: 1.2}
STATE_BYTES = 16  # a parameter: fp32 weight, gradient and two moments
CHECKPOINT_BYTES = 12  # a parameter: fp32 weight and two moments
TIERS = ("device", "host", "disk")
OVERLAP = 0.9  # of the shorter of compute and transfer in a phase


@dataclass
class Plan:
    """How a configuration would run on a machine."""

    config: Configuration
    machine: Machine
    bytes: dict[str, int]  # needed, by tier; on a CPU the device's are the host's
    bytes_in: int  # that a step copies to the device
    bytes_out: int
    phases: list[tuple[float, float]]  # of a step: seconds of compute and of transfer
    overlap: float  # of the shorter of both runs beside the longer
    eval_tokens: int = 0  # of an evaluation
    eval_sequences: int = 1  # that go through the layers together

    @property
    def available(self) -> dict[str, int]:
        return {tier: getattr(self.machine, tier) for tier in TIERS}

    @property
    def missing(self) -> dict[str, int]:
        """Bytes that are missing, by tier; empty if it fits."""
        return {t: n - self.available[t] for t, n in self.bytes.items() if n > self.available[t]}

    @property
    def compute(self) -> float:
        return sum(compute for compute, _ in self.phases)

    @property
    def transfer(self) -> float:
        return sum(transfer for _, transfer in self.phases)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(max(phase) + (1 - self.overlap) * min(phase) for phase in self.phases)

    @property
    def limit(self) -> str:
        return "transfer" if self.transfer > self.compute else "compute"

    @property
    def eval_seconds(self) -> float:
        """Of an evaluation: a forward pass is a third of the work."""
        return self.seconds * self.eval_tokens / (3 * step_tokens(self.config))

    @property
    def save_seconds(self) -> float:
        return checkpoint_bytes(self.config) / self.machine.write

    @property
    def all_evals_seconds(self) -> float:
        return ceil(self.config.num_steps / self.config.eval_steps) * self.eval_seconds

    @property
    def run_seconds(self) -> float:
        """Of the whole run, with its evaluations and saves."""
        saves = ceil(self.config.num_steps / self.config.checkpoint_steps) * self.save_seconds
        return self.seconds * self.config.num_steps + self.all_evals_seconds + saves


def make_plan(config: Configuration, machine: Machine, training: bool = True) -> Plan:
    """The plan of a configuration without any `auto`."""
    needs = {"streaming": streaming_bytes, "sharded": sharded_bytes}
    tiers = needs.get(config.engine, resident_bytes)(config, machine, training)
    share, state = rank_sequences(config) / config.batch_size, STATE_BYTES * count(config)
    if config.engine == "sharded":
        state /= config.shard_group_size
    rate = EFFICIENCY[machine.backend] * machine.matmul / share
    update = 2 * state / machine.bandwidth  # read and written once by the optimizer
    bytes_in, bytes_out, overlap = 0, 0, OVERLAP
    if config.engine == "streaming":  # an update is part of the next step's forward pass
        forward, backward = moved_bytes(config)
        bytes_in, bytes_out = (a + b for a, b in zip(forward, backward, strict=True))
        flops = config.batch_size * config.depth * block(config).flops
        phases = [
            (flops / rate + update, transfer_seconds(config, machine, *forward)),
            ((step_flops(config) - flops) / rate, transfer_seconds(config, machine, *backward)),
        ]
    else:
        phases = [(step_flops(config) / rate + update, 0.0)]
    if config.engine == "sharded":
        bytes_in = bytes_out = sum(exchanged_bytes(config))
        phases = [(phases[0][0], exchange_seconds(config, machine))]
        overlap = OVERLAP if machine.on_gpu else 0.0  # Gloo's threads share the cores
    tiers = {tier: int(number) for tier, number in tiers.items()}
    moved = (int(bytes_in), int(bytes_out))
    plan = Plan(config, machine, tiers, *moved, phases, overlap, eval_tokens(config))
    plan.eval_sequences = config.batch_size
    if config.engine == "streaming":  # what memory is left holds the two sides of a block
        spare = 0 if plan.missing else plan.available["device"] - plan.bytes["device"]
        more = spare // (3 * boundary_bytes(config, 1)) // config.micro_batch_size
        plan.eval_sequences = config.stream_batch_size + more * config.micro_batch_size
    return plan


def count(config: Configuration) -> int:
    """The model's parameters."""
    return sizes(config).total


def headline(config: Configuration) -> str:
    """What runs, and how, in a line."""
    return (
        f"{count(config):,} parameters, {config.engine} engine on {config.backend}, "
        f"{config.precision}, {step_tokens(config):,} tokens a step"
    )


def checkpoint_bytes(config: Configuration) -> int:
    return CHECKPOINT_BYTES * count(config)


def step_tokens(config: Configuration) -> int:
    return config.batch_size * config.sequence_length


def rank_sequences(config: Configuration) -> int:
    """Sequences of a batch for the rank that has most."""
    return ceil(config.batch_size / config.num_systems)


@lru_cache(maxsize=16)
def _val_tokens(dataset: str) -> int:
    with suppress(OSError, ValueError, LookupError, TypeError):
        return count_of(read_sealed(find_folder(dataset) / "meta.json")["tokens"]["val"])
    return 0


def eval_tokens(config: Configuration) -> int:
    """Tokens of an evaluation; 0 if the dataset is not there."""
    most = inf if config.eval_batches is None else config.eval_batches * step_tokens(config)
    return min(most, _val_tokens(config.dataset))


# Bytes, by tier


def number_bytes(config: Configuration) -> int:
    """Of a number that the model computes with."""
    return 2 if config.precision == "bf16" else 4


def boundary_bytes(config: Configuration, sequences: int) -> int:
    """Of the activations between two blocks."""
    return sequences * config.sequence_length * config.width * number_bytes(config)


def head_bytes(config: Configuration, training: bool = True) -> int:
    """The logits of `loss_rows` positions with what their loss needs, the table's gradient, and
    where a lookup is not sparse, its gradient and its copy of the table in fp32."""
    size = config.micro_batch_size or config.batch_size  # the cerebras engine on a CPU
    rows, each = config.sequence_length * size, None
    if config.engine != "cerebras" and rows >= loss_rows(config):
        chunked = CACHED_LOGIT_BYTES if has_own_operations(config) else CHUNKED_LOGIT_BYTES
        rows, each = loss_rows(config), chunked if training else None
    logits = (each or LOGIT_BYTES[config.backend, config.precision]) * rows * config.vocab_size
    tables = (1 if has_sparse_lookup(config) else 3) if training else 0
    return logits + tables * 4 * config.vocab_size * config.width


def resident_bytes(config: Configuration, machine: Machine, training: bool) -> dict[str, float]:
    each = (STATE_BYTES if training else 4) + (2 if config.precision == "bf16" else 0)
    sequences = config.micro_batch_size or config.batch_size  # the cerebras engine on a CPU
    activations = sequences * block(config).kept_bytes * (config.depth if training else 1)
    device = count(config) * each + activations + head_bytes(config, training)
    return _tiers(machine, device, 0, 0)


def streaming_bytes(config: Configuration, machine: Machine, training: bool) -> dict[str, float]:
    """The largest of what the phases of a step need (docs/streaming.md)."""
    size, number = sizes(config), number_bytes(config)
    two, three = (min(n, config.depth) * size.block for n in (2, 3))
    boundary = boundary_bytes(config, config.stream_batch_size)
    one = block(config).kept_bytes * config.micro_batch_size
    matrix = size.matrix * (number + (4 if number == 2 else 0))  # a matrix's own gradient
    heap = 1 if machine.on_gpu else FRAGMENTATION[False]
    inputs, kept = 0, 0
    if training and config.activation_checkpointing:
        inputs = config.depth * boundary
    elif training:
        kept = config.stream_batch_size * block(config).kept_bytes * config.depth
        kept *= heap
    on_host = inputs and config.activation_location == "host"
    on_device = kept + (0 if on_host else inputs)
    in_fp32 = number == 2 and not has_sparse_lookup(config)
    lookup = 4 * config.vocab_size * config.width if in_fp32 else 0
    ends = max(size.embedding, size.head)
    weights = number * max(three, ends + two)  # of a visit and of those two ahead
    phases = [
        weights + 2 * boundary + on_device,
        number * (size.embedding + two) + lookup + 2 * boundary,
        number * (size.head + two) + heap * head_bytes(config, training) + 2 * boundary,
    ]
    phases[0] += 0 if kept else one
    phases[2] += on_device
    if training:
        gradients = 4 * max(two, ends + size.block)
        phases[2] += 4 * size.head
        phases.append(weights + gradients + boundary + one + matrix + on_device)
    largest, kinds = max(size.block, ends), 4 if training else 1
    chunk = 4 * min(CHUNK[config.stream_to], largest)
    staging = (AHEAD + 1) * (kinds + 1) * chunk
    state = count(config) * (STATE_BYTES if training else 4)
    # an array of a layer, and a tensor for it, when it is loaded or saved
    whole = 4 * largest + 4 * size.matrix
    host = config.depth * boundary if on_host else 0
    host += state if config.stream_to == "ram" else BUFFERS * kinds * chunk
    if machine.on_gpu:
        device, host = max(phases) + staging, host + whole
    else:
        device = max(*phases, whole + on_device - kept)
    return _tiers(machine, device, host, state if config.stream_to == "disk" else 0)


def sharded_bytes(config: Configuration, machine: Machine, training: bool) -> dict[str, float]:
    """What each rank needs (docs/scale-out.md)."""
    size, number = sizes(config), number_bytes(config)
    state = (STATE_BYTES if training else 4) * size.total / config.shard_group_size
    largest, two = max(size.block, size.outside), min(2, config.depth) * size.block
    device = number * ((size.outside + two) if config.reshard_after_forward else size.total)
    device += number * largest  # gathered weights come in one piece and are then copied
    boundary = boundary_bytes(config, config.micro_batch_size)
    one = config.micro_batch_size * block(config).kept_bytes
    if not training:
        device += one + 2 * boundary
    else:
        device += config.depth * (boundary if config.activation_checkpointing else one)
        device += one if config.activation_checkpointing else 0
        device += number * size.outside + (number + 4) * largest  # gradients on their way
        if rank_sequences(config) > config.micro_batch_size:  # and what they are added to
            if not config.reshard_after_forward:
                device += 4 * size.total
            elif config.shard_group_size < config.num_systems:
                device += 4 * size.total / config.shard_group_size
    device += head_bytes(config, training)
    if not machine.on_gpu:
        device *= FRAGMENTATION[config.reshard_after_forward]
    if config.offload:  # weights and gradients are pinned
        pinned = 2 * (_pinned_bytes(config) - 4 * size.total / config.shard_group_size)
        return _tiers(machine, device + 4 * largest, state + pinned, 0)
    return _tiers(machine, device + state, 0, 0)


def _pinned_bytes(config: Configuration) -> int:
    """Of the fp32 shards of the weights: pinning rounds each up to a power of two."""
    shards = ((ceil(s[0] / config.shard_group_size), *s[1:]) for s in sizes(config).shapes)
    return sum(2 ** ceil(log2(4 * prod(shape))) for shape in shards)


def _tiers(machine: Machine, device: float, host: float, disk: float) -> dict[str, float]:
    if machine.on_gpu:
        return {"device": device, "host": host + machine.program, "disk": disk}
    return {"device": device + host + machine.program, "host": 0, "disk": disk}


# Work


def step_flops(config: Configuration) -> float:
    """FLOPs of a step: those of its blocks, and 6 a token and parameter of the head."""
    return 6 * step_tokens(config) * sizes(config).head + block_flops(config)


def block_flops(config: Configuration) -> float:
    """Of a step's blocks: the backward pass is twice the forward; recomputation comes on top."""
    one = block(config)
    recomputing = config.engine in ("streaming", "sharded")
    again = one.flops_again if recomputing and config.activation_checkpointing is True else 0
    return config.batch_size * config.depth * (3 * one.flops + again)


def flops_per_token(config: Configuration) -> int:
    """Of training: 6 a parameter (Kaplan et al. 2020, 2.1), without attention's own products."""
    return 6 * count(config)


def moved_bytes(config: Configuration) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes that a step of the streaming engine copies to the device and from it, in its forward
    passes, and with the loss in its backward passes.

    Forward the state with its update, 16 in and 12 out a parameter; backward the weight in and the
    gradient out, 4 and 4. The embedding is fetched again at the end, and with a tied head before
    it and has two gradients; the last block stays on the device, and each further pass fetches
    weights and adds to gradients."""
    size = sizes(config)
    passes = ceil(config.batch_size / config.stream_batch_size)
    again = size.head + (size.blocks - size.block) + size.embedding
    gradients = size.embedding + size.blocks + size.head
    added = passes * gradients - size.total  # what gradients are added to
    once = size.embedding + size.blocks
    forward = (12 * size.total + passes * 4 * once, 12 * size.total)
    return forward, (passes * 4 * again + 4 * added, passes * 4 * gradients)


def transfer_seconds(config: Configuration, machine: Machine, inward: int, outward: int) -> float:
    """In which the streaming engine copies so many bytes to and from the device."""
    seconds = max(inward, outward) / machine.link
    if config.stream_to == "disk":  # one drive does both
        seconds = max(seconds, inward / machine.read + outward / machine.write)
    return seconds


def _gathers(config: Configuration) -> tuple[int, int]:
    """How often a step of the sharded engine gathers weights, and how many of them each time."""
    size = sizes(config)
    if config.reshard_after_forward:
        times = ceil(rank_sequences(config) / config.micro_batch_size)
        return times, 2 * size.blocks + size.outside
    return 1, size.total


def exchanged_bytes(config: Configuration) -> tuple[float, float]:
    """Bytes that a rank receives from those it shares a copy with, and from other copies.

    With reshard_after_forward the blocks are gathered twice and gradients scattered once a
    micro-batch, without it once a step; the copies then sum theirs once a step."""
    times, gathered = _gathers(config)
    others = (config.shard_group_size - 1) / config.shard_group_size
    copies = config.num_systems // config.shard_group_size
    inside = times * others * (number_bytes(config) * gathered + 4 * count(config))
    return inside, 2 * (copies - 1) / copies * 4 * count(config) / config.shard_group_size


def exchange_seconds(config: Configuration, machine: Machine) -> float:
    """Seconds of a step in which a rank's shards, and with `offload` the host's, are moved."""
    inside, across = exchanged_bytes(config)
    near = machine.network if config.shard_group_size <= machine.processes else machine.fabric
    far = machine.fabric if config.num_systems > machine.processes else machine.network
    seconds = inside / near + across / far
    if config.offload:  # fp32 shards in and gradients out, and the update in host memory
        times, gathered = _gathers(config)
        moved = 4 * times * (gathered + count(config))
        state = STATE_BYTES * count(config)
        seconds += (moved + state) / config.shard_group_size / machine.link
    return seconds
