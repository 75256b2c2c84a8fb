"""Memory of the streaming engine that is allocated once, outside the heap."""

import math
import mmap
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

from configuration import Configuration


class Array:
    """A flat array of zeros whose memory can be freed, and allocated again, under its views. Its
    content is then undefined.

    On a CPU it is mapped on its own, in huge pages: large arrays fragment the heap, and small pages
    are slow to allocate.
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
            with suppress(OSError):  # a kernel without huge pages
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


class Activations:
    """The inputs of the blocks in a pass, in arrays that are made once: on the device or, with
    `activation_location: host`, in pinned host memory, from where each is copied back while the one
    before it is in use."""

    def __init__(self, config: Configuration, device: torch.device, dtype: torch.dtype):
        self.device, self.streams = device, torch.get_device_module(device)
        self.host_to_device, self.device_to_host = self.streams.Stream(), self.streams.Stream()
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.stored: dict[tuple[int, int], object] = {}  # events after which they are complete
        self.coming: dict[tuple[int, int], tuple[Tensor, object]] = {}
        self.leaving: deque[tuple[Tensor, object]] = deque()
        self.rows, self.on_host = config.micro_batch_size, config.activation_location == "host"
        shape = (config.stream_batch_size, config.sequence_length, config.width)
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
        self.device_to_host.wait_event(record(self.streams, self.streams.current_stream()))
        with self.streams.stream(self.device_to_host):
            place.copy_(x, non_blocking=True)
        self.stored[layer, i] = record(self.streams, self.device_to_host)
        self.leaving.append((x, self.stored[layer, i]))
        while self.leaving and self.leaving[0][1].query():  # not to be freed before
            self.leaving.popleft()

    def get(self, layer: int, i: int) -> Tensor:
        """What was put, once."""
        if not self.on_host:
            return self.kept.pop((layer, i)).detach()
        x, there = self.coming.pop((layer, i), None) or self._fetch((layer, i))
        if self.kept:
            following = min(self.kept, key=lambda place: (-place[0], place[1]))
            self.coming[following] = self._fetch(following)
        self.streams.current_stream().wait_event(there)
        return x

    def _fetch(self, key: tuple[int, int]) -> tuple[Tensor, object]:
        place = self.kept.pop(key)
        x = torch.empty_like(place, device=self.device)
        self.host_to_device.wait_event(record(self.streams, self.streams.current_stream()))
        self.host_to_device.wait_event(self.stored.pop(key))
        with self.streams.stream(self.host_to_device):
            x.copy_(place, non_blocking=True)
        return x, record(self.streams, self.host_to_device)


def record(streams, stream) -> object:
    """An event that passes when the stream gets there; `streams` is the module of its device."""
    event = streams.Event()
    event.record(stream)
    return event
