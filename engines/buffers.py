"""Memory that the streaming engine holds for the whole run, and what passes through it."""

import ctypes
import math
import mmap
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

from configuration import Configuration

AHEAD = 2  # chunks or activations on their way while one is in use


def is_separate(device: torch.device) -> bool:
    """Returns whether the device has memory of its own, and streams that run beside the host."""
    return device.type != "cpu"


class Array:
    """A flat array of zeros whose memory can be freed, and allocated again, under its views. Its
    content is then undefined. Without a device it is in host memory.

    On a CPU it is mapped on its own, in huge pages: large arrays fragment the heap, and small pages
    are slow to allocate. `pinned`: a GPU copies from and to it without waiting for the host. Memory
    that CUDA allocates itself would be rounded up to a power of two, and some file systems refuse
    to read into it directly.
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        pinned: bool = False,
    ):
        self.bytes = size * dtype.itemsize
        self.memory = None
        self.pinned = False
        if device is None or not is_separate(device):
            self.memory = mmap.mmap(-1, self.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages
                self.memory.madvise(mmap.MADV_HUGEPAGE)
            self.tensor = torch.frombuffer(self.memory, dtype=dtype)
            self.pinned = pinned and pin(self.tensor)
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

    def unpin(self) -> None:
        """Must be called, when no copy is under way, before the memory goes."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self.pinned = False


def pin(tensor: Tensor) -> bool:
    """Registers host memory with CUDA. Returns False where the system does not allow so much;
    copies are slower then."""
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(status) != 0:  # else the next kernel's check finds it; of the library that torch uses
        ctypes.CDLL(torch._C.__file__).cudaGetLastError()
    return int(status) == 0


class Staging:
    """Device memory for chunks on their way, used in turns. On a CPU a chunk stays where it is."""

    def __init__(self, elements: int, kinds: int, device: torch.device):
        self.streams = torch.get_device_module(device)
        self.copying = self.streams.Stream(priority=-1)
        self.slots = deque()
        if is_separate(device):
            for _ in range(AHEAD + 1):
                memory = torch.zeros(kinds * elements, device=device)
                self.slots.append((memory, record(self.streams, self.streams.current_stream())))

    def bring(self, data: Tensor) -> Tensor:
        """Returns a copy of a chunk's elements, (kinds, count), complete for the stream that is
        current. `give_back` must follow."""
        if not self.slots:
            return data
        memory, free = self.slots[0]
        self.copying.wait_event(free)
        with self.streams.stream(self.copying):
            copy = memory[: data.numel()].view_as(data).copy_(data, non_blocking=True)
        self.streams.current_stream().wait_event(record(self.streams, self.copying))
        return copy

    def give_back(self, done: object) -> None:
        """Ends the use of what was brought last, after the event `done`."""
        if self.slots:
            memory, _ = self.slots.popleft()
            self.slots.append((memory, done))


class HostActivations:
    """The inputs of recomputed blocks in a pass, in pinned host memory. Each is copied back into
    the tensor that it came from, whose memory was freed, while the one before it is in use."""

    def __init__(self, config: Configuration, device: torch.device, dtype: torch.dtype):
        self.streams = torch.get_device_module(device)
        self.copy_in = self.streams.Stream()
        self.copy_out = self.streams.Stream()
        self.offloaded: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.prefetched: dict[tuple[int, int], object] = {}
        self.in_flight: deque[tuple[Tensor, object]] = deque()
        self.rows = config.micro_batch_size
        shape = (config.stream_batch_size, config.sequence_length, config.width)
        self.arrays = [
            Array(math.prod(shape), dtype, pinned=device.type == "cuda")
            for _ in range(config.depth)
        ]
        self.layers = [array.tensor.view(shape) for array in self.arrays]

    def put(self, layer: int, i: int, x: Tensor) -> None:
        """Takes the input of a block for the i-th micro-batch, before the block runs."""
        place = self.layers[layer][i * self.rows : i * self.rows + len(x)]
        self.copy_out.wait_event(record(self.streams, self.streams.current_stream()))
        with self.streams.stream(self.copy_out):
            place.copy_(x, non_blocking=True)
        self.in_flight.append((x, record(self.streams, self.copy_out)))
        self.offloaded[layer, i] = (x, place)
        if len(self.in_flight) > AHEAD:
            self._free(*self.in_flight.popleft())

    def _free(self, x: Tensor, copied: object) -> None:
        self.streams.current_stream().wait_event(copied)
        x.untyped_storage().resize_(0)

    def get(self, layer: int, i: int) -> None:
        """Brings back what was put, once."""
        while self.in_flight:
            self._free(*self.in_flight.popleft())
        copied = self.prefetched.pop((layer, i), None) or self._fetch((layer, i))
        if self.offloaded:  # the backward pass takes the last layer next
            last = max(key[0] for key in self.offloaded)
            following = min(key for key in self.offloaded if key[0] == last)
            self.prefetched[following] = self._fetch(following)
        self.streams.current_stream().wait_event(copied)

    def _fetch(self, key: tuple[int, int]) -> object:
        x, place = self.offloaded.pop(key)
        x.untyped_storage().resize_(x.nbytes)
        self.copy_in.wait_event(record(self.streams, self.streams.current_stream()))
        with self.streams.stream(self.copy_in):
            x.copy_(place, non_blocking=True)
        return record(self.streams, self.copy_in)

    def close(self) -> None:
        for array in self.arrays:
            array.unpin()


def record(streams, stream) -> object:
    """Returns an event that passes when the stream gets there; `streams` is its device's module."""
    event = streams.Event()
    event.record(stream)
    return event
