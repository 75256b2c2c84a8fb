"""The tensors of an engine: drawn, loaded and saved, layer by layer."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import product

import torch
from torch import Tensor

from common.console import UserError
from configuration import Configuration
from model import GPT
from weights.checkpoint import KINDS

INIT_BYTES = 4e9  # of layers that are drawn at a time
Read = Callable[[str, slice | None], Tensor]  # (name, rows or None: all) -> tensor on the CPU
Watch = Callable[[Iterable], Iterable]  # tracks items: yields them, and shows how many are done


class EngineState:
    """Holds a model's weights and, for training, Adam's moments.

    Tensors have the same names in every engine: those of the model's parameters, and the same with
    the prefixes `exp_avg.` and `exp_avg_sq.` for the moments. A subclass has `weights` by name and
    a torch `optimizer`, or its own `put` and `get`.
    """

    file_suffix = ""  # of this process's files of a checkpoint

    def __init__(self, config: Configuration, training: bool = True):
        self.config = config
        self.training = training
        self.optimizer_steps = 0  # applied ones
        with torch.device("meta"):
            self.model = GPT(config)
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 0:
                raise UserError(f"model.py: {name} is a scalar; give it the shape (1,)")
        self.layers = {
            layer: [f"{layer}.{name}" for name, _ in module.named_parameters()]
            for layer, module in self.model.layers().items()
        }
        self.saved_layers = list(self.layers)  # by this process

    def ready(self) -> None:
        """Prepares for the first step, once all tensors were put and optimizer_steps is set."""

    @torch.no_grad()
    def put(self, layer: str, kind: str, tensors: dict[str, Tensor]) -> None:
        """Stores a layer's tensors of one kind, which are on the CPU: of each the rows that `rows`
        returns. Several threads may call it, each for another layer."""
        for name, tensor in tensors.items():
            target = self.weights[name]
            if kind != "":
                state = self.optimizer.state[target]
                state["step"] = torch.tensor(float(self.optimizer_steps), device=target.device)
                target = torch.zeros_like(target)
                state[kind.removesuffix(".")] = target
            self.local(target).copy_(tensor)

    def get(self, layer: str, kind: str) -> dict[str, Tensor]:
        """Returns a layer's tensors of one kind, on the CPU; moments are zeros before the first
        update."""
        found = {}
        for name in self.layers[layer]:
            target = self.weights[name]
            if kind != "":
                state = self.optimizer.state.get(target)
                target = state[kind.removesuffix(".")] if state else torch.zeros_like(target)
            found[name] = self.local(target).cpu()
        return found

    def local(self, tensor: Tensor) -> Tensor:
        """Returns what this process has of a tensor."""
        return tensor.detach()

    def rows(self, name: str) -> slice | None:
        """Returns the rows of a tensor that this process stores; None: all."""
        return None

    def initialize(self, track: Watch = iter) -> None:
        """Draws the initial weights from the seed, several layers at a time as far as INIT_BYTES
        allows."""
        with torch.device("meta"):
            blank = GPT(self.config)

        def draw(layer: str) -> None:
            named = blank.build_layer(layer, self.config.seed).named_parameters(layer)
            tensors = {name: parameter.detach() for name, parameter in named}
            self.put(layer, "", {name: t[self.rows(name) or ...] for name, t in tensors.items()})

        modules = blank.layers().values()
        largest = max(sum(p.numel() for p in module.parameters()) for module in modules)
        threads = max(1, min(os.cpu_count(), int(INIT_BYTES / largest / 4)))
        with ThreadPoolExecutor(threads) as pool, closing(pool.map(draw, self.layers)) as drawn:
            for _ in track(list(self.layers)):  # an error cancels what has not begun
                next(drawn)
        self.ready()

    def load(self, read: Read, optimizer_steps: int | None, track: Watch = iter) -> None:
        """Stores every tensor from `read`; with optimizer_steps None the weights only."""
        kinds = KINDS[:1]
        if optimizer_steps is not None and self.training:
            kinds = KINDS
            self.optimizer_steps = optimizer_steps
        for layer, names in track(list(self.layers.items())):
            for kind in kinds:
                self.put(layer, kind, {name: read(kind + name, self.rows(name)) for name in names})
        self.ready()

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yields (name of a file, its tensors on the CPU), one kind of tensors of one layer at a
        time: the rows that this process has."""
        for layer, kind in product(self.saved_layers, KINDS):
            tensors = {kind + name: tensor for name, tensor in self.get(layer, kind).items()}
            yield kind + layer + self.file_suffix, tensors
            del tensors  # before the next are made
