"""A happens-before race detector for the streaming engine: its GPU branch runs on a CPU, with a
stand-in for torch.cuda whose streams and events order nothing and keep vector clocks.

Every stream and every thread of the host is an actor with a clock. An event copies the clock of its
stream; who waits for the event merges that copy into its own. Each operation notes which bytes it
reads and writes, and when by its actor's clock. Two accesses of the same bytes, one of them a
write, are a race if neither actor had the other's clock by then, whatever the timing was. What
CUDA's caching allocator would do is noted too: freed memory is used again by the stream that
allocated it, so freeing is a write of that stream.

Array memory that is mapped is host memory; all other tensors are the device's.
"""

import os
import random
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines import buffers, store, streaming, threads

ENGINES = str(Path(streaming.__file__).parent)
Clock = dict[str, int]
Site = tuple[str, int]  # a file of engines/ and a line


@dataclass
class Access:
    """Of the bytes from begin to end, by an actor when its own clock showed `time`."""

    begin: int
    end: int
    write: bool
    actor: str
    time: int
    site: Site | None


class Event:
    """torch.cuda.Event."""

    def __init__(self, detector: "Detector"):
        self.detector, self.clock = detector, {}

    def record(self, stream: "Stream") -> None:
        self.clock = self.detector.launch(stream.name)

    def synchronize(self) -> None:
        if not self.detector.is_skipped(sys._getframe(1)):
            self.detector.merge(self.detector.thread(), self.clock)


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, detector: "Detector", name: str):
        self.detector, self.name = detector, name

    def wait_event(self, event: Event) -> None:
        if not self.detector.is_skipped(sys._getframe(1)):
            self.detector.merge(self.name, event.clock)


class Detector:
    """Notes accesses and finds races; stands in for the module torch.cuda.

    skipped: a wait that is taken away. delays: seconds that tasks of other threads sleep at most.
    """

    def __init__(self, skipped: Site | None = None, delays: float = 0.0, seed: int = 0):
        self.skipped, self.delays, self.source = skipped, delays, random.Random(seed)
        self.lock, self.local = threading.RLock(), threading.local()
        self.clocks: dict[str, Clock] = defaultdict(dict)
        self.accesses: dict[object, list[Access]] = defaultdict(list)
        self.memory: dict[int, object] = {}  # a storage's address -> the key of its accesses
        self.on_host: set[object] = set()  # keys
        self.count, self.races, self.waits, self.streams = 0, [], set(), 0
        self.compute = Stream(self, "compute")

    # What the engine calls

    def Event(self) -> Event:
        return Event(self)

    def Stream(self, priority: int = 0) -> Stream:
        self.streams += 1
        return Stream(self, f"stream {self.streams}")

    def current_stream(self) -> Stream:
        return getattr(self.local, "stream", self.compute)

    @contextmanager
    def stream(self, stream: Stream):
        before, self.local.stream = self.current_stream(), stream
        yield
        self.local.stream = before

    def synchronize(self) -> None:
        if not self.is_skipped(sys._getframe(1)):
            for actor in [name for name in self.clocks if not name.startswith("thread")]:
                self.merge(self.thread(), self.clocks[actor])

    # Clocks

    def thread(self) -> str:
        return f"thread {threading.get_ident()}"

    def is_skipped(self, frame) -> bool:
        site = (os.path.basename(frame.f_code.co_filename), frame.f_lineno)
        self.waits.add(site)
        return site == self.skipped

    def merge(self, actor: str, other: Clock) -> None:
        with self.lock:
            mine = self.clocks[actor]
            for name, at in other.items():
                mine[name] = max(at, mine.get(name, 0))

    def tick(self, actor: str) -> Clock:
        with self.lock:
            self.clocks[actor][actor] = self.clocks[actor].get(actor, 0) + 1
            return dict(self.clocks[actor])

    def launch(self, stream: str) -> Clock:
        """Work for a stream comes after what its thread has done."""
        self.merge(stream, self.tick(self.thread()))
        return self.tick(stream)

    # Accesses

    def key(self, tensor: Tensor, fresh: bool = False) -> object:
        """Of a storage; `fresh`: its address may have been another's before."""
        address = tensor.untyped_storage()._cdata
        if fresh or address not in self.memory:
            self.memory[address] = object()
        return self.memory[address]

    def note(self, key: object, span: tuple[int, int], write: bool, actor: str) -> None:
        """An access by an actor whose clock has just ticked."""
        with self.lock:
            self.count += 1
            now, site = self.clocks[actor], where()
            kept, new = [], Access(*span, write, actor, now.get(actor, 0), site)
            for old in self.accesses[key]:
                ordered = old.actor == actor or now.get(old.actor, 0) >= old.time
                overlap = old.begin < new.end and new.begin < old.end
                if overlap and (old.write or write) and not ordered:
                    self.races.append((old, new))
                within = new.begin <= old.begin and old.end <= new.end
                if not (ordered and within and write):  # else whoever clashes with it does with new
                    kept.append(old)
            self.accesses[key] = [*kept, new]

    def of_host(self, key: object, span: tuple[int, int], write: bool) -> None:
        """An access by the thread that calls."""
        self.tick(self.thread())
        self.note(key, span, write, self.thread())

    def born(self, tensor: Tensor, stream: str) -> object:
        """New device memory, whose end is a write of its stream."""
        key = self.key(tensor, fresh=True)
        storage = tensor.untyped_storage()
        weakref.finalize(storage, self.died, key, storage.nbytes(), stream)
        return key

    def died(self, key: object, size: int, stream: str) -> None:
        with self.lock:
            self.launch(stream)
            self.note(key, (0, size), True, stream)
            self.accesses.pop(key)


def where() -> Site | None:
    """The line of the engines that is running."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(ENGINES):
        frame = frame.f_back
    return frame and (os.path.basename(frame.f_code.co_filename), frame.f_lineno)


def span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor may touch."""
    if tensor.numel() == 0:
        return 0, 0
    steps = ((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.storage_offset() + sum(steps) + 1
    return tensor.storage_offset() * tensor.element_size(), end * tensor.element_size()


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, list | tuple) else []


class Watch(TorchDispatchMode):
    """Notes what each operation of this thread reads and writes."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read, written = [], []
        for i, argument in enumerate(operation._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            (written if writes else read).extend(tensors_in(value))
        returns = [r.alias_info for r in operation._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        result = operation(*args, **kwargs)
        if is_view:
            return result
        known = {t.untyped_storage()._cdata for t in (*read, *written)}
        made = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in known]
        self._note(operation, read, written, made)
        return result

    def _note(self, operation, read: list, written: list, made: list) -> None:
        detector = self.detector
        with detector.lock:
            keys = [detector.key(t) for t in (*read, *written)]
            if keys and all(key in detector.on_host for key in keys):
                actor = detector.thread()
                detector.tick(actor)
            else:
                actor = detector.current_stream().name
                detector.launch(actor)
            for tensors, write in ((read, False), (written, True)):
                for tensor in tensors:
                    detector.note(detector.key(tensor), span(tensor), write, actor)
            for tensor in made:
                if actor.startswith("thread"):
                    detector.on_host.add(detector.key(tensor, fresh=True))
                else:
                    detector.note(detector.born(tensor, actor), span(tensor), True, actor)
            if operation is torch.ops.aten._local_scalar_dense.default:
                detector.merge(detector.thread(), detector.clocks[actor])


def watched(detector: Detector, monkeypatch) -> None:
    """Has engines made from now on run as on a GPU, under the detector."""

    class Task(Future):
        """Whoever has the result comes after the task."""

        ended: Clock = {}  # noqa: RUF012

        def result(self, timeout: float | None = None) -> object:
            try:
                return super().result(timeout)
            finally:
                detector.merge(detector.thread(), self.ended)

    class Pool(ThreadPoolExecutor):
        def submit(self, work: Callable, *args) -> Future:
            begun, delay = detector.tick(detector.thread()), detector.source.random()
            future = Task()
            self.__dict__.setdefault("futures", []).append(future)

            def run() -> None:
                if not future.set_running_or_notify_cancel():
                    return
                time.sleep(delay * detector.delays)
                detector.merge(detector.thread(), begun)
                try:
                    with Watch(detector):
                        result = work(*args)
                    future.ended = detector.tick(detector.thread())
                    future.set_result(result)
                except BaseException as error:
                    future.set_exception(error)

            super().submit(run)
            return future

        def shutdown(self, **how) -> None:
            super().shutdown(**how)
            for future in self.__dict__.get("futures", ()):
                detector.merge(detector.thread(), future.ended)

    class Queue(SimpleQueue):
        def put(self, item) -> None:
            super().put((item, detector.tick(detector.thread())))

        def get(self) -> object:
            item, clock = super().get()
            detector.merge(detector.thread(), clock)
            return item

    class Mutex:
        """Whoever takes it comes after whoever had it."""

        def __init__(self):
            self.lock, self.clock = threading.Lock(), {}

        def __enter__(self) -> None:
            self.lock.acquire()
            detector.merge(detector.thread(), self.clock)

        def __exit__(self, *error) -> None:
            self.clock = detector.tick(detector.thread())
            self.lock.release()

    make, resize, move = buffers.Array.__init__, torch.UntypedStorage.resize_, store.DiskStore._move
    unpin = buffers.Array.unpin

    def make_array(self, *args, **kwargs) -> None:
        make(self, *args, **kwargs)
        if self.memory is not None:
            detector.on_host.add(detector.key(self.tensor, fresh=True))

    def resized(self, size: int) -> None:
        key = detector.memory.get(self._cdata)
        if key is not None:
            detector.launch("compute")
            detector.note(key, (0, max(size, self.nbytes())), True, "compute")
        resize(self, size)

    def moved(self, call: Callable, chunk: store.Chunk, data: Tensor) -> None:
        detector.of_host(detector.key(data), span(data), write=call is os.preadv)
        begin, end = self.spans(chunk.layer)[chunk.index]
        first = chunk.kinds.start  # writes begin with the first kind that was read
        for kind in range(first, first + len(data)):
            file = (id(self), chunk.layer, kind)
            detector.of_host(file, (begin, end), write=call is os.pwritev)
        move(self, call, chunk, data)

    def released(self) -> None:
        detector.of_host(detector.key(self.tensor), (0, self.bytes), write=True)
        unpin(self)

    monkeypatch.setattr(torch, "get_device_module", lambda device: detector)
    monkeypatch.setattr(torch.UntypedStorage, "resize_", resized)
    monkeypatch.setattr(buffers.Array, "__init__", make_array)
    monkeypatch.setattr(buffers.Array, "unpin", released)
    monkeypatch.setattr(store.DiskStore, "_move", moved)
    monkeypatch.setattr(store, "SimpleQueue", Queue)
    monkeypatch.setattr(store, "Lock", Mutex)
    monkeypatch.setattr(threads, "ThreadPoolExecutor", Pool)
    for module in (buffers, streaming):
        monkeypatch.setattr(module, "is_separate", lambda device: True)
