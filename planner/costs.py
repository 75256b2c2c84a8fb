"""What a run needs: bytes in each tier, and seconds of a step. docs/streaming.md and
docs/scale-out.md explain the arithmetic; bench/streaming.py compares it with measurements."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, log2, prod

from common.files import checked_count, read_sealed
from common.tokens import find_folder, sources_of
from configuration import Configuration
from engines.buffers import AHEAD
from engines.heap import GROWTH
from engines.store import BUFFERS, CHUNK
from loss import chunk_size
from planner.machine import Machine
from planner.measure import block, sizes

# The part of its matrix multiplication rate that a step reaches (docs/performance.md)
EFFICIENCY = {"CPU": 0.7, "GPU": 0.5}
# Bytes of a logit with what its loss needs (loss.py): in fp32 it is replaced by its gradient. In
# bf16 it has a copy in fp32, on a CPU of a few rows alone; Cerebras's package has all at once there
LOGIT_BYTES = {"CPU": {"fp32": 4, "bf16": 2}, "GPU": {"fp32": 4, "tf32": 4, "bf16": 8}}
UNCHUNKED_LOGIT_BYTES = 29
# glibc's heap fragments: multiply temporary memory by this, with and without resharding
FRAGMENTATION = {True: 2.0, False: 1.2}
# and it has holes that the arrays of the next micro-batch do not fit into: this part of the
# temporary memory, up to these bytes
HOLES = 0.7
MOST_HOLES = 300 * 10**6
LATER = 60 * 10**6  # bytes of the libraries that a run loads after it was planned
STATE_BYTES = 16  # a parameter: fp32 weight, gradient and two moments
CHECKPOINT_BYTES = 12  # a parameter: fp32 weight and two moments
TIERS = ("device", "host", "disk")
OVERLAP = 0.9  # of the shorter of compute and transfer in a phase
SPARE = 1.1  # times what comes and goes on a GPU, for fragments: blocks stay in the rest


@dataclass
class Phase:
    """A part of a step, in which compute and transfer overlap: the seconds of both, and the bytes
    that are copied to the device and from it."""

    compute: float
    transfer: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    overlap: float = OVERLAP

    @property
    def seconds(self) -> float:
        shorter, longer = sorted((self.compute, self.transfer))
        return longer + (1 - self.overlap) * shorter


@dataclass
class Plan:
    """How a configuration would run on a machine."""

    config: Configuration
    machine: Machine
    bytes: dict[str, int]  # needed, by tier; on a CPU those of the host count as the device's
    phases: list[Phase]  # of a step
    eval_sequences: int = 1  # that an evaluation sends through the layers together
    blocks_on_device: int = 0  # blocks that are streamed, but whose state stays there

    @property
    def available(self) -> dict[str, int]:
        return {tier: getattr(self.machine, tier) for tier in TIERS}

    @property
    def missing(self) -> dict[str, int]:
        """Return the bytes that are missing, by tier; empty if it fits."""
        missing = {tier: self.bytes[tier] - self.available[tier] for tier in TIERS}
        return {tier: number for tier, number in missing.items() if number > 0}

    def total(self, name: str) -> float:
        """Sum a field of the phases, such as `compute`, over a step."""
        return sum(getattr(phase, name) for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Return the seconds of a step."""
        return self.total("seconds")

    @property
    def limit(self) -> str:
        return "transfer" if self.total("transfer") > self.total("compute") else "compute"

    @property
    def all_evals_seconds(self) -> float:
        """Return the seconds of all evaluations. A forward pass takes a third of a step."""
        config = self.config
        each = self.seconds * eval_tokens(config) / (3 * step_tokens(config))
        return ceil(config.num_steps / config.eval_steps) * each

    @property
    def run_seconds(self) -> float:
        """Return the seconds of the whole run, with its evaluations and saves."""
        config = self.config
        saves = ceil(config.num_steps / config.checkpoint_steps)
        saving = saves * (checkpoint_bytes(config) / self.machine.write)
        return config.num_steps * self.seconds + self.all_evals_seconds + saving


def make_plan(
    config: Configuration, machine: Machine, training: bool = True, blocks: int | None = None
) -> Plan:
    """Return the plan of a configuration whose keys are all resolved. `blocks` are those whose
    state stays on the device while the model is streamed; None: as many as fit."""
    eval_sequences = config.batch_size
    if config.engine == "streaming":
        tiers = streaming_bytes(config, machine, training)
        if blocks is None:
            blocks = fitting_blocks(config, machine, training, tiers["device"])
        staying = STATE_BYTES * blocks * sizes(config).block
        tiers["device"] += staying
        tiers["host" if config.stream_to == "ram" else "disk"] -= staying
        phases = streaming_step(config, machine, blocks)
        eval_sequences = config.stream_batch_size
    elif config.engine == "sharded":
        tiers = sharded_bytes(config, machine, training)
        phases = [sharded_step(config, machine)]
    else:
        tiers = resident_bytes(config, machine, training)
        phases = [Phase(compute_seconds(config, machine, step_flops(config)))]
    # the optimizer reads and writes the state once; when it streams, in the next forward pass
    state = STATE_BYTES * count(config) / (config.shard_group_size or 1)
    phases[0].compute += 2 * state / machine.bandwidth
    return Plan(config, machine, tiers, phases, eval_sequences, blocks or 0)


# The model and the data


def count(config: Configuration) -> int:
    """Return the number of the model's parameters."""
    return sizes(config).total


def headline(config: Configuration) -> str:
    """Return a line that says what runs, and how."""
    return (
        f"{count(config):,} parameters, {config.engine} engine on {config.backend}, "
        f"{config.precision}, {step_tokens(config):,} tokens a step"
    )


def checkpoint_bytes(config: Configuration) -> int:
    return CHECKPOINT_BYTES * count(config)


def step_tokens(config: Configuration) -> int:
    return config.batch_size * config.sequence_length


def rank_sequences(config: Configuration) -> int:
    """Return the sequences of a batch for the rank that has most."""
    return ceil(config.batch_size / config.num_systems)


@lru_cache(maxsize=64)
def tokens_of(folder: str, split: str) -> int:
    """Return the tokens of a split of a dataset; 0 if it is not there."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return checked_count(read_sealed(find_folder(folder) / "meta.json")["tokens"][split])
    return 0


def epochs(config: Configuration) -> dict[str, float]:
    """Return how often a run sees each source of its data that is there."""
    weights = sources_of(config.dataset)
    tokens = step_tokens(config) * config.num_steps / sum(weights.values())
    there = {name: tokens_of(name, "train") for name in weights}
    return {name: tokens * weights[name] / size for name, size in there.items() if size}


def eval_tokens(config: Configuration) -> int:
    """Return the tokens of an evaluation; 0 if the dataset is not there."""
    there = sum(tokens_of(name, "val") for name in sources_of(config.dataset))
    if config.eval_batches is None:
        return there
    return min(there, config.eval_batches * step_tokens(config))


# Bytes, by tier


def element_bytes(config: Configuration) -> int:
    """Return the bytes of an element in the precision that the model computes with."""
    return 2 if config.precision == "bf16" else 4


def boundary_bytes(config: Configuration, sequences: int) -> int:
    """Return the bytes of the activations between two blocks."""
    return sequences * config.sequence_length * config.width * element_bytes(config)


def kept_bytes(config: Configuration) -> int:
    """Return the bytes that a block keeps of a micro-batch for its backward pass."""
    return config.micro_batch_size * block(config).kept_bytes


def passing_bytes(config: Configuration) -> int:
    """Return the bytes that come and go while a micro-batch is in a block, beside those kept."""
    one = block(config)
    gradient = 6 if config.precision == "bf16" else 4  # a bf16 one is summed in fp32
    passing = config.micro_batch_size * (one.peak_bytes - one.kept_bytes)
    return passing + gradient * sizes(config).matrix


def loss_bytes(config: Configuration) -> int:
    """Return the bytes of the logits that exist at one time, with what their loss needs."""
    positions = config.sequence_length * config.micro_batch_size
    if config.engine == "cerebras":
        return UNCHUNKED_LOGIT_BYTES * positions * config.vocab_size
    device = "cpu" if config.backend == "CPU" else "cuda"
    rows = min(positions, chunk_size(device, config.vocab_size))
    return LOGIT_BYTES[config.backend][config.precision] * rows * config.vocab_size


def table_bytes(config: Configuration) -> int:
    """Return the bytes of the gradient of the embedding's table, in fp32."""
    return 4 * config.vocab_size * config.width


def tier_bytes(
    config: Configuration, machine: Machine, device: float, host: float = 0, disk: float = 0
) -> dict[str, int]:
    """Return the bytes in each tier, with those of the program and of a batch of ids."""
    ids = rank_sequences(config) * config.sequence_length
    host += 4 * ids + 64 * rank_sequences(config) + machine.program
    if machine.on_gpu:
        device += 8 * ids
        host += 8 * ids
    else:
        device += host + LATER
        host = 0
    return {"device": int(device), "host": int(host), "disk": int(disk)}


def resident_bytes(config: Configuration, machine: Machine, training: bool) -> dict[str, int]:
    """Return the bytes of the weights, of their state and of a micro-batch in all blocks."""
    each = STATE_BYTES if training else 4
    if config.precision == "bf16":
        each += 2
    in_block = passing_bytes(config) if training else kept_bytes(config)
    temporary = max(in_block, loss_bytes(config))
    if training:
        temporary += config.depth * kept_bytes(config)
    return tier_bytes(config, machine, each * count(config) + heap_bytes(temporary, machine))


def heap_bytes(temporary: float, machine: Machine) -> float:
    """Return the bytes that the heap takes for arrays that come and go."""
    if machine.on_gpu:
        return temporary
    return FRAGMENTATION[False] * temporary + min(HOLES * temporary, MOST_HOLES)


def streaming_bytes(config: Configuration, machine: Machine, training: bool) -> dict[str, int]:
    """Return the bytes of the phase of a pass that needs most, and of the parameter store."""
    size = sizes(config)
    ends = max(size.embedding, size.head)
    each = STATE_BYTES if training else 4
    state = each * count(config)
    chunk = min(CHUNK[config.stream_to], max(size.block, ends))  # elements
    device = max(streaming_phases(config, machine, training).values())
    host = state if config.stream_to == "ram" else BUFFERS * each * chunk
    disk = state if config.stream_to == "disk" else 0
    # a block and an end that are drawn or loaded, 8 bytes a parameter
    drawn = 8 * (size.block + ends)
    if machine.on_gpu:
        device += (AHEAD + 1) * (each + 4) * chunk  # staging, of all kinds and of gradients
        host += drawn
        if training and config.activation_checkpointing and config.activation_location == "host":
            host += config.depth * boundary_bytes(config, config.stream_batch_size)
    else:
        device = max(device, drawn)
    return tier_bytes(config, machine, device, host, disk)


def fitting_blocks(config: Configuration, machine: Machine, training: bool, needed: float) -> int:
    """Return how many blocks' state fits on a GPU beside what training needs there: none if inputs
    of blocks are offloaded, as these take as long to return as the state to arrive."""
    if not (training and machine.on_gpu) or config.activation_location == "host":
        return 0
    fitting = (machine.device - SPARE * needed) / (STATE_BYTES * sizes(config).block)
    return max(0, min(config.depth, int(fitting)))


def streaming_phases(config: Configuration, machine: Machine, training: bool) -> dict[str, float]:
    """Return the bytes of the tensors on the device in each phase of a pass (docs/streaming.md)."""
    size = sizes(config)
    boundary = boundary_bytes(config, config.stream_batch_size)
    ahead = min(2, config.depth) * size.block  # weights of two blocks that are fetched ahead
    ends = max(size.embedding, size.head)
    visited = max(min(3, config.depth) * size.block, ends + ahead)
    in_block = passing_bytes(config) + kept_bytes(config)
    inputs = 0  # what is kept of every block
    if training and not config.activation_checkpointing:
        inputs = config.depth * config.stream_batch_size * block(config).kept_bytes
        in_block = passing_bytes(config)
    elif training and not (machine.on_gpu and config.activation_location == "host"):
        inputs = config.depth * boundary
    common = 16 * config.stream_batch_size * config.sequence_length  # ids and targets
    if config.activation_checkpointing and not machine.on_gpu:
        common += GROWTH

    def needed(weights: int, boundaries: int, gradients: int = 0, temporary: int = 0) -> float:
        """Return the bytes of a phase with so many weights, boundaries and fp32 gradients, and
        these temporary bytes beside what is kept."""
        tensors = element_bytes(config) * weights + 4 * gradients + boundaries * boundary
        return tensors + heap_bytes(inputs + temporary, machine) + common

    gradients = size.head if training else 0
    phases = {
        "embedding": needed(size.embedding + ahead, boundaries=2),
        "forward": needed(visited, boundaries=2, temporary=in_block),
        "head": needed(size.head + ahead, 2, gradients, temporary=loss_bytes(config)),
    }
    if training:
        lookup = 8 * config.micro_batch_size * config.sequence_length * config.width
        if machine.on_gpu:
            lookup = table_bytes(config)
        gradients = max(ahead, ends + size.block)
        phases["backward"] = needed(visited, 1, gradients, temporary=in_block)
        gradients = size.block + size.embedding
        phases["lookup"] = needed(size.embedding + ahead, 1, gradients, temporary=lookup)
    return phases


def sharded_bytes(config: Configuration, machine: Machine, training: bool) -> dict[str, int]:
    """Return the bytes that each rank needs (docs/scale-out.md)."""
    size = sizes(config)
    element = element_bytes(config)
    largest = max(size.block, size.outside)
    boundary = boundary_bytes(config, config.micro_batch_size)
    state = (STATE_BYTES if training else 4) * size.total / config.shard_group_size
    gathered = size.total
    if config.reshard_after_forward:
        gathered = size.outside + min(2, config.depth) * size.block
    # weights come in one piece and are then copied
    device = element * (gathered + largest) + loss_bytes(config)
    if training:
        device += element * size.outside + (element + 4) * largest  # gradients on their way
        device += sum_bytes(config)
        # gradients of the table: the loss's, a GPU's lookup's, and one on its way to the sum
        device += (3 if machine.on_gpu else 1) * table_bytes(config)
    if not training:
        device += kept_bytes(config) + 2 * boundary
    elif config.activation_checkpointing:
        device += kept_bytes(config) + config.depth * boundary
    else:
        device += config.depth * kept_bytes(config)
    if not machine.on_gpu:
        device *= FRAGMENTATION[config.reshard_after_forward]
    if not config.offload:
        return tier_bytes(config, machine, device + state)
    # the shards of weights and gradients are pinned, which rounds each up to a power of two
    shards = ((ceil(rows / config.shard_group_size), *rest) for rows, *rest in size.shapes)
    pinned = 2 * sum(2 ** ceil(log2(4 * prod(shape))) for shape in shards)
    unpinned = state - 8 * size.total / config.shard_group_size
    return tier_bytes(config, machine, device + 4 * largest, unpinned + pinned)


def sum_bytes(config: Configuration) -> float:
    """Return the bytes in which a rank of the sharded engine sums gradients over micro-batches."""
    if rank_sequences(config) <= config.micro_batch_size:
        return 0
    if not config.reshard_after_forward:
        return 4 * count(config)
    if config.shard_group_size < config.num_systems:
        return 4 * count(config) / config.shard_group_size
    return 0  # they are summed in the shards


# Seconds


def step_flops(config: Configuration) -> float:
    """Return the FLOPs of a step: those of its blocks, and 6 a token and parameter of the head."""
    return 6 * step_tokens(config) * sizes(config).head + block_flops(config)


def block_flops(config: Configuration) -> float:
    """Return the FLOPs of a step's blocks: the backward pass is twice the forward, and recomputing
    comes on top."""
    one = block(config)
    flops = 3 * one.flops
    if config.activation_checkpointing is True and config.engine in ("streaming", "sharded"):
        flops += one.flops_again
    return config.batch_size * config.depth * flops


def flops_per_token(config: Configuration) -> int:
    """Return the FLOPs of training a token: 6 a parameter, the embedding's too (Kaplan et al. 2020,
    2.1, leave these out), without attention's own products."""
    return 6 * count(config)


def compute_seconds(config: Configuration, machine: Machine, flops: float) -> float:
    """Return the seconds in which the rank that has most does its share of these FLOPs."""
    rank_fraction = rank_sequences(config) / config.batch_size
    return flops * rank_fraction / (EFFICIENCY[machine.backend] * machine.matmul)


def streaming_step(config: Configuration, machine: Machine, staying: int) -> list[Phase]:
    """Return the forward passes of a step, and the backward passes with the loss. The state of
    `staying` blocks is on the device."""
    forward_flops = config.batch_size * config.depth * block(config).flops
    flops = (forward_flops, step_flops(config) - forward_flops)
    phases = []
    for work, (bytes_in, bytes_out) in zip(flops, moved_bytes(config, staying), strict=True):
        transfer = max(bytes_in, bytes_out) / machine.link
        if config.stream_to == "disk":  # one drive does both
            transfer = max(transfer, bytes_in / machine.read + bytes_out / machine.write)
        compute = compute_seconds(config, machine, work)
        phases.append(Phase(compute, transfer, bytes_in, bytes_out))
    return phases


def moved_bytes(config: Configuration, staying: int = 0) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the bytes that a step of the streaming engine copies to the device and from it, in its
    forward passes, and with the loss in its backward passes.

    Forward the state with its update, 16 in and 12 out a parameter; backward the weight in and the
    gradient out, 4 and 4. The embedding is fetched again at the end; a tied one is fetched for the
    head too, and has two gradients. The last block is still there, and each further pass fetches
    weights and adds to gradients. The blocks whose state stays there move nothing."""
    size = sizes(config)
    size = replace(size, blocks=size.blocks - staying * size.block)
    passes = ceil(config.batch_size / config.stream_batch_size)
    again = size.head + max(0, size.blocks - size.block) + size.embedding
    gradients = passes * (size.embedding + size.blocks + size.head)
    added = gradients - size.total  # what gradients are added to
    forward_in = 12 * size.total + passes * 4 * (size.embedding + size.blocks)
    backward_in = passes * 4 * again + 4 * added
    return (forward_in, 12 * size.total), (backward_in, 4 * gradients)


def sharded_step(config: Configuration, machine: Machine) -> Phase:
    """Return the step of a rank, which receives weights and gradients.

    With reshard_after_forward the blocks are gathered twice and gradients scattered once a
    micro-batch, without it once a step; the replicas then all-reduce theirs once a step."""
    size = sizes(config)
    shards = config.shard_group_size
    copies = config.num_systems // shards
    times = 1
    gathered = size.total
    if config.reshard_after_forward:
        times = ceil(rank_sequences(config) / config.micro_batch_size)
        gathered = 2 * size.blocks + size.outside
    per_gather = element_bytes(config) * gathered + 4 * size.total
    from_shards = times * per_gather * (shards - 1) / shards
    from_copies = 2 * (copies - 1) / copies * 4 * size.total / shards
    near = machine.network if shards <= machine.processes else machine.fabric
    far = machine.network if config.num_systems <= machine.processes else machine.fabric
    seconds = from_shards / near + from_copies / far
    if config.offload:  # fp32 shards in and gradients out, and the update in host memory
        moved = 4 * times * (gathered + size.total) + STATE_BYTES * size.total
        seconds += moved / shards / machine.link
    received = int(from_shards + from_copies)
    compute = compute_seconds(config, machine, step_flops(config))
    overlap = OVERLAP if machine.on_gpu else 0.0  # Gloo's threads share the cores
    return Phase(compute, seconds, received, received, overlap)
