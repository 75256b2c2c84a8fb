"""Models larger than the device: weights and optimizer state are in a parameter store, in host RAM
or on disk, and pass through the device layer by layer. The state of some blocks may stay on the
device: fetching one of these updates it there and moves nothing over the link.

A step is layer-major: all micro-batches go through a layer while its weights are on the device, so
a weight moves once forward and once backward, however large the batch. The global norm that clips
the gradients is known only when the last of them is, so a layer's AdamW update waits until the
layer is fetched for the next step's forward pass: the update needs no pass of its own.

Three threads share the work: this one computes, one fetches (and updates), one stores gradients. On
a GPU copies in, updates and copies out have streams of their own beside the one that computes, and
the host waits for the device at the end of a step. Two rules keep that safe: a stream waits for the
event after which what it reads is complete, and the compute thread allocates and frees the memory
of layers and gradients, once the compute stream has waited for all who use it. On a CPU streams and
events do nothing.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from common.console import UserError, warn
from configuration import Configuration
from dataset import Batch
from engines.base import Engine, Limits, Report, micro_batches, prepare_compute
from engines.buffers import AHEAD, Array, HostActivations, Staging, is_separate, record
from engines.heap import Holes, return_freed_memory
from engines.optimizer import clip_divisor, decays, is_applied, square_sum
from engines.store import ALL, GRADIENT, STATE, WEIGHT, DiskStore, MemoryStore, Store, padded
from engines.threads import start_threads
from engines.update import Update
from model import derive_seed
from weights.checkpoint import KINDS

LAYERS_AHEAD = 2  # visits whose layers are prefetched
ALIGNMENT = 64  # elements: where a parameter may start in its layer's array


@dataclass
class MicroBatch:
    """ids and targets (sequences, sequence_length) on the device."""

    ids: Tensor
    targets: Tensor
    dropout_seed: int


@dataclass
class Work:
    """Reports the part of a step's work that is done, in sequences through a block's forward."""

    total: int
    report: Report
    done: int = 0

    def add(self, amount: int) -> None:
        self.done += amount
        self.report(self.done / self.total)


@dataclass
class Layout:
    """Where the parameters of a layer are in its flat arrays, those with weight decay first."""

    places: dict[str, tuple[int, torch.Size]]  # first element and shape, by name
    decay_end: int  # weight decay applies to the elements before this one
    size: int  # padded

    @staticmethod
    def of(layer: nn.Module) -> "Layout":
        ordered = sorted(layer.named_parameters(), key=lambda item: not decays(item[1]))
        places = {}
        end = 0
        decay_end = 0
        for name, parameter in ordered:
            places[name] = (end, parameter.shape)
            end += math.ceil(parameter.numel() / ALIGNMENT) * ALIGNMENT
            if decays(parameter):
                decay_end = end
        return Layout(places, decay_end, padded(end))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns the parts of a flat array, in the shapes of the parameters."""
        return {
            name: flat[begin : begin + shape.numel()].view(shape)
            for name, (begin, shape) in self.places.items()
        }


class StreamingEngine(Engine):
    """Holds the layers of three visits at a time, the activations between layers, and the state of
    the blocks that stay on the device."""

    def __init__(self, config: Configuration, training: bool = True, blocks_on_device: int = 0):
        super().__init__(config, training)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.streams = torch.get_device_module(self.device)
        # of high priority: the matmuls of the compute stream would delay them
        self.updates = self.streams.Stream(priority=-1)
        self.copies_out = self.streams.Stream(priority=-1)
        self.offloaded = None
        if training and is_separate(self.device) and config.activation_location == "host":
            self.offloaded = HostActivations(config, self.device, self.dtype)
        self.holes = Holes()
        self.boundaries: dict[object, Tensor] = {}  # activations and gradients between two layers
        self.graphs: dict[tuple[int, int], tuple[Tensor, GradientEdge]] = {}
        self.weights: dict[str, Array] = {}
        self.modules = self.model.layers()
        self.layouts = {name: Layout.of(module) for name, module in self.modules.items()}
        names = list(self.modules)
        blocks = [name for name in names if name.startswith("decoder.")]
        self.blocks = [[name] for name in blocks]
        self.embedding = names[: names.index(blocks[0])]
        self.head = self.model.head_layers()
        self.first = [self.embedding, *self.blocks, self.head][: LAYERS_AHEAD + 1]
        sizes = {name: layout.size for name, layout in self.layouts.items()}
        # those with their state on the device, and its size; spread evenly, as fetches run two
        # layers ahead: if these were the first, the link would have nothing to do beside them
        self.staying = {
            name: sizes.pop(name)
            for i, name in enumerate(blocks)
            if i * blocks_on_device % len(blocks) < blocks_on_device
        }
        kinds = 4 if training else 1
        on_device = MemoryStore(self.staying, kinds, False, self.device)
        store = self._open_store(sizes, kinds)
        self.stores = dict.fromkeys(sizes, store) | dict.fromkeys(self.staying, on_device)
        elements = min(store.chunk, max(sizes.values()))
        self.fetched = Staging(elements, kinds, self.device)
        self.added = Staging(elements, 1, self.device)
        self.fetcher = start_threads(1, "fetch")
        self.storer = start_threads(1, "store")
        self.fetches: dict[str, Future] = {}  # of the layers on the device, or on their way
        # the sum of squares of each layer's gradient, with the event after which it is stored
        self.squares: dict[str, Future] = {}
        self.storing: deque[tuple[Future, Tensor]] = deque()  # and the gradient
        self.outdated: set[str] = set()  # layers whose last update is not yet applied
        self.update: Update | None = None

    def _open_store(self, sizes: dict[str, int], kinds: int) -> Store:
        """Opens the store of the layers that do not stay on the device."""
        pin = self.device.type == "cuda"
        if self.config.stream_to == "ram":
            store = MemoryStore(sizes, kinds, pin)
        else:
            folder = Path(self.config.stream_dir or self.config.out_dir)
            if self.config.stream_dir is None:
                folder.mkdir(parents=True, exist_ok=True)
            store = DiskStore(sizes, kinds, pin, folder)
        if pin and not store.pinned:
            warn("host memory can't be pinned (see `ulimit -l`); copies are slower")
        return store

    # The parameter store

    def put(self, layer: str, kind: str, tensors: dict[str, Tensor]) -> None:
        layout = self.layouts[layer]
        store = self.stores[layer]
        row = KINDS.index(kind)
        flat = Array(layout.size).tensor
        for name, view in layout.views(flat).items():
            view.copy_(tensors[f"{layer}.{name}"])
        for index, (begin, end) in enumerate(store.spans(layer)):
            chunk = store.buffer(layer, index, slice(row, row + 1))
            chunk.data[0].copy_(flat[begin:end])
            store.give_back(chunk, self.streams.Event(), write=slice(0, 1))
        store.wait(layer)

    def ready(self) -> None:
        """Makes every parameter a view of its layer's array on the device, which has memory only
        while the layer is there."""
        for layer, layout in self.layouts.items():
            self.weights[layer] = Array(layout.size, self.dtype, self.device)
            _mount(self.modules[layer], layout.views(self.weights[layer].tensor))
            self.weights[layer].free()
        prepare_compute(self.config, self.model, self.training)
        return_freed_memory()  # of what was drawn or loaded, by other threads too

    def get(self, layer: str, kind: str) -> dict[str, Tensor]:
        layout = self.layouts[layer]
        store = self.stores[layer]
        row = KINDS.index(kind)
        if layer in self.outdated:  # fetching it applies the update
            self._prefetch(layer)
        if layer in self.fetches:
            self._wait_for(layer)
            self._release(layer)
        store.wait(layer)
        flat = Array(layout.size).tensor
        for index, chunk in enumerate(self._read(layer, slice(row, row + 1))):
            flat[slice(*store.spans(layer)[index])] = chunk.data[0]
            store.give_back(chunk, self.streams.Event())
        return {f"{layer}.{name}": view for name, view in layout.views(flat).items()}

    # Moving layers

    def _visit(self, sequence: list[list[str]]) -> Iterator[None]:
        """Yields once for each visit in the sequence, while its layers are on the device and those
        of the next visits are fetched."""
        for i, layers in enumerate(sequence):
            following = list(chain(*sequence[i + 1 : i + 1 + LAYERS_AHEAD]))
            for layer in (*layers, *following):
                self._prefetch(layer)
            for layer in layers:
                self._wait_for(layer)
            yield
            for layer in set(layers) - set(following):
                self._release(layer)

    def _prefetch(self, layer: str) -> None:
        """Starts to fetch a layer, and to apply its pending update, if any."""
        if layer in self.fetches:
            return
        self.weights[layer].allocate()
        allocated = record(self.streams, self.streams.current_stream())
        update = None
        if layer in self.outdated:
            update = self.update
        self.outdated.discard(layer)
        self.fetches[layer] = self.fetcher.submit(self._fetch, layer, update, allocated)

    def _wait_for(self, layer: str) -> None:
        """Has the compute stream wait until a layer is on the device."""
        self.streams.current_stream().wait_event(self.fetches[layer].result())

    def _release(self, layer: str) -> None:
        del self.fetches[layer]
        self.weights[layer].free()

    def _read(self, layer: str, kinds: slice) -> Iterator:
        """Yields the chunks of a layer, read ahead."""
        store = self.stores[layer]
        reads = deque()
        try:
            for index in range(len(store.spans(layer))):
                reads.append(store.read(layer, index, kinds))
                if len(reads) > AHEAD:
                    yield reads.popleft().result()
            while reads:
                yield reads.popleft().result()
        finally:  # after an error: free the buffers for whoever waits for one
            for future in reads:
                with suppress(UserError, RuntimeError):
                    store.give_back(future.result(), self.streams.Event())

    def _fetch(self, layer: str, update: Update | None, allocated: object) -> object:
        """Copies the weights to the device, chunk by chunk, and updates them if an update is
        pending. Returns the event after which they are complete."""
        weights = self.weights[layer].tensor.data
        decay_end = self.layouts[layer].decay_end
        store = self.stores[layer]
        store.wait(layer)
        spans = store.spans(layer)
        chunks = self._read(layer, ALL if update else WEIGHT)
        with self.streams.stream(self.updates):
            self.updates.wait_event(allocated)
            for (begin, end), chunk in zip(spans, chunks, strict=True):
                data = chunk.data if layer in self.staying else self.fetched.bring(chunk.data)
                if update:
                    update.apply(data, decay_end - begin)
                weights[begin:end].copy_(data[0])
                done = record(self.streams, self.updates)
                if update and data is not chunk.data:
                    self.copies_out.wait_event(done)
                    with self.streams.stream(self.copies_out):
                        chunk.data[STATE].copy_(data[STATE], non_blocking=True)
                    done = record(self.streams, self.copies_out)
                if data is not chunk.data:
                    self.fetched.give_back(done)
                store.give_back(chunk, done, write=STATE if update else None)
            return record(self.streams, self.updates)

    def _store_gradient(
        self, layer: str, gradient: Tensor, computed: object, add: bool
    ) -> tuple[Tensor, object]:
        """Stores a gradient; with `add`, added to the stored one. Returns the sum of its squares,
        and the event after which both are complete."""
        store = self.stores[layer]
        store.wait(layer)
        stored = self._read(layer, GRADIENT) if add else None
        with self.streams.stream(self.copies_out):
            self.copies_out.wait_event(computed)
            for index, (begin, end) in enumerate(store.spans(layer)):
                chunk = next(stored) if add else store.buffer(layer, index, GRADIENT)
                part = gradient[begin:end]
                if add and layer in self.staying:
                    part += chunk.data[0]
                elif add:
                    part += self.added.bring(chunk.data)[0]
                    self.added.give_back(record(self.streams, self.copies_out))
                chunk.data[0].copy_(part, non_blocking=True)
                done = record(self.streams, self.copies_out)
                store.give_back(chunk, done, write=slice(0, 1))
            squares = square_sum([gradient])
            return squares, record(self.streams, self.copies_out)

    # Compute

    def step(
        self, step: int, batch: Batch, rate: float, limits: Limits, report_progress: Report
    ) -> tuple[float, float]:
        loss, norm = self._accumulate(batch, step, report_progress)
        if is_applied(loss, norm, limits):
            self.optimizer_steps += 1
            clip = clip_divisor(self.config, torch.tensor(norm, dtype=torch.float64)).item()
            self.update = Update(self.config, rate, clip, self.optimizer_steps)
            self.outdated.update(self.modules)
        for layer in chain(*self.first):  # for the next step
            self._prefetch(layer)
        return loss, norm

    def _accumulate(self, batch: Batch, step: int, report_progress: Report) -> tuple[float, float]:
        """Leaves the gradient of the mean loss in the store; returns that loss and the norm."""
        # a block's backward pass is as much work as two forward passes, and recomputing is a third
        self.backward_work = 3 if self.config.activation_checkpointing else 2
        total = len(batch.ids) * self.config.depth * (1 + self.backward_work)
        work = Work(total, report_progress)
        self.squares.clear()
        passes = self._passes(batch, step)
        losses = [self._pass(part, batch.targets.size, work) for part in passes]
        squares = []
        for future in self.squares.values():
            square, stored = future.result()
            self.streams.current_stream().wait_event(stored)
            squares.append(square)
        self.storing.clear()
        norm = torch.stack(squares).sum().sqrt()
        return torch.stack(losses).sum().item(), norm.item()

    def _passes(self, batch: Batch, step: int = 0) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches that go through the layers together."""
        together = len(batch.ids)
        if self.model.training:
            together = self.config.stream_batch_size // self.config.micro_batch_size
        parts = []
        for i, (ids, targets) in enumerate(micro_batches(self.config, self.device, batch)):
            parts.append(MicroBatch(ids, targets, derive_seed(self.config.seed, step, i)))
            if len(parts) == together:
                yield parts
                parts = []
        if parts:
            yield parts

    def _pass(self, parts: list[MicroBatch], tokens: int, work: Work) -> Tensor:
        """Forward and backward; the first pass stores gradients, and the next ones add to them.
        Returns its part of the loss."""
        forward = [self.embedding, *self.blocks, self.head]
        visits = self._visit([*forward, *reversed(self.blocks), self.embedding])
        next(visits)
        with torch.no_grad():
            hidden = [self._keep(0, i, self._embed(part)) for i, part in enumerate(parts)]
        for layer in range(self.config.depth):
            next(visits)
            for i, part in enumerate(parts):
                hidden[i] = self._forward(layer, i, hidden[i], part)
                work.add(len(part.ids))
        next(visits)
        losses = []
        with self._gradients(self.head):
            for i, part in enumerate(parts):
                x = hidden[i].detach().requires_grad_()
                losses.append(self.model.loss(x, part.targets, tokens))
                losses[-1].backward()
                losses[-1] = losses[-1].detach().double()
                hidden[i] = self._keep("gradient", i, x.grad)
        for layer in reversed(range(self.config.depth)):
            next(visits)
            with self._gradients(self.blocks[layer]):
                for i, part in enumerate(parts):
                    hidden[i] = self._backward(layer, i, hidden[i])
                    work.add(self.backward_work * len(part.ids))
        next(visits)
        with self._gradients(self.embedding):
            for i, part in enumerate(parts):
                self._embed(part).backward(hidden[i])
        next(visits, None)
        return torch.stack(losses).sum()

    def _embed(self, part: MicroBatch) -> Tensor:
        self.model.seed_dropout(part.dropout_seed, 0)
        return self.model.embed(part.ids)

    def _block(self, layer: int, x: Tensor, part: MicroBatch) -> Tensor:
        self.model.seed_dropout(part.dropout_seed, layer + 1)
        return self.model.decoder[layer](x)

    def _forward(self, layer: int, i: int, x: Tensor, part: MicroBatch) -> Tensor:
        """Returns a block's output for the i-th micro-batch; keeps its graph, which is little more
        than its input with `activation_checkpointing`."""
        x = x.detach().requires_grad_()
        if self.offloaded:
            self.offloaded.put(layer, i, x.data)  # .data leaves the version that autograd checks
        y = self._block(layer, x, part)
        self.graphs[layer, i] = (x, get_gradient_edge(y))
        return self._keep(layer + 1, i, y.detach())

    def _backward(self, layer: int, i: int, gradient: Tensor) -> Tensor:
        """Returns the gradient of a block's input from that of its output."""
        x, output = self.graphs.pop((layer, i))
        if self.offloaded:
            self.offloaded.get(layer, i)
        torch.autograd.backward(output, gradient)
        return self._keep("gradient", i, x.grad)

    def _keep(self, place: object, i: int, x: Tensor) -> Tensor:
        """Keeps what outlives its layer. On a CPU it is copied into an array that is used again for
        the i-th micro-batch of every pass, as it would fragment the heap."""
        kept_graph = place != "gradient" and not self.config.activation_checkpointing
        if is_separate(self.device) or kept_graph:
            return x
        self.holes.limit()
        if place not in self.boundaries:
            shape = (self.config.stream_batch_size, *x.shape[1:])
            self.boundaries[place] = Array(math.prod(shape), self.dtype).tensor.view(shape)
        begin = i * self.config.micro_batch_size
        return self.boundaries[place][begin : begin + len(x)].copy_(x)

    @contextmanager
    def _gradients(self, layers: list[str]) -> Iterator[None]:
        """Sums the layers' gradients in fp32 arrays, and then starts to store them."""
        stored = self._stored({self.layouts[layer].size for layer in layers})
        flats = {}
        for layer in layers:
            layout = self.layouts[layer]
            module = self.modules[layer]
            if layout.size in stored:  # on a CPU faster than new memory
                flats[layer] = stored.pop(layout.size).zero_()
            else:
                flats[layer] = Array(layout.size, device=self.device).tensor
            for name, view in layout.views(flats[layer]).items():
                parameter = module.get_parameter(name)
                parameter.grad = view
                parameter.main_grad = view
        yield
        computed = record(self.streams, self.streams.current_stream())
        for layer in layers:
            for parameter in self.modules[layer].parameters():
                parameter.grad = None
                parameter.main_grad = None
            add = layer in self.squares  # a later pass, or the embedding's second part
            flat = flats.pop(layer)
            future = self.storer.submit(self._store_gradient, layer, flat, computed, add)
            self.squares[layer] = future
            self.storing.append((future, flat))

    def _stored(self, sizes: set[int]) -> dict[int, Tensor]:
        """Waits until at most one array is being stored while another is filled. Returns those that
        were stored and have one of these sizes, by size, and frees the others."""
        found = {}
        while len(self.storing) > 1:
            future, flat = self.storing[0]
            self.streams.current_stream().wait_event(future.result()[1])
            self.storing.popleft()
            if len(flat) in sizes:
                found[len(flat)] = flat
        return found

    def sum_losses(self, batch: Batch) -> Tensor:
        losses = [
            self.model.loss(x, part.targets).double()
            for parts in self._passes(batch)
            for x, part in zip(self._outputs(parts), parts, strict=True)
        ]
        return torch.stack(losses).sum()

    def last_logits(self, texts: list[Tensor], places: list[int]) -> list[Tensor]:
        outputs = self._outputs([MicroBatch(ids, ids, 0) for ids in texts])
        return [self.model.logits(x[:, place])[0] for x, place in zip(outputs, places, strict=True)]

    def _outputs(self, parts: list[MicroBatch]) -> Iterator[Tensor]:
        """Yields the last block's output for each micro-batch, while the head is on the device."""
        visits = self._visit([self.embedding, *self.blocks, self.head])
        next(visits)
        hidden = [self._embed(part) for part in parts]
        for layer in range(self.config.depth):
            next(visits)
            for i, part in enumerate(parts):
                hidden[i] = self._block(layer, hidden[i], part)
        next(visits)
        yield from hidden
        next(visits, None)

    def close(self) -> None:
        for thread in (self.fetcher, self.storer):
            thread.shutdown(cancel_futures=True)
        self.streams.synchronize()  # copies use the store's memory
        for store in set(self.stores.values()):
            store.close()
        if self.offloaded:
            self.offloaded.close()
        self.stores = self.model = self.offloaded = self.fetched = self.added = None
        for held in (self.modules, self.weights, self.boundaries, self.graphs, self.storing):
            held.clear()


def _mount(module: nn.Module, views: dict[str, Tensor]) -> None:
    """Makes the module's parameters these tensors; their gradients are summed in fp32."""
    for name, view in views.items():
        path, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(view)
        parameter.grad_dtype = torch.float32  # sums of micro-batches lose digits in bf16
        setattr(module.get_submodule(path), attribute, parameter)
