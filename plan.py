"""What a run will take, before anything is allocated: python plan.py CONFIG [--key value ...]

Which engine, how the step is cut, bytes in each tier, seconds a step and days to the end; and where
it does not fit, what is missing and what would fit. The arithmetic is explained in
docs/streaming.md and docs/scale-out.md; bench/streaming.py holds it against what was measured.
"""

import json
import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from math import ceil, inf, log2, nan, prod
from pathlib import Path

import torch

from configuration import MODEL_KEYS, Configuration, parse_configuration, read_yaml
from dataset import find_folder
from engines import LOSS_ROWS
from engines.store import BUFFERS, CHUNK, remove_abandoned
from errors import UserError, command
from files import count_of, read_sealed
from machine import (
    DEVICES,
    PER_MACHINE,
    Machine,
    has_bf16_units,
    named_machine,
    parse_bytes,
    store_folder,
    this_machine,
)
from model import GPT, GPTConfig

MOST_TOKENS = {"CPU": 2048, "GPU": 32768}  # in a micro-batch: more is hardly faster
# Of the rate of its matrix products a whole step reaches (CPU: docs/log.md; GPU: the 49 to 60% of
# llm.c and KempnerForge, both in the project's DESIGN.md)
EFFICIENCY = {"CPU": 0.7, "GPU": 0.5}
# A logit: itself, its log-softmax and two gradients in fp32, in bf16 itself and one gradient too;
# on a CPU as the heap grew when it kept what was freed (docs/log.md)
LOGIT_BYTES = {
    ("GPU", "fp32"): 16,
    ("GPU", "tf32"): 16,
    ("GPU", "bf16"): 20,
    ("CPU", "fp32"): 29,
    ("CPU", "bf16"): 24,
}
CHUNKED_LOGIT_BYTES = 8  # itself and its gradient in one place, and one in fp32 (loss.py)
# Times what comes and goes, that is what it takes in a CPU's heap, whose holes are not filled; by
# `reshard`, which makes it come and go more often (docs/log.md)
HOLES = {True: 2.0, False: 1.2}
ENGINES = ("resident", "streaming")  # of one system; of several: sharded
RECOMPUTING = ("streaming", "sharded")
STATE_BYTES = 16  # a parameter: fp32 weight, gradient and two moments
CHECKPOINT_BYTES = 12  # a parameter: fp32 weight and two moments
# What, beside the micro-batch, another choice would round differently
CUT = ("pass_size", "recompute", "shards", "reshard")
TIERS = ("device", "host", "disk")
RATES = ("products", "bandwidth", "link", "read", "write", "network", "fabric")
HIDDEN = 0.9  # of what moves runs beside what computes, or the other way round


@dataclass
class Plan:
    """How a configuration would run on a machine. `lacks` says in which tiers it does not fit."""

    config: Configuration
    machine: Machine
    bytes: dict[str, int]  # needed, by tier; on a CPU the device's are the host's
    inward: int  # bytes that a step brings to the device
    outward: int  # and takes from it
    compute: float  # seconds of a step
    transfer: float
    hidden: float  # part of the shorter of the two that runs beside the longer
    eval_tokens: int = 0  # of an evaluation

    @property
    def has(self) -> dict[str, int]:
        return {tier: getattr(self.machine, tier) for tier in TIERS}

    @property
    def lacks(self) -> dict[str, int]:
        """Missing bytes by tier."""
        return {t: n - self.has[t] for t, n in self.bytes.items() if n > self.has[t]}

    @property
    def seconds(self) -> float:
        """Of a step."""
        longer, shorter = max(self.compute, self.transfer), min(self.compute, self.transfer)
        return longer + (1 - self.hidden) * shorter

    @property
    def limit(self) -> str:
        return "transfer" if self.transfer > self.compute else "compute"

    @property
    def eval_seconds(self) -> float:
        """Of an evaluation, which is a forward pass: a third of the work."""
        return self.seconds * self.eval_tokens / (3 * step_tokens(self.config))

    @property
    def save_seconds(self) -> float:
        return CHECKPOINT_BYTES * count(self.config) / self.machine.write

    @property
    def evaluations(self) -> int:
        return ceil(self.config.num_steps / self.config.eval_steps)

    @property
    def run_seconds(self) -> float:
        """Of the whole run, with its evaluations and saves."""
        saves = ceil(self.config.num_steps / self.config.checkpoint_steps) * self.save_seconds
        return self.seconds * self.config.num_steps + self.evaluations * self.eval_seconds + saves

    @property
    def days(self) -> float:
        return self.run_seconds / 86400


def resolve(config: Configuration, chosen: dict, training: bool = True, here: int = 1) -> Plan:
    """The plan of a run on this machine, which has `here` of its systems; its config has every
    `auto` replaced.

    `chosen` holds what an earlier part of the run chose, which is kept. Raises UserError for what
    this machine doesn't have and what does not fit.
    """
    config = resolve_device(config, chosen)
    if config.engine == "cerebras":
        check_package()
        if config.backend == "CSX":
            return on_cluster(config)
    with suppress(OSError):
        remove_abandoned(store_folder(config))  # before the free space is looked at
    machine = this_machine(config, here)
    plan = best_plan(config, machine, chosen.get("micro_batch_size"), training)
    same_systems = chosen.get("num_systems") == config.num_systems
    if same_systems and plan.config.engine == chosen.get("engine") != "resident":
        cut = {k: chosen[k] for k in CUT if k in chosen and getattr(config, k) in (None, "auto")}
        if (config.micro_batch_size or 0) > (cut.get("pass_size") or config.batch_size):
            del cut["pass_size"]  # what was asked for comes first
        again = replace(config, engine=plan.config.engine, **cut)
        same = engine_plan(again, machine, chosen.get("micro_batch_size"), training)
        plan = plan if same.lacks else same  # it rounds alike
    timeout = config.timeout or max(120, int(3 * plan.seconds))
    return replace(plan, config=replace(plan.config, timeout=timeout))


def resolve_device(config: Configuration, chosen: dict) -> Configuration:
    """Replaces `auto` in backend and precision, and what follows from them."""
    backend, engine = config.backend, config.engine
    if backend == "auto" and engine == "cerebras":
        backend = "CSX"
    if backend == "auto":
        backend = "GPU" if torch.cuda.is_available() else "CPU"
    if backend == "CSX" and engine == "auto":
        engine = "cerebras"
    if (backend, engine) == ("GPU", "cerebras") or (backend == "CSX" and engine != "cerebras"):
        raise UserError(
            f"backend: {backend} is not for engine {engine}: take --engine cerebras with "
            f"--backend CSX, or with CPU to try it"
        )
    if backend == "GPU" and not torch.cuda.is_available():
        raise UserError("backend: GPU was asked for and there is none; take --backend CPU")
    config = replace(config, backend=backend, engine=engine)
    check_engine(config)
    precision = resolve_precision(config, chosen.get("precision"))
    return replace(
        config, precision=precision, compile=resolve_compile(config, chosen.get("compile"))
    )


def resolve_precision(config: Configuration, earlier: str | None) -> str:
    """What was asked for, what an earlier part of the run chose, or what is faster here."""
    only = None
    if config.engine == "cerebras":
        only = "bf16" if config.backend == "CSX" else "fp32"
    elif not hasattr(torch.Tensor, "grad_dtype"):  # torch 2.4 would sum gradients in bf16
        only = "fp32"
    if "tf32" in (config.precision, earlier) and config.backend != "GPU":
        if config.precision == "tf32":
            raise UserError(f"precision: tf32 is of GPUs, not of {config.backend}; take fp32")
        earlier = "fp32"
    if only is not None and config.precision not in ("auto", only):
        raise UserError(
            f"precision: {config.precision} is not for engine {config.engine} on {config.backend} "
            f"with torch {torch.__version__}; take {only}"
        )
    if config.precision != "auto":
        return config.precision
    return only or earlier or faster_precision(config, config.backend)


def resolve_compile(config: Configuration, earlier: bool | None) -> bool:
    """What was asked for, what an earlier part of the run chose, or where it is faster: on a GPU.
    The last two only where there are the compilers it takes."""
    there = bool(os.environ.get("CXX")) or any(map(shutil.which, ("g++", "clang++")))
    if config.backend == "GPU":
        there = there and find_spec("triton") is not None
    if config.compile is not True:
        wanted = config.backend == "GPU" or bool(earlier)
        return config.compile == "auto" and config.engine != "cerebras" and wanted and there
    if config.engine == "cerebras":
        raise UserError("compile: the cerebras engine compiles in its own way; leave it out")
    if not there:
        raise UserError("compile: true needs a C++ compiler, and there is no g++; leave it out")
    return True


def check_engine(config: Configuration) -> None:
    """Raises UserError for what an engine does not do."""
    if config.engine == "cerebras" and config.backend == "CPU" and config.num_systems > 1:
        raise UserError(
            f"num_systems: {config.num_systems}, but the cerebras engine on a CPU is one; take "
            f"--backend CSX or --num_systems 1"
        )
    if config.engine == "cerebras" and config.backend == "CPU" and config.micro_batch_size:
        raise UserError(
            f"micro_batch_size: {config.micro_batch_size}, but the cerebras engine on a CPU takes "
            f"the batch in one piece; leave it out"
        )
    if config.num_systems % (config.shards or 1):
        raise UserError(f"shards: {config.shards} does not divide num_systems {config.num_systems}")
    if config.num_systems > 1 and config.engine in ENGINES:
        raise UserError(
            f"engine: {config.engine} is for one system, num_systems is {config.num_systems}; take "
            f"--engine auto or --num_systems 1"
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
    """A run on Cerebras systems, which plan it themselves: what they have is not known here."""
    nothing = dict.fromkeys(TIERS, 0)
    each = config.batch_size // config.num_systems
    if (config.micro_batch_size or 1) > each:
        raise UserError(
            f"micro_batch_size: {config.micro_batch_size} is more than the {each} sequences that a "
            f"system has of the batch"
        )
    machine = Machine(
        "Cerebras", "CSX", **nothing, program=0, **dict.fromkeys(RATES, nan), systems=1
    )
    return Plan(config, machine, nothing, 0, 0, nan, nan, HIDDEN)


def faster_precision(config: Configuration, backend: str) -> str:
    """bf16 where the machine multiplies it in hardware; on a CPU for wide models alone, as narrow
    ones were faster in fp32 (docs/log.md)."""
    if backend == "GPU":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if config.width >= 512 and has_bf16_units() else "fp32"


def best_plan(
    config: Configuration, machine: Machine, micro_batch: int | None = None, training: bool = True
) -> Plan:
    """The first engine that fits, cut so that a step is shortest. Raises UserError where none does,
    with what is missing. micro_batch: the size to take if nothing else is asked for and it fits."""
    plans = engine_plans(config, machine, micro_batch, training)
    if (plan := first_fitting(plans)) is None:
        raise UserError(refusal(config, plans, training))
    return plan


def engine_plans(
    config: Configuration, machine: Machine, micro_batch: int | None = None, training: bool = True
) -> list[Plan]:
    """The best plan of each engine that may be taken, the preferred first."""
    engines = (config.engine,)
    if config.engine == "auto":
        engines = ENGINES if config.num_systems == 1 else ("sharded",)
    return [
        engine_plan(replace(config, engine=engine), machine, micro_batch, training)
        for engine in engines
    ]


def first_fitting(plans: list[Plan]) -> Plan | None:
    return next((plan for plan in plans if not plan.lacks), None)


def engine_plan(
    config: Configuration, machine: Machine, micro_batch: int | None, training: bool
) -> Plan:
    """The fastest plan of one engine, or the one that lacks least."""
    plans = [
        make_plan(cut, machine, training) for cut in cuts(config, machine, micro_batch, training)
    ]
    fitting = [plan for plan in plans if not plan.lacks]
    if not fitting:
        return least_lacking(plans)
    # host memory where the devices do not suffice, other machines where this one does not
    first = min(_reach(plan.config) for plan in fitting)
    fitting = [plan for plan in fitting if _reach(plan.config) == first]
    best = min(plan.seconds for plan in fitting)
    fast = [plan for plan in fitting if plan.seconds <= 1.02 * best]
    return min(fast, key=lambda plan: sum(plan.bytes.values()))


def _reach(config: Configuration) -> tuple[bool, int]:
    """How far a shard of the sharded engine may be away."""
    return (
        (config.offload is True, config.shards or 0) if config.engine == "sharded" else (False, 0)
    )


def cuts(
    config: Configuration, machine: Machine, micro_batch: int | None, training: bool
) -> Iterator[Configuration]:
    """The ways in which an engine could cut the step, each with the largest micro-batch."""
    if config.engine == "cerebras":
        yield config
        return
    fast = max(1, MOST_TOKENS[machine.backend] // config.sequence_length)
    most = min(rows(config), config.pass_size or config.batch_size)
    wanted = min(config.micro_batch_size or micro_batch or fast, most)
    smallest = wanted if config.micro_batch_size else 1
    for shape in shapes(config, machine, training):
        size = wanted
        while True:
            cut = largest_pass(replace(shape, micro_batch_size=size), machine, training)
            if size == smallest or not make_plan(cut, machine, training).lacks:
                break
            size = max(smallest, size // 2)
        yield cut


def shapes(config: Configuration, machine: Machine, training: bool) -> Iterator[Configuration]:
    """Where an engine may keep what; the resident one has no choice."""

    if config.engine == "resident":
        yield config
        return
    if config.engine == "sharded":
        yield from sharded_shapes(config, machine, training)
        return
    for stream_to in choices(config, "stream_to", "ram", "disk"):
        for recompute in choices(config, "recompute", False, True) if training else (True,):
            keeping = ("device", "host") if recompute and machine.backend == "GPU" else ("device",)
            for activations in choices(config, "activations", *keeping):
                keys = {"stream_to": stream_to, "recompute": recompute, "activations": activations}
                yield replace(config, **keys)


def choices(config: Configuration, key: str, *values: object) -> tuple:
    """What a key may be: the values, or what was asked for."""
    return values if getattr(config, key) == "auto" else (getattr(config, key),)


def sharded_shapes(
    config: Configuration, machine: Machine, training: bool
) -> Iterator[Configuration]:
    """A copy of the weights on each machine, or one for all; whole for a step, or not."""
    counts = [config.num_systems]
    if config.num_systems % machine.systems == 0 and machine.systems > 1:
        counts.insert(0, machine.systems)
    for shards in [config.shards] if config.shards else dict.fromkeys(counts):
        for offload in choices(
            config, "offload", *((False, True) if on_gpu(machine) else (False,))
        ):
            for reshard in choices(config, "reshard", False, True):
                for recompute in choices(config, "recompute", False, True) if training else (True,):
                    keys = {"shards": shards, "offload": offload, "reshard": reshard}
                    yield replace(config, recompute=recompute, **keys)


def on_gpu(machine: Machine) -> bool:
    return machine.backend == "GPU"


def rows(config: Configuration) -> int:
    """Sequences of a batch on the system that has most."""
    return -(-config.batch_size // config.num_systems)


def micro_batch(config: Configuration) -> int:
    """Sequences in a forward pass: where none are chosen, the batch in one piece, as on the CPU
    backend of the cerebras engine."""
    return config.micro_batch_size or config.batch_size


def largest_pass(config: Configuration, machine: Machine, training: bool) -> Configuration:
    """As few passes as memory allows; one micro-batch at a time where it allows none."""
    if config.engine != "streaming":
        return config
    micro_batches = -(-config.batch_size // config.micro_batch_size)

    def cut(passes: int) -> Configuration:
        return replace(config, pass_size=-(-micro_batches // passes) * config.micro_batch_size)

    if config.pass_size is not None:
        whole = min(config.pass_size // config.micro_batch_size, micro_batches)
        return replace(config, pass_size=max(1, whole) * config.micro_batch_size)
    low, high = 1, micro_batches
    while low < high:
        middle = (low + high) // 2
        if make_plan(cut(middle), machine, training).lacks:
            low = middle + 1
        else:
            high = middle
    return cut(low)


def make_plan(config: Configuration, machine: Machine, training: bool = True) -> Plan:
    """The plan of a configuration in which all is chosen."""
    needs = {"streaming": streaming_bytes, "sharded": sharded_bytes}
    tiers = needs.get(config.engine, resident_bytes)(config, machine, training)
    share, state = rows(config) / config.batch_size, STATE_BYTES * count(config)
    if config.engine == "sharded":
        state /= config.shards
    compute = share * step_flops(config) / (EFFICIENCY[machine.backend] * machine.products)
    compute += 2 * state / machine.bandwidth  # read and written once, whoever does it
    inward, outward, transfer, hidden = 0, 0, 0.0, HIDDEN
    if config.engine == "streaming":
        inward, outward = moved_bytes(config)
        transfer = max(inward / machine.link, outward / machine.link)
        if config.stream_to == "disk":  # one drive does both
            transfer = max(transfer, inward / machine.read + outward / machine.write)
    elif config.engine == "sharded":
        inward = outward = sum(exchanged_bytes(config))
        transfer = exchange_seconds(config, machine)
        hidden = HIDDEN if on_gpu(machine) else 0.0  # Gloo's threads have no core of their own
    tiers = {tier: int(number) for tier, number in tiers.items()}
    moved = (int(inward), int(outward))
    return Plan(config, machine, tiers, *moved, compute, transfer, hidden, eval_tokens(config))


def step_tokens(config: Configuration) -> int:
    return config.batch_size * config.sequence_length


@lru_cache(maxsize=16)
def _val_tokens(dataset: str) -> int:
    with suppress(OSError, ValueError, LookupError, TypeError):
        return count_of(read_sealed(find_folder(dataset) / "meta.json")["tokens"]["val"])
    return 0


def eval_tokens(config: Configuration) -> int:
    """Tokens of an evaluation; 0 where the dataset is not there to tell."""
    most = inf if config.eval_batches is None else config.eval_batches * step_tokens(config)
    return min(most, _val_tokens(config.dataset))


def warnings(plan: Plan) -> list[str]:
    """What is likely not meant, a line each."""
    config, lines = plan.config, []
    evaluating, training = plan.evaluations * plan.eval_seconds, plan.seconds * config.num_steps
    if evaluating > training:
        lines.append(
            f"note: evaluations take about {time_text(evaluating)} in all, the training "
            f"{time_text(training)}; lower --eval_batches or raise --eval_steps"
        )
    if config.warmup_steps >= config.num_steps:
        lines.append(
            f"note: warmup_steps {config.warmup_steps} is not below num_steps {config.num_steps}: "
            f"the learning rate does not reach its peak before the end"
        )
    return lines


# Bytes, by tier


@lru_cache(maxsize=16)
def _sizes(model: tuple) -> tuple[int, int, int]:
    with torch.device("meta"):
        units = GPT(GPTConfig(**dict(model))).units()
    numbers = {name: sum(p.numel() for p in unit.parameters()) for name, unit in units.items()}
    blocks = [number for name, number in numbers.items() if name.startswith("decoder.")]
    return sum(numbers.values()) - sum(blocks), max(blocks), sum(blocks)


@lru_cache(maxsize=16)
def _shapes(model: tuple) -> list[torch.Size]:
    with torch.device("meta"):
        return [parameter.shape for parameter in GPT(GPTConfig(**dict(model))).parameters()]


def sizes(config: GPTConfig) -> tuple[int, int, int]:
    """Parameters outside the blocks, in the largest block, and in all blocks."""
    return _sizes(_model(config))


def _model(config: GPTConfig) -> tuple:
    return tuple((key, getattr(config, key)) for key in MODEL_KEYS)


def count(config: GPTConfig) -> int:
    outside, _, blocks = sizes(config)
    return outside + blocks


def resident_bytes(config: Configuration, machine: Machine, training: bool) -> dict[str, float]:
    size = micro_batch(config)
    each = (STATE_BYTES if training else 4) + (2 if config.precision == "bf16" else 0)
    model = count(config) * each
    activations = size * activation_bytes(config) / (1 if training else config.depth)
    device = model + activations + head_bytes(config, training)
    return _tiers(machine, device, 0, 0)


def streaming_bytes(config: Configuration, machine: Machine, training: bool) -> dict[str, float]:
    """The largest of what the phases of a step need (docs/streaming.md)."""
    outside, block, _ = sizes(config)
    number = 2 if config.precision == "bf16" else 4
    two = min(2, config.depth) * block
    boundary = config.pass_size * config.sequence_length * config.width * number
    one = activation_bytes(config) / config.depth * config.micro_batch_size
    matrix = 4 * config.width**2 * (number + (4 if number == 2 else 0))  # a matrix's own gradient
    inputs, kept = 0, 0
    if training and config.recompute:
        inputs = config.depth * boundary
    elif training:
        kept = config.pass_size * activation_bytes(config)
    on_host = inputs and config.activations == "host"
    on_device = kept + (0 if on_host else inputs)
    lookup = 4 * config.vocab_size * config.width if number == 2 else 0  # in fp32, in Embedding
    phases = [
        number * max(two, outside + block) + 2 * boundary + (0 if kept else one) + on_device,
        number * (outside + block) + lookup + 2 * boundary,
        number * (outside + block) + head_bytes(config, training) + 2 * boundary + on_device,
    ]
    if training:
        gradients = 4 * max(two, outside + block)
        phases[-1] += 4 * outside
        phases.append(number * two + gradients + boundary + one + matrix + on_device)
    buffers = BUFFERS * 4 * min(CHUNK, max(block, outside)) * (4 if training else 1)
    state = count(config) * (STATE_BYTES if training else 4)
    # an array of a unit, and a tensor for it, when it is loaded or saved
    whole = 4 * max(block, outside) + 16 * config.width**2
    host = config.depth * 2 ** ceil(log2(boundary)) if on_host else 0
    host += state if config.stream_to == "ram" else buffers
    if machine.backend == "GPU":
        device, host = max(phases) + buffers, host + whole
    else:
        device = max(*phases, whole + on_device - kept)
    return _tiers(machine, device, host, state if config.stream_to == "disk" else 0)


def sharded_bytes(config: Configuration, machine: Machine, training: bool) -> dict[str, float]:
    """What each system needs (docs/scale-out.md)."""
    outside, block, _ = sizes(config)
    number = 2 if config.precision == "bf16" else 4
    state = (STATE_BYTES if training else 4) * count(config) / config.shards
    largest, two = max(block, outside), min(2, config.depth) * block
    device = number * ((outside + two) if config.reshard else count(config))
    device += number * largest  # what is gathered comes in one piece and is then copied
    boundary = config.micro_batch_size * config.sequence_length * config.width * number
    one = config.micro_batch_size * activation_bytes(config) / config.depth
    if not training:
        device += one + 2 * boundary
    else:
        device += config.depth * boundary + one if config.recompute else config.depth * one
        device += number * outside + (number + 4) * largest  # gradients on their way
        if rows(config) > config.micro_batch_size:  # and what they are added to
            if not config.reshard:
                device += 4 * count(config)
            elif config.shards < config.num_systems:
                device += 4 * count(config) / config.shards
    device += head_bytes(config, training)
    if not on_gpu(machine):
        device *= HOLES[config.reshard]
    if config.offload:  # weights and gradients are pinned, which rounds each up to a power of two
        pinned = 2 * (pinned_bytes(config) - 4 * count(config) / config.shards)
        return _tiers(machine, device + 4 * largest, state + pinned, 0)
    return _tiers(machine, device + state, 0, 0)


def pinned_bytes(config: Configuration) -> int:
    """Host memory that the fp32 shards of the weights take when each is pinned on its own."""
    shapes = ((-(-shape[0] // config.shards), *shape[1:]) for shape in _shapes(_model(config)))
    return sum(2 ** ceil(log2(4 * prod(shape))) for shape in shapes)


def _tiers(machine: Machine, device: float, host: float, disk: float) -> dict[str, float]:
    if machine.backend == "GPU":
        return {"device": device, "host": host + machine.program, "disk": disk}
    return {"device": device + host + machine.program, "host": 0, "disk": disk}


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
            block += 13 * config.heads * length**2  # in fp32 whatever the precision
    return config.depth * block


def head_bytes(config: Configuration, training: bool = True) -> int:
    """The logits of LOSS_ROWS positions with what their loss takes, and the gradient of the
    embedding from a chunk, from all chunks, and from the lookup."""
    rows, each = config.sequence_length * micro_batch(config), None
    if config.engine != "cerebras" and rows >= LOSS_ROWS[config.backend]:
        rows, each = LOSS_ROWS[config.backend], CHUNKED_LOGIT_BYTES if training else None
    logits = (each or LOGIT_BYTES[config.backend, config.precision]) * rows * config.vocab_size
    return logits + (3 * 4 * config.vocab_size * config.width if training else 0)


# Work


def step_flops(config: Configuration) -> float:
    """Floating-point operations of a step: those of its blocks, and 6 a parameter and token outside
    of them."""
    tokens = step_tokens(config)
    return 6 * tokens * sizes(config)[0] + block_flops(config)


def block_flops(config: Configuration) -> float:
    """Of a step's blocks: 2 a parameter and token forward, and attention's own (on average half of
    the positions are seen: 2 · length · width a token and block), twice that backward, and once
    more if they are computed again."""
    tokens = step_tokens(config)
    attention = 2 * config.sequence_length * config.width * config.depth
    again = config.engine in RECOMPUTING and config.recompute is True
    return (4 if again else 3) * tokens * (2 * sizes(config)[2] + attention)


def flops_per_token(config: Configuration) -> int:
    """Of training: 6 a parameter (Kaplan et al. 2020, 2.1), without attention's own products."""
    return 6 * count(config)


def moved_bytes(config: Configuration) -> tuple[int, int]:
    """Bytes that a step of the streaming engine brings to the device and takes from it: in the
    forward pass the state with its update, 16 in and 12 out a parameter; backward the weight in and
    the gradient out, 4 and 4. The embedding comes three times and has two gradients, the last block
    stays where it is, and each further pass brings weights and adds to gradients."""
    outside, block, blocks = sizes(config)
    passes = -(-config.batch_size // config.pass_size)
    weights = blocks + outside + outside + (blocks - block) + outside
    gradients = blocks + 2 * outside
    inward = 12 * (blocks + outside) + passes * 4 * weights
    inward += 4 * (passes * gradients - blocks - outside)  # what is added to
    return inward, 12 * (blocks + outside) + passes * 4 * gradients


def gathers(config: Configuration) -> tuple[int, int]:
    """How often a step of the sharded engine gathers weights, and how many of them each time."""
    outside, _, blocks = sizes(config)
    if config.reshard:
        return -(-rows(config) // config.micro_batch_size), 2 * blocks + outside
    return 1, blocks + outside


def exchanged_bytes(config: Configuration) -> tuple[float, float]:
    """Bytes that a system gets from those it shares a copy with, and from its like in other copies:
    with `reshard` the blocks are gathered twice and gradients scattered once a micro-batch,
    without it once a step; the copies then sum theirs once a step."""
    number = 2 if config.precision == "bf16" else 4
    times, gathered = gathers(config)
    others = (config.shards - 1) / config.shards
    copies = config.num_systems // config.shards
    inside = times * others * (number * gathered + 4 * count(config))
    return inside, 2 * (copies - 1) / copies * 4 * count(config) / config.shards


def exchange_seconds(config: Configuration, machine: Machine) -> float:
    """Seconds of a step in which a system's shards, and with `offload` the host's, move."""
    inside, across = exchanged_bytes(config)
    near = machine.network if config.shards <= machine.systems else machine.fabric
    far = machine.fabric if config.num_systems > machine.systems else machine.network
    seconds = inside / near + across / far
    if config.offload:  # fp32 shards in and gradients out, and the update in host memory
        times, gathered = gathers(config)
        moved = 4 * times * (gathered + count(config))
        seconds += (moved + STATE_BYTES * count(config)) / config.shards / machine.link
    return seconds


# What is told


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


def refusal(config: Configuration, plans: list[Plan], training: bool) -> str:
    """Why nothing fits, and what would."""
    plan = least_lacking(plans)
    smaller = replace(config, micro_batch_size=None, pass_size=None)
    if smaller != config:
        fitting = first_fitting(engine_plans(smaller, plan.machine, None, training))
        if fitting is not None:
            key = "micro_batch_size" if config.micro_batch_size is not None else "pass_size"
            asked, fits = getattr(config, key), getattr(fitting.config, key)
            return f"{key}: {asked} sequences do not fit in memory, {fits} do"
    needs = " and ".join(
        f"{size_text(plan.bytes[tier])} {TIER_NAMES[tier]} where there are "
        f"{size_text(plan.has[tier])}"
        for tier in plan.lacks
    )
    cures = [KEYS[tier] for tier in plan.lacks]
    enough = fewest_systems(config, plan.machine, training) if on_gpu(plan.machine) else None
    if enough and enough > config.num_systems:
        cures.insert(0, f"--num_systems {enough}")
    cure = f"it takes {' or '.join(dict.fromkeys(cures))}"
    if fitting := largest_fitting(config, plan.machine, training):
        cure += f"; {fitting} fits here"
    return (
        f"this model does not fit: with the {plan.config.engine} engine its {count(config):,} "
        f"parameters need {needs}; {cure}"
    )


def least_lacking(plans: list[Plan]) -> Plan:
    return min(plans, key=lambda plan: sum(plan.lacks.values()))


def largest_fitting(config: Configuration, machine: Machine, training: bool) -> str | None:
    """The largest model of configs/ that fits with the other keys of a configuration."""
    folder, best = Path(__file__).parent / "configs", (0, None)
    for path in folder.glob("*.yaml"):
        with suppress(ValueError):  # its positions may be fewer than the sequence has
            values = {key: value for key, value in read_yaml(path).items() if key in MODEL_KEYS}
            smaller = replace(config, **values)
            between = best[0] < count(smaller) < count(config)
            if between and first_fitting(engine_plans(smaller, machine, None, training)):
                best = (count(smaller), f"configs/{path.name}")
    return best[1]


def fewest_systems(config: Configuration, machine: Machine, training: bool = True) -> int | None:
    """The smallest number of systems of such machines whose devices hold the model without
    offloading, of 1 to 8 and then whole machines; None where the batch has too few sequences."""

    def fits(systems: int) -> bool:
        here = min(systems, PER_MACHINE)
        keys = {"num_systems": systems, "engine": "sharded", "offload": False, "shards": systems}
        cut = replace(config, **keys, reshard=True, recompute=True, micro_batch_size=1)
        plan = make_plan(cut, replace(machine, systems=here), training)
        return "device" not in plan.lacks

    whole = range(2 * PER_MACHINE, config.batch_size + 1, PER_MACHINE)
    for counts in (range(1, min(PER_MACHINE, config.batch_size) + 1), whole):
        if (place := bisect_left(counts, True, key=fits)) < len(counts):
            return counts[place]
    return None


def describe(plan: Plan) -> str:
    """A plan that fits, in a few lines."""
    config, lines = plan.config, []
    if config.backend == "CSX":
        return (
            f"{count(config):,} parameters, {config.num_systems} Cerebras system"
            f"{'s' * (config.num_systems > 1)}, {config.precision}, "
            f"{step_tokens(config):,} tokens a step; the cluster plans the "
            f"rest; a checkpoint takes {size_text(CHECKPOINT_BYTES * count(config))}, as do what "
            f"is sent first and what is fetched to be saved"
        )
    micro_batches = -(-rows(config) // micro_batch(config))
    lines.append(
        f"{count(config):,} parameters, {config.engine} on {config.backend}, {config.precision}, "
        f"{step_tokens(config):,} tokens a step in {micro_batches} "
        f"micro-batches of {micro_batch(config)} × {config.sequence_length}"
    )
    if config.engine == "streaming":
        passes = -(-config.batch_size // config.pass_size)
        lines.append(
            f"weights and optimizer on {config.stream_to}: a step "
            f"{'reads' if config.stream_to == 'disk' else 'fetches'} {size_text(plan.inward)} and "
            f"writes {size_text(plan.outward)}, in {passes} pass{'es' * (passes > 1)}; "
            + ("blocks are computed again backward" if config.recompute else "activations are kept")
        )
    if config.engine == "sharded":
        lines.append(
            f"{config.num_systems} systems of {config.shards} to a copy of the weights, which are "
            f"{'shared again after each use' if config.reshard else 'whole during a step'}"
            f"{' and kept in host memory' if config.offload else ''}: each gets "
            f"{size_text(plan.inward)} from others a step; "
            + ("blocks are computed again backward" if config.recompute else "activations are kept")
        )
    each = " on each system" if config.num_systems > 1 else ""
    tiers = " and ".join(
        f"{size_text(number)} {TIER_NAMES[tier]} of {size_text(plan.has[tier])}"
        for tier, number in plan.bytes.items()
        if number
    )
    lines.append(
        f"takes {tiers}{each}, a checkpoint {size_text(CHECKPOINT_BYTES * count(config))}; about "
        f"{time_text(plan.seconds)} a step, {time_text(plan.run_seconds)} for "
        f"{config.num_steps:,} steps"
    )
    return "\n".join(lines)


KEYS = {
    "device": "more memory",
    "host": "more host memory",
    "disk": "a larger disk (--stream_dir)",
}
TIER_NAMES = {"device": "of memory", "host": "of host memory", "disk": "of disk"}


def table(plans: list[Plan], machine: Machine) -> Iterator[str]:
    """What `python plan.py` prints."""
    config = plans[0].config
    tokens = step_tokens(config)
    flops = flops_per_token(config) * tokens
    yield f"{count(config):,} parameters, {tokens:,} tokens and {flops:.3e} FLOPs a step"
    yield (
        f"on {machine.name} ({config.precision}): {machine.products / 1e12:,.2f} TFLOP/s, memory "
        f"{machine.bandwidth / 1e9:,.0f}, link {machine.link / 1e9:,.0f}, disk "
        f"{machine.read / 1e9:.1f} read and {machine.write / 1e9:.1f} written GB/s"
    )
    yield ""
    has = (size_text(getattr(machine, tier)) for tier in TIERS)
    yield _row("", *TIERS, "step", "whole run")
    yield _row("there is", *has)
    for plan in plans:
        times = (time_text(plan.seconds), time_text(plan.run_seconds))
        lacks = (f"{size_text(n)} {TIER_NAMES[tier]}" for tier, n in plan.lacks.items())
        fits = "  lacks " + " and ".join(lacks) if plan.lacks else ""
        yield _row(plan.config.engine, *(size_text(plan.bytes[t]) for t in TIERS), *times) + fits
    if machine.backend == "GPU" and (systems := fewest_systems(config, machine)):
        yield f"without streaming or offloading it fits from {systems} such devices on"
    yield ""


def _row(name: str, *cells: str) -> str:
    return f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells)


def main() -> int:
    config, more = parse_configuration(
        "Plan a run.",
        json=(bool, "print the plan as JSON"),
        device=(str, f"plan for this GPU, not for this machine: {', '.join(DEVICES)}"),
        device_memory=(str, "memory of the device, such as 80GB"),
        host_memory=(str, "host memory of a machine, such as 2TB, which its GPUs share"),
        disk=(str, "free space where the streaming engine keeps its files, such as 8TB"),
    )
    given = {
        tier: parse_bytes(text, option)
        for tier, option in (("device", "device_memory"), ("host", "host_memory"), ("disk", "disk"))
        if (text := more[option]) is not None
    }
    if config.backend == "CSX" or config.engine == "cerebras":
        raise UserError(
            "a run on Cerebras systems is planned by their cluster; python train.py CONFIG "
            "--backend CSX --cluster.validate_only true lowers a step for it on this machine"
        )
    if more["device"] is not None:
        check_engine(config)
        precision = "bf16" if config.precision == "auto" else config.precision
        config = replace(config, backend="GPU", precision=precision)
        machine = named_machine(more["device"], config)
    else:
        config = resolve_device(config, {})
        here = config.num_systems
        if config.backend == "GPU":
            here = min(here, torch.cuda.device_count())
        machine = this_machine(config, here)
    if "host" in given:
        given["host"] //= machine.systems
    machine = replace(machine, **given)
    plans = engine_plans(config, machine)
    plan = first_fitting(plans) or least_lacking(plans)
    if more["json"]:
        print(json.dumps(summary(plan)))
        return 2 if plan.lacks else 0
    for line in table(plans, machine):
        print(line)
    if on_gpu(machine) and "host" not in given:
        print(
            f"host memory: {size_text(machine.host)} a GPU, as this machine has "
            f"{size_text(machine.host * machine.systems)} for {machine.systems}; --host_memory "
            f"says what another has"
        )
    if plan.lacks:
        print(refusal(config, plans, training=True))
        return 2
    print("\n".join([describe(plan), *warnings(plan)]))
    if not plan.eval_tokens:
        print(f"without evaluations: {config.dataset} is not prepared")
    print(
        f"{plan.limit} is the limit: a step computes for {time_text(plan.compute)}, and its data "
        f"move in {time_text(plan.transfer)}"
    )
    return 0


def summary(plan: Plan) -> dict:
    """The plan for other programs."""
    config = plan.config
    keys = ("engine", "micro_batch_size", "precision")
    if config.engine == "streaming":
        keys += ("stream_to", "recompute", "activations", "pass_size")
    if config.engine == "sharded":
        keys += ("num_systems", "shards", "reshard", "recompute", "offload")
    return {
        "parameters": count(config),
        **{key: getattr(config, key) for key in keys},
        "fits": not plan.lacks,
        "bytes": plan.bytes,
        "missing": plan.lacks,
        "bytes_moved": {"in": plan.inward, "out": plan.outward},
        "flops_per_step": flops_per_token(config) * step_tokens(config),
        "limit": plan.limit,
        "seconds_per_step": plan.seconds,
        "days": plan.days,
    }


if __name__ == "__main__":
    command(main)
