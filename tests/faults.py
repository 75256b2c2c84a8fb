"""Commands with a fault in them: each runs in a fork of a process that has everything imported,
with hooks between the program and the operating system.

A hooked call is a point. Points are applied, and at the one that was asked for the fault comes:
    kill     the process is killed, before the call, or in the middle of a write
    full     the call fails for want of space, or a write breaks off in the middle
    unread   a read fails
    short    every read gives half of what was asked for
    stop     SIGTERM arrives, and the call goes on
    pause    the process stops where it is, until it gets a SIGCONT
"""

import builtins
import errno
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
import torch.utils.tensorboard

import engines.base
import engines.resident
import engines.sharded
import engines.streaming
import eval
import train
from common.console import command
from model import GPT
from weights import checkpoint

COMMANDS = {"train": train.main, "eval": eval.main}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGTERM, "pause": signal.SIGSTOP}
IMPORTED_LATE = [
    *("engines.resident", "engines.streaming", "engines.sharded", "torch.utils.tensorboard"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "torch._dynamo"),
    *("weights.huggingface", "transformers.tokenization_utils_tokenizers"),
]


@dataclass
class Fault:
    """What goes wrong in a run. Without a `kind` the points are only applied.

    at: number of the point, from 1; 0: of none
    where: what the path of a file must match for a call to be a point
    """

    kind: str = ""
    at: int = 0
    where: str = "."
    reads: bool = False  # the points are reads, not writes
    clock: int = 0  # a seed: of jumps of the wall clock
    spoiled: dict = field(default_factory=dict)  # step -> (what: activation or gradient, factor)
    file_limit: int = 0  # bytes in a file


class Hooks:
    """Counts points and strikes."""

    def __init__(self, fault: Fault):
        self.fault, self.points, self.lock = fault, 0, threading.Lock()

    def strike(self, path: object, half: Callable[[], object] = lambda: None) -> bool:
        """A point. `half` does half of the work; returns whether a read is to be short."""
        if not re.search(self.fault.where, str(path)):
            return False
        with self.lock:  # of the threads of a store each point is another
            self.points += 1
            struck = self.points == self.fault.at
        if self.fault.kind == "short":
            return True
        if not struck:
            return False
        if self.fault.kind in ("kill", "full"):
            half()
        if self.fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.fault.kind])
        if self.fault.kind in ("full", "unread"):
            number = errno.ENOSPC if self.fault.kind == "full" else errno.EIO
            raise OSError(number, os.strerror(number))
        return False

    def install(self) -> None:
        if self.fault.reads:
            self._install_reads()
        else:
            self._install_writes()

    def _install_writes(self) -> None:
        for name in ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "link", "symlink"):
            self._hook_call(os, name, lambda path, *more: path)
        for name in ("fsync", "ftruncate", "posix_fallocate", "pwritev"):
            self._hook_call(os, name, lambda file, *more: name_of(file))
        for module in (builtins, io):
            module.open = self._opener(module.open)
        real = safetensors.torch.save_file

        def save_file(tensors: dict, path: Path, **more: object) -> None:
            self.strike(path)
            real(tensors, path, **more)
            size = os.path.getsize(path)
            try:
                self.strike(path, lambda: os.truncate(path, size // 2))
            except OSError as error:
                raise safetensors.SafetensorError(f"I/O error: {error.strerror}") from None

        checkpoint.save_file = save_file

    def _hook_call(self, module: object, name: str, path_of: Callable) -> None:
        real = getattr(module, name)

        def hooked(*arguments: object, **more: object) -> object:
            self.strike(path_of(*arguments))
            return real(*arguments, **more)

        setattr(module, name, hooked)

    def _opener(self, real: Callable) -> Callable:
        def hooked(file: object, mode: str = "r", *more: object, **keys: object) -> object:
            writes = set(mode) & set("wax+") and not isinstance(file, int)
            if not writes or not re.search(self.fault.where, str(file)):
                return real(file, mode, *more, **keys)
            self.strike(file)
            return Writing(real(file, mode, *more, **keys), self)

        return hooked

    def _install_reads(self) -> None:
        pread, preadv, digest = os.pread, os.preadv, checkpoint.hashlib.file_digest

        def short_pread(file: int, size: int, place: int) -> bytes:
            return pread(file, max(1, size // 2) if self.strike(name_of(file)) else size, place)

        def short_preadv(file: int, buffers: list, place: int) -> int:
            if self.strike(name_of(file)):
                buffers = [memoryview(buffers[0])[: max(4096, len(buffers[0]) // 8192 * 4096)]]
            return preadv(file, buffers, place)

        def file_digest(file: object, kind: str) -> object:
            self.strike(file.name)
            return digest(file, kind)

        os.pread, os.preadv, checkpoint.hashlib.file_digest = short_pread, short_preadv, file_digest


class Writing:
    """A file that is written, each write with a point before it and one in its middle."""

    def __init__(self, file: object, hooks: Hooks):
        self.file, self.hooks = file, hooks

    def write(self, data: object) -> int:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.hooks.strike(self.file.name)
        try:
            self.hooks.strike(self.file.name, half)
        except OSError:
            if not isinstance(self.file, io.RawIOBase):
                raise
            # the system tells how much it wrote, and fails the next call
            self.hooks.fault.at = self.hooks.points + 1
            return len(data) // 2
        return self.file.write(data)

    def writelines(self, lines: object) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def name_of(file: object) -> str:
    number = file if isinstance(file, int) else file.fileno()
    return os.readlink(f"/proc/self/fd/{number}")


def jump(seed: int) -> None:
    """Has the wall clock go back and forth by years."""
    real, source = time.time, random.Random(seed)
    time.time = lambda: real() + source.uniform(-1e8, 1e8)
    time.time_ns = lambda: int(time.time() * 1e9)


def spoil(spoiled: dict) -> None:
    """Multiplies what leaves block 1, or its gradient, by a factor, in some steps (from 1)."""
    current, rate, build = 0, engines.base.learning_rate, GPT.__init__

    def learning_rate(config: object, step: int) -> float:
        nonlocal current
        current = step
        return rate(config, step)

    def hook(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        what, factor = spoiled.get(current, ("", 1.0))
        if not module.training or not what:
            return None
        if what == "activation":
            return output * factor
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)
        return None

    def __init__(self: GPT, *arguments: object) -> None:
        build(self, *arguments)
        if len(self.decoder) > 1:  # else the planner measures a block
            self.decoder[1].register_forward_hook(hook)

    engines.base.learning_rate, GPT.__init__ = learning_rate, __init__


def run(arguments: list, fault: Fault, environment: dict, out: str, err: str, told: object) -> None:
    """What a fork does: the command, its output in files; `told` is sent the number of points."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ.update(environment)
    name, *rest = arguments
    sys.argv = [f"{name}.py", *rest]
    if fault.clock:
        jump(fault.clock)
    spoil(fault.spoiled)
    if fault.file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_limit, fault.file_limit))
    hooks = Hooks(fault)
    hooks.install()
    try:
        command(COMMANDS[name])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        told.send(hooks.points)


class Forks:
    """Starts commands in forks."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.numbers, self.lock = folder, itertools.count(), threading.Lock()
        paths = [str(root), str(root / "tests")]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for the process that forks
        os.environ["OMP_NUM_THREADS"] = "1"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["faults", *IMPORTED_LATE])

    def start(self, *arguments: object, fault: Fault | None = None, **environment: str):
        """A command with a fault, such as "train" and its arguments; `end` waits for it."""
        number = next(self.numbers)
        out, err = (str(self.folder / f"{number}.{kind}") for kind in ("out", "err"))
        for file in (out, err):  # it may be killed before it opens them
            Path(file).touch()
        ours, theirs = self.context.Pipe(duplex=False)
        job = (list(map(str, arguments)), fault or Fault(), environment, out, err, theirs)
        process = self.context.Process(target=run, args=job)
        with self.lock:
            process.start()
        theirs.close()
        process.files, process.told = (out, err), ours
        return process

    def end(self, process: object, timeout: float = 600) -> SimpleNamespace:
        """Its status (negative: the signal that killed it), output and points; NaN if it was
        killed."""
        if not wait([process.sentinel], timeout):
            process.kill()
            raise AssertionError(f"it hangs: {process.files}")
        with self.lock:  # several threads can't ask for it
            process.join()
        out, err = (Path(path).read_text() for path in process.files)
        points = math.nan
        if process.told.poll():
            with suppress(EOFError):  # it was killed
                points = process.told.recv()
        return SimpleNamespace(status=process.exitcode, out=out, err=err, points=points)

    def await_pause(self, process: object, timeout: float = 600) -> None:
        """Waits until the process has stopped at its point."""
        deadline = time.monotonic() + timeout
        while ") T " not in Path(f"/proc/{process.pid}/stat").read_text():
            if not process.is_alive() or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"it does not stop: {process.files}")
            time.sleep(0.01)
