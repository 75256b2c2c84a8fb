"""What the engines share. An engine runs the steps of a model; the loop knows no more of it."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil
from warnings import catch_warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configuration import Configuration
from dataset import Batch, EvalData, TrainData
from engines.attention import block_attention
from engines.lean import swap, use_lean_norms
from engines.optimizer import SPIKE_STEPS, is_applied, learning_rate, spike_limits
from loss import IGNORE, aligned_linear, cross_entropy, cross_entropy_in_cache
from model import GPT
from runtime.checkpoint import KINDS

INIT_BYTES = 4e9  # of layers that are drawn at a time
# Positions whose logits exist at one time, fewer with more tokens than GPT-2's vocabulary has
LOSS_ROWS, USUAL_VOCABULARY = {"CPU": 1024, "GPU": 8192}, 50257
TEXT_LENGTHS = 64  # texts that are continued are padded to multiples of it
Read = Callable[[str, slice | None], Tensor]  # (name, rows or None: all) -> tensor on the CPU
Report = Callable[[float], None]  # is called with the fraction of a step that is done
Watch = Callable[[Iterable], Iterable]  # yields the same items, and shows how many are done
Limits = tuple[float, float]  # of loss and gradient norm, above which an update is skipped


@dataclass
class StepStats:
    """What is known of a finished step."""

    step: int  # optimizer steps completed
    loss: float  # mean over the tokens of the global batch, in nats
    grad_norm: float  # before clipping
    learning_rate: float
    seconds: float
    tokens: int  # seen since the run began
    offsets: list[int]  # where the sequences of the batch begin in train.bin
    applied: bool  # else the update was skipped: not finite, or a loss spike
    can_save: bool = True  # whether `state` has the weights after this step

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))


class Engine:
    """Runs the steps of a model, and holds its weights; without `training` no more than these.

    Tensors have the same names in every engine: those of the model's parameters, and the same with
    the prefixes `exp_avg.` and `exp_avg_sq.` for Adam's moments. An engine implements `step` and
    `sum_losses`; it has `weights` by name and a torch `optimizer`, or its own `put` and `get`.
    """

    rank, size = 0, 1  # of the processes that share a batch

    def __init__(self, config: Configuration, training: bool = True):
        self.config, self.training = config, training
        self.device = torch.device("cuda" if config.backend == "GPU" else "cpu")
        self.optimizer_steps = 0  # applied ones
        self.tokens = 0  # seen since the run began
        self.recent = deque(maxlen=SPIKE_STEPS)  # losses and norms of the last finite steps
        with torch.device("meta"):
            self.model = GPT(config)
        self.layers = {
            layer: [f"{layer}.{name}" for name, _ in module.named_parameters()]
            for layer, module in self.model.layers().items()
        }
        self.saved_layers, self.file_suffix = list(self.layers), ""  # of this process's files

    # What an engine implements

    def step(
        self, step: int, batch: Batch, rate: float, limits: Limits, progress: Report
    ) -> tuple[float, float]:
        """Runs a training step, counted from 0, at this learning rate; returns the loss and the
        gradient norm. The update is skipped unless these are within the limits."""
        raise NotImplementedError

    def sum_losses(self, batch: Batch) -> Tensor:
        """The sum of the losses of a batch, fp64."""
        raise NotImplementedError

    def ready(self) -> None:
        """Called once when all tensors were put; optimizer_steps is set."""

    @torch.no_grad()
    def put(self, layer: str, kind: str, tensors: dict[str, Tensor]) -> None:
        """Stores a layer's tensors of one kind, whole ones on the CPU or those that `rows` cuts.
        Several threads may call it, each for another layer."""
        for name, tensor in tensors.items():
            weight = target = self.weights[name]
            if kind != "":
                state = self.optimizer.state[weight]
                state["step"] = torch.tensor(float(self.optimizer_steps), device=weight.device)
                target = state[kind.removesuffix(".")] = torch.zeros_like(weight)
            self.local(target).copy_(tensor)

    def get(self, layer: str, kind: str) -> dict[str, Tensor]:
        """A layer's tensors of one kind, on the CPU; moments are zeros before the first update."""
        found = {}
        for name in self.layers[layer]:
            target = weight = self.weights[name]
            if kind != "":
                state = self.optimizer.state.get(weight)
                target = state[kind.removesuffix(".")] if state else torch.zeros_like(weight)
            found[name] = self.local(target).cpu()
        return found

    def local(self, tensor: Tensor) -> Tensor:
        """What this process has of a tensor."""
        return tensor.detach()

    def rows(self, name: str) -> slice | None:
        """The rows of a tensor that this process stores; None: all."""
        return None

    def close(self) -> None:
        """Frees what the engine holds."""
        self.model = None

    # What they share

    def initialize(self, progress: Watch = iter) -> None:
        """Draws the initial weights from the seed, one layer after the other through `progress`,
        several at a time as far as INIT_BYTES allows."""
        with torch.device("meta"):
            blank = GPT(self.config)
        modules = blank.layers()

        def draw(layer: str) -> None:
            module = modules[layer].to_empty(device="cpu")
            blank.init_layer(layer, self.config.seed)
            named = {name: p.detach() for name, p in module.named_parameters(layer)}
            self.put(layer, "", {name: self._cut(name, tensor) for name, tensor in named.items()})
            module.to("meta")

        largest = max(sum(p.numel() for p in m.parameters()) for m in modules.values())
        with ThreadPoolExecutor(max(1, min(os.cpu_count(), int(INIT_BYTES / largest / 4)))) as pool:
            wait_for([pool.submit(draw, layer) for layer in modules], progress)
        self.ready()

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        rows = self.rows(name)
        return tensor if rows is None else tensor[rows]

    def load(self, read: Read, optimizer_steps: int | None, progress: Watch = iter) -> None:
        """Stores every tensor from `read`; with optimizer_steps None the weights only."""
        with_moments = optimizer_steps is not None and self.training
        self.optimizer_steps = optimizer_steps if with_moments else 0
        for layer, names in progress(list(self.layers.items())):
            for kind in KINDS if with_moments else KINDS[:1]:
                self.put(layer, kind, {name: read(kind + name, self.rows(name)) for name in names})
        self.ready()

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name of a file, its tensors on the CPU), one kind of tensors of one layer at a time;
        with several processes the rows of each, in the order of their ranks."""
        for layer, kind in product(self.saved_layers, KINDS):
            tensors = {kind + name: tensor for name, tensor in self.get(layer, kind).items()}
            yield kind + layer + self.file_suffix, tensors
            del tensors  # before the next are made

    def run(self, data: TrainData, start: int, stop: int, progress: Report) -> Iterator[StepStats]:
        """Trains from step start to stop and yields each step in order, possibly late."""
        config = self.config
        self.model.train()
        for step in range(start, stop):
            began, rate = time.perf_counter(), learning_rate(config, step + 1)
            limits = spike_limits(self.recent if config.skip_loss_spikes else ())
            batch = data.get(step, self.rank, self.size)
            loss, norm = self.step(step, batch, rate, limits, progress)
            self.tokens += config.batch_size * config.sequence_length
            applied, seconds = is_applied(loss, norm, limits), time.perf_counter() - began
            figures = (loss, norm, rate, seconds, self.tokens, batch.offsets)
            stats = StepStats(step + 1, *figures, applied)
            if stats.finite:
                self.recent.append((loss, norm))
            yield stats

    @torch.no_grad()
    def evaluate(self, data: EvalData, sequences: int, watch: Watch = iter) -> tuple[float, int]:
        """The sum of the losses over all data and the number of tokens, with so many sequences at
        a time; `watch` wraps where these begin."""
        total, tokens, begins = 0.0, 0, range(0, len(data), sequences)
        with self.evaluating():
            for begin in watch(begins):
                batch = data.get(begin, sequences, self.rank, self.size)
                total += self.sum_losses(batch).item()
                tokens += int((batch.targets != IGNORE).sum())
        return total, tokens

    @torch.no_grad()
    def next_logits(self, texts: list[Tensor]) -> Tensor:
        """(texts, vocab_size), fp32 on the CPU: the logits of the token that follows each text, ids
        (length,) of at most max_position_embeddings. Every process must call it."""
        longest, rows = self.config.max_position_embeddings, []
        for ids in texts:  # a few lengths only, which a GPU's kernels and torch.compile prefer
            length = min(longest, ceil(len(ids) / TEXT_LENGTHS) * TEXT_LENGTHS)
            rows.append(F.pad(ids, (0, length - len(ids)))[None].to(self.device))
        with self.evaluating():
            logits = self.last_logits(rows, [len(ids) - 1 for ids in texts])
            return torch.stack(logits).float().cpu()

    def last_logits(self, texts: list[Tensor], places: list[int]) -> list[Tensor]:
        """The logits (vocab_size,) at one place of each text, ids (1, length)."""
        return [self.model(ids)[0, place] for ids, place in zip(texts, places, strict=True)]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model without its dropout."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()


@cache
def find_gpu() -> tuple[bool, str]:
    """Whether CUDA works here; if not, what it complains of, such as a driver that is too old."""
    with catch_warnings(record=True) as caught:
        there = torch.cuda.is_available()
    return there, "" if there or not caught else " ".join(str(caught[0].message).split())


def has_units(*names: str) -> bool:
    """Whether this CPU has one of these: amx_bf16, avx512_bf16 (torch 2.4 can't tell: no)."""
    units = getattr(torch.cpu, "get_capabilities", dict)()
    return any(units.get(name, False) for name in names)


def micro_batches(
    config: Configuration, device: torch.device, batch: Batch
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, targets) on the device, micro_batch_size sequences at a time."""
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in (batch.ids, batch.targets)]
    if device.type == "cuda":  # one copy, which does not block: pin_memory keeps strides, else two
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    yield from zip(*(tensor.split(config.micro_batch_size) for tensor in tensors), strict=True)


@contextmanager
def hidden_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hides `.grad` while the model runs forward: torch.compile breaks the graph at a parameter
    whose gradient has another dtype, as with bf16."""
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in gradients:
        parameter.grad = None
    yield
    for parameter, gradient in gradients:
        parameter.grad = gradient


def loss_rows(config: Configuration) -> int:
    """Positions whose logits exist at one time."""
    rows = LOSS_ROWS[config.backend]
    return min(rows, max(1, rows * USUAL_VOCABULARY // config.vocab_size))


def has_own_operations(config: Configuration) -> bool:
    """Whether loss, norms and perhaps attention are ours, made for bf16 on a CPU: torch.compile
    fuses PyTorch's instead."""
    return (config.backend, config.precision) == ("CPU", "bf16") and config.compile is not True


def has_sparse_lookup(config: Configuration) -> bool:
    """Whether a lookup has a gradient of its rows alone: where there is a dense one to add it to,
    of the tied head or in a layer's array, and not on a GPU, which adds in any order."""
    return config.backend == "CPU" and (config.tied_head or config.engine == "streaming")


def has_block_attention(config: Configuration) -> bool:
    """Whether attention is ours, which is faster than PyTorch's without AMX and has no dropout."""
    return has_own_operations(config) and config.dropout == 0 and not has_units("amx_bf16")


def prepare_compute(config: Configuration, model: GPT, training: bool = True) -> None:
    """Sets what makes a placed model faster on its device; `compile`: the blocks share one
    compilation, and the loss has another."""
    model.loss_rows = loss_rows(config)
    if config.backend == "GPU":
        swap(model, "head_linear", F.linear, aligned_linear)
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if has_block_attention(config):
        swap(model, "attend", F.scaled_dot_product_attention, block_attention)
    if not training:  # an evaluation is over too soon to compile
        return
    model.embedding.sparse_grad = has_sparse_lookup(config)
    # not block.compile(), which FSDP's hooks have Dynamo skip; each wraps the one before it
    if config.activation_checkpointing is True and config.engine != "resident":
        for block in model.decoder:
            block.forward = recomputed(block.forward)
    if has_own_operations(config):
        swap(model, "cross_entropy", cross_entropy, cross_entropy_in_cache)
        use_lean_norms(model)
    if config.compile is True:
        options = {"fallback_random": True}  # the same dropout masks as without
        for block in model.decoder:
            block.forward = torch.compile(block.forward, options=options)
        model.cross_entropy = torch.compile(model.cross_entropy)


def recomputed(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A block that keeps its input alone for its backward pass, which runs it again as far as is
    needed: not its last product, whose result nobody asks for."""

    def run(x: Tensor) -> Tensor:
        return checkpoint(forward, x, use_reentrant=False)

    return run


def wait_for(futures: list[Future], progress: Watch = iter) -> None:
    """Waits for all; after an error those that have not begun are cancelled."""
    try:
        for future in progress(futures):
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise
