"""Models larger than the device: weights and optimizer state live in a store, in host RAM or on
disk, and pass through the device a unit at a time.

A step is layer-major: all of its micro-batches go through a unit while its weights are on the
device, so a weight moves once forward and once backward however large the batch. The global norm
that clips the gradients is known only when the last of them is, so a unit's AdamW update waits
until the unit is fetched for the next step's forward pass: no pass over the state is added for it.

Three threads share the work: this one computes, one fetches (and updates), one takes gradients
away. On a GPU each has a stream of its own; on a CPU streams and events do nothing.
"""

import math
import mmap
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configuration import Configuration
from engines import (
    Batches,
    Read,
    StepStats,
    draw_units,
    micro_batches,
    prepare_compute,
    run_steps,
    sum_losses,
)
from engines.optimizer import MOMENTS, SPIKE_STEPS, Update, clip_factor, counts, decays, square_sum
from engines.store import ALL, GRADIENT, STATE, WEIGHT, DiskStore, RamStore, Store, padded
from errors import UserError
from model import GPT, derive_seed

AHEAD = 2  # chunks that are read, or on their way to the device, while one is worked on
ALIGNMENT = 64  # numbers: where a parameter may start in its unit's array
PREFIXES = ("", *(f"{moment}." for moment in MOMENTS))  # of names, by row in the store


@dataclass
class MicroBatch:
    """ids and targets (sequences, sequence_length) on the device."""

    ids: Tensor
    targets: Tensor
    dropout_seed: int


@dataclass
class Layout:
    """Where the parameters of a unit stand in its flat arrays, those that decay first."""

    places: dict[str, tuple[int, torch.Size]]
    decaying: int  # numbers before this one decay
    size: int  # padded

    @staticmethod
    def of(unit: nn.Module) -> "Layout":
        ordered = sorted(unit.named_parameters(), key=lambda item: not decays(item[1]))
        places, end, decaying = {}, 0, 0
        for name, parameter in ordered:
            places[name] = (end, parameter.shape)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            decaying = end if decays(parameter) else decaying
        return Layout(places, decaying, padded(end))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters' parts of a flat array."""
        return {
            name: flat[begin : begin + shape.numel()].view(shape)
            for name, (begin, shape) in self.places.items()
        }


class StreamingEngine:
    """Holds two or three units of the model at any time, and the activations between them."""

    def __init__(self, config: Configuration, training: bool = True):
        self.config, self.training, self.updates = config, training, 0
        self.recent = deque(maxlen=SPIKE_STEPS)
        self.device = torch.device("cuda" if config.backend == "GPU" else "cpu")
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.streams = torch.get_device_module(self.device)
        self.inward, self.outward = self.streams.Stream(), self.streams.Stream()
        if training and config.recompute:
            self.inputs = Inputs(config, self.device, self.dtype)
        self.settled: dict[str, Tensor] = {}
        self.weights: dict[str, Array] = {}
        self.graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        with torch.device("meta"):
            self.model = GPT(config)
        self.modules = self.model.units()
        self.layouts = {name: Layout.of(module) for name, module in self.modules.items()}
        names = list(self.modules)
        blocks = [name for name in names if name.startswith("decoder.")]
        self.blocks = [[name] for name in blocks]
        self.embedding = names[: names.index(blocks[0])]
        self.head = [name for name in names if name not in blocks]
        self.store = self._open_store()
        self.fetcher, self.taker = (ThreadPoolExecutor(1, name) for name in ("fetch", "take"))
        self.fetches: dict[str, Future] = {}  # of the units on the device, or on their way
        self.taken: dict[str, Future] = {}  # of each unit's gradient the squares, once it is stored
        self.taking: deque[Future] = deque()
        self.stale: set[str] = set()  # units whose last update is still to be applied
        self.update: Update | None = None

    def _open_store(self) -> Store:
        sizes = {name: layout.size for name, layout in self.layouts.items()}
        kinds, pin = (4 if self.training else 1), self.device.type == "cuda"
        if self.config.stream_to == "ram":
            return RamStore(sizes, kinds, pin)
        if self.config.stream_dir is None:
            Path(self.config.out_dir).mkdir(parents=True, exist_ok=True)
        return DiskStore(sizes, kinds, pin, Path(self.config.stream_dir or self.config.out_dir))

    # The state: into the store, and out of it

    def initialize(self, progress: Callable = iter) -> None:
        def draw(unit: str) -> None:
            module, layout = self.modules[unit], self.layouts[unit]
            weights = Array(layout.size).tensor
            _mount(module, layout.views(weights))
            self.model.init_unit(unit, self.config.seed)
            self._put(unit, WEIGHT, weights)
            module.to("meta")

        draw_units(self.model, draw, progress)
        self._place()

    def load(self, read: Read, updates: int | None, progress: Callable = iter) -> None:
        with_moments = updates is not None and self.training
        for unit, layout in progress(list(self.layouts.items())):
            for row, prefix in enumerate(PREFIXES if with_moments else PREFIXES[:1]):
                flat = Array(layout.size).tensor
                for name, view in layout.views(flat).items():
                    view.copy_(read(f"{prefix}{unit}.{name}", None))
                self._put(unit, slice(row, row + 1), flat)
        self.updates = updates if with_moments else 0
        self._place()

    def _place(self) -> None:
        """Makes every parameter a view of its unit's array on the device. That array has memory
        only while the unit is there."""
        for unit, layout in self.layouts.items():
            self.weights[unit] = Array(layout.size, self.dtype, self.device)
            _mount(self.modules[unit], layout.views(self.weights[unit].tensor))
            self.weights[unit].free()
        prepare_compute(self.config, self.model, self.training)

    def _put(self, unit: str, kind: slice, flat: Tensor) -> None:
        for index, (begin, end) in enumerate(self.store.spans(unit)):
            chunk = self.store.room(unit, index, kind)
            chunk.data[0].copy_(flat[begin:end])
            self.store.give_back(chunk, self.streams.Event(), write=slice(0, 1))
        self.store.settle(unit)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for unit, layout in self.layouts.items():
            if unit in self.stale:
                self._request(unit)
                self._release(unit)
            self.store.settle(unit)
            for row, prefix in enumerate(PREFIXES):
                flat = Array(layout.size).tensor
                for index, chunk in enumerate(self._read(unit, slice(row, row + 1))):
                    flat[slice(*self.store.spans(unit)[index])] = chunk.data[0]
                    self.store.give_back(chunk, self.streams.Event())
                views = layout.views(flat).items()
                yield f"{prefix}{unit}", {f"{prefix}{unit}.{name}": view for name, view in views}
                del flat, views  # before the next array is made

    # What moves

    def _visit(self, sequence: list[list[str]]) -> Iterator[None]:
        """Yields once for each visit in the sequence, while its units are on the device and those
        of the next visit are fetched."""
        for i, units in enumerate(sequence):
            following = sequence[i + 1] if i + 1 < len(sequence) else []
            for unit in (*units, *following):
                self._request(unit)
            for unit in units:
                self.streams.current_stream().wait_event(self.fetches[unit].result())
            yield
            if sequence[i + 2 : i + 3] != [units]:  # the last block is back after the loss
                for unit in set(units) - set(following):
                    self._release(unit)

    def _request(self, unit: str) -> None:
        """Has a unit fetched, and updated if an update is pending."""
        if unit in self.fetches:
            return
        self.weights[unit].allocate()
        allocated = record(self.streams, self.streams.current_stream())
        update = self.update if unit in self.stale else None
        self.stale.discard(unit)
        self.fetches[unit] = self.fetcher.submit(self._fetch, unit, update, allocated)

    def _release(self, unit: str) -> None:
        self.fetches.pop(unit).result()
        self.weights[unit].free()

    def _read(self, unit: str, kinds: slice) -> Iterator:
        """The chunks of a unit, read ahead."""
        reads = deque()
        try:
            for index in range(len(self.store.spans(unit))):
                reads.append(self.store.read(unit, index, kinds))
                if len(reads) > AHEAD:
                    yield reads.popleft().result()
            while reads:
                yield reads.popleft().result()
        finally:  # after an error: who waits for a buffer must not wait for these
            for future in reads:
                with suppress(UserError, RuntimeError):
                    self.store.give_back(future.result(), self.streams.Event())

    def _fetch(self, unit: str, update: Update | None, allocated: object) -> object:
        """Brings the weights to the device, chunk by chunk, after their update if there is one.
        Returns the event after which they are there."""
        weights, decaying = self.weights[unit].tensor.data, self.layouts[unit].decaying
        self.store.settle(unit)
        self.inward.wait_event(allocated)
        ready, moving = allocated, deque()
        spans = self.store.spans(unit)
        chunks = self._read(unit, ALL if update else WEIGHT)
        for (begin, end), chunk in zip(spans, chunks, strict=True):
            with self.streams.stream(self.inward):
                data = chunk.data.to(self.device, non_blocking=True)
                if update:
                    update.apply(data, decaying - begin)
                weights[begin:end].copy_(data[0])
            done = ready = record(self.streams, self.inward)
            if update and data is not chunk.data:  # a copy on a GPU, which has to go back
                self.outward.wait_event(ready)
                with self.streams.stream(self.outward):
                    chunk.data[STATE].copy_(data[STATE], non_blocking=True)
                done = record(self.streams, self.outward)
            self.store.give_back(chunk, done, write=STATE if update else None)
            moving.append((data, done))  # what streams use must not be freed before they are done
            if len(moving) > AHEAD:
                moving.popleft()[1].synchronize()
        for _, done in moving:
            done.synchronize()
        return ready

    def _take(self, unit: str, gradient: Tensor, computed: object, add: bool) -> float:
        """Stores a gradient, added to what is stored; returns the sum of its squares."""
        self.store.settle(unit)
        self.outward.wait_event(computed)
        stored = self._read(unit, GRADIENT) if add else None
        squares, moving = [], deque()
        for index, (begin, end) in enumerate(self.store.spans(unit)):
            chunk = next(stored) if add else self.store.room(unit, index, GRADIENT)
            with self.streams.stream(self.outward):
                part = gradient[begin:end]
                if add:
                    part += chunk.data[0].to(self.device, non_blocking=True)
                squares.append(square_sum([part]))
                chunk.data[0].copy_(part, non_blocking=True)
            done = record(self.streams, self.outward)
            self.store.give_back(chunk, done, write=slice(0, 1))
            moving.append(done)
            if len(moving) > AHEAD:
                moving.popleft().synchronize()
        for done in moving:
            done.synchronize()
        with self.streams.stream(self.outward):  # not to wait for what computes
            return torch.stack(squares).sum().item()

    # What is computed

    def run(
        self, batches: Batches, start: int, stop: int, progress: Callable[[float], None]
    ) -> Iterator[StepStats]:
        def one_step(
            step: int, ids: np.ndarray, targets: np.ndarray, rate: float, limits: tuple
        ) -> tuple:
            loss, norm = self._accumulate(ids, targets, step, progress)
            if counts(loss, norm, limits):
                self.updates += 1
                clip = clip_factor(self.config, torch.tensor(norm, dtype=torch.float64)).item()
                self.update = Update(self.config, rate, clip, self.updates)
                self.stale = set(self.modules)
            return loss, norm

        self.model.train()
        yield from run_steps(self, batches(0, 1), start, stop, one_step)

    def _accumulate(
        self, ids: np.ndarray, targets: np.ndarray, step: int, progress: Callable[[float], None]
    ) -> tuple[float, float]:
        """Leaves the gradient of the mean loss in the store; returns that loss and the norm."""
        backward = 3 if self.config.recompute else 2  # as much work as a forward pass
        work, done = len(ids) * self.config.depth * (1 + backward), 0

        def tick(ids: Tensor, forward: bool) -> None:
            nonlocal done
            done += len(ids) * (1 if forward else backward)
            progress(done / work)

        self.taken.clear()
        loss = 0.0
        for cut in self._passes(ids, targets, step):
            loss += self._pass(cut, targets.size, tick)
        squares = sum(future.result() for future in self.taken.values())
        return loss / targets.size, math.sqrt(squares)

    def _passes(
        self, ids: np.ndarray, targets: np.ndarray, step: int = 0
    ) -> Iterator[list[MicroBatch]]:
        per_pass = self.config.pass_size // self.config.micro_batch_size
        cut = [
            MicroBatch(x, y, derive_seed(self.config.seed, step, number))
            for number, (x, y) in enumerate(micro_batches(self.config, self.device, ids, targets))
        ]
        for begin in range(0, len(cut), per_pass):
            yield cut[begin : begin + per_pass]

    def _pass(
        self, micro_batches: list[MicroBatch], tokens: int, tick: Callable[[Tensor, bool], None]
    ) -> float:
        """Forward and backward; adds to the stored gradients, and returns the sum of the losses."""
        there = [self.embedding, *self.blocks, self.head]
        visits = self._visit([*there, *reversed(self.blocks), self.embedding])
        next(visits)
        with torch.no_grad():
            hidden = [
                self._settle("hidden", i, self._embed(micro_batch))
                for i, micro_batch in enumerate(micro_batches)
            ]
        for layer in range(self.config.depth):
            next(visits)
            for i, micro_batch in enumerate(micro_batches):
                hidden[i] = self._forward(layer, i, hidden[i], micro_batch)
                tick(micro_batch.ids, True)
        next(visits)
        losses = []
        with self._gradients(self.head):
            for i, micro_batch in enumerate(micro_batches):
                x = hidden[i].detach().requires_grad_()
                losses.append(self.model.loss(x, micro_batch.targets))
                (losses[-1] / tokens).backward()
                losses[-1] = losses[-1].detach().double()
                hidden[i] = self._settle("gradient", i, x.grad)
        for layer in reversed(range(self.config.depth)):
            next(visits)
            with self._gradients(self.blocks[layer]):
                for i, micro_batch in enumerate(micro_batches):
                    hidden[i] = self._backward(layer, i, hidden[i], micro_batch)
                    tick(micro_batch.ids, False)
        next(visits)
        with self._gradients(self.embedding):
            for i, micro_batch in enumerate(micro_batches):
                self._embed(micro_batch).backward(hidden[i])
        next(visits, None)
        return torch.stack(losses).sum().item()

    def _embed(self, micro_batch: MicroBatch) -> Tensor:
        self.model.seed_dropout(micro_batch.dropout_seed, 0)
        return self.model.embed(micro_batch.ids)

    def _block(self, layer: int, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        self.model.seed_dropout(micro_batch.dropout_seed, layer + 1)
        return self.model.decoder[layer](x)

    def _forward(self, layer: int, i: int, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """A block's output for the i-th micro-batch; keeps its input, or its graph."""
        if self.config.recompute:
            self.inputs.put(layer, i, x)
            with torch.no_grad():
                return self._settle("hidden", i, self._block(layer, x, micro_batch))
        x = x.detach().requires_grad_()
        y = self._block(layer, x, micro_batch)
        self.graphs[layer, i] = (x, y)
        return y

    def _backward(self, layer: int, i: int, gradient: Tensor, micro_batch: MicroBatch) -> Tensor:
        """The gradient of a block's input from that of its output."""
        if self.config.recompute:
            x = self.inputs.get(layer, i).requires_grad_()
            y = self._block(layer, x, micro_batch)
        else:
            x, y = self.graphs.pop((layer, i))
        y.backward(gradient)
        return self._settle("gradient", i, x.grad)

    def _settle(self, kind: str, i: int, x: Tensor) -> Tensor:
        """What outlives its layer. On a CPU it moves out of the heap, where it would leave holes:
        into an array, in the place of what the layer before left for the i-th micro-batch."""
        if self.device.type != "cpu" or (kind == "hidden" and not self.config.recompute):
            return x
        if kind not in self.settled:
            shape = (self.config.pass_size, *x.shape[1:])
            self.settled[kind] = Array(math.prod(shape), self.dtype).tensor.view(shape)
        begin = i * self.config.micro_batch_size
        return self.settled[kind][begin : begin + len(x)].copy_(x)

    @contextmanager
    def _gradients(self, units: list[str]) -> Iterator[None]:
        """Sums the units' gradients in fp32 arrays, and then has these stored."""
        while len(self.taking) > 1:  # at most one array is on its way while another is filled
            self.taking.popleft().result()
        flats = {}
        for unit in units:
            layout, module = self.layouts[unit], self.modules[unit]
            flats[unit] = Array(layout.size, device=self.device).tensor
            for name, view in layout.views(flats[unit]).items():
                module.get_parameter(name).grad = view
        yield
        computed = record(self.streams, self.streams.current_stream())
        for unit in units:
            self.modules[unit].zero_grad()
            add = unit in self.taken  # the embedding has two parts, and every pass adds one
            future = self.taker.submit(self._take, unit, flats.pop(unit), computed, add)
            self.taken[unit] = future
            self.taking.append(future)

    def evaluate(self, batches: Batches, progress: Callable = iter) -> tuple[float, int]:
        def losses(ids: np.ndarray, targets: np.ndarray) -> Tensor:
            passes = self._passes(ids, targets)
            return torch.stack([self._evaluate_pass(cut) for cut in passes]).sum()

        return sum_losses(self.model, progress(batches(0, 1)), losses)

    def _evaluate_pass(self, micro_batches: list[MicroBatch]) -> Tensor:
        visits = self._visit([self.embedding, *self.blocks, self.head])
        next(visits)
        hidden = [self._embed(micro_batch) for micro_batch in micro_batches]
        for layer in range(self.config.depth):
            next(visits)
            for i, micro_batch in enumerate(micro_batches):
                hidden[i] = self._block(layer, hidden[i], micro_batch)
        next(visits)
        pairs = zip(hidden, micro_batches, strict=True)
        losses = [self.model.loss(x, micro_batch.targets).double() for x, micro_batch in pairs]
        next(visits, None)
        return torch.stack(losses).sum()

    def close(self) -> None:
        self.store.close()
        for thread in (self.fetcher, self.taker):
            thread.shutdown(cancel_futures=True)
        self.store = self.model = self.inputs = None
        for held in (self.modules, self.weights, self.settled, self.graphs):
            held.clear()


class Array:
    """A flat array of zeros whose memory can be freed, and had again, under the views of it. What
    it then holds is undefined.

    On a CPU it is mapped on its own, in huge pages: as large as these arrays are, they would leave
    holes in the heap, and take long to be given in small pages (docs/log.md).
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ):
        self.bytes, self.memory = size * dtype.itemsize, None
        if device.type == "cpu":
            self.memory = mmap.mmap(-1, self.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without them
                self.memory.madvise(mmap.MADV_HUGEPAGE)
            self.tensor = torch.frombuffer(self.memory, dtype=dtype)
        else:
            self.tensor = torch.zeros(size, dtype=dtype, device=device)

    def free(self) -> None:
        if self.memory is not None:
            self.memory.madvise(mmap.MADV_DONTNEED)
        else:
            self.tensor.untyped_storage().resize_(0)

    def allocate(self) -> None:
        if self.memory is None:
            self.tensor.untyped_storage().resize_(self.bytes)


class Inputs:
    """The inputs of the blocks in a pass, in arrays that are made once: on the device or, with
    `activations: host`, in pinned host memory, from where each is brought back while the one before
    it is worked on."""

    def __init__(self, config: Configuration, device: torch.device, dtype: torch.dtype):
        self.device, self.streams = device, torch.get_device_module(device)
        self.inward, self.outward = self.streams.Stream(), self.streams.Stream()
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.stored: dict[tuple[int, int], object] = {}  # the events after which they are
        self.coming: dict[tuple[int, int], tuple[Tensor, object]] = {}
        self.leaving: deque[tuple[Tensor, object]] = deque()
        self.rows, self.on_host = config.micro_batch_size, config.activations == "host"
        shape = (config.pass_size, config.sequence_length, config.width)
        if self.on_host and device.type == "cuda":
            layers = [torch.empty(shape, dtype=dtype, pin_memory=True) for _ in range(config.depth)]
        else:
            size = math.prod(shape)
            layers = [Array(size, dtype, device).tensor.view(shape) for _ in range(config.depth)]
        self.layers = layers

    def put(self, layer: int, i: int, x: Tensor) -> None:
        """Keeps the input of a block for the i-th micro-batch."""
        place = self.layers[layer][i * self.rows : i * self.rows + len(x)]
        self.kept[layer, i] = place
        if not self.on_host:
            place.copy_(x)
            return
        self.outward.wait_event(record(self.streams, self.streams.current_stream()))
        with self.streams.stream(self.outward):
            place.copy_(x, non_blocking=True)
        self.stored[layer, i] = record(self.streams, self.outward)
        self.leaving.append((x, self.stored[layer, i]))
        while self.leaving and self.leaving[0][1].query():  # not to be freed before
            self.leaving.popleft()

    def get(self, layer: int, i: int) -> Tensor:
        """Gives back what was put, once."""
        if not self.on_host:
            return self.kept.pop((layer, i)).detach()
        x, there = self.coming.pop((layer, i), None) or self._bring((layer, i))
        if self.kept:
            following = min(self.kept, key=lambda place: (-place[0], place[1]))
            self.coming[following] = self._bring(following)
        self.streams.current_stream().wait_event(there)
        return x

    def _bring(self, key: tuple[int, int]) -> tuple[Tensor, object]:
        place = self.kept.pop(key)
        x = torch.empty_like(place, device=self.device)
        self.inward.wait_event(record(self.streams, self.streams.current_stream()))
        self.inward.wait_event(self.stored.pop(key))
        with self.streams.stream(self.inward):
            x.copy_(place, non_blocking=True)
        return x, record(self.streams, self.inward)


def record(streams, stream) -> object:
    """An event that passes when the stream gets there; `streams` is the module of its device."""
    event = streams.Event()
    event.record(stream)
    return event


def _mount(module: nn.Module, views: dict[str, Tensor]) -> None:
    """Makes the module's parameters these tensors; their gradients are summed in fp32."""
    for name, view in views.items():
        path, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(view)
        parameter.grad_dtype = torch.float32  # sums of micro-batches lose digits in bf16
        setattr(module.get_submodule(path), attribute, parameter)
