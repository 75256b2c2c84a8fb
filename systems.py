"""The systems that train together: a process each, started here or by a launcher that is there.

`joined` gives a command its place among them. Without a launcher (no RANK in the environment) and
with num_systems above 1 it starts the processes (launch.py) and is their parent.
"""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from configuration import Configuration
from errors import UserError, explain

# A system that does not answer for so long is lost: where all should be at the same place, and
# where one may be reading or writing a checkpoint; within a step it is `timeout` of the
# configuration. A lost process is noticed at once; this is for lost machines.
PROMPT, PATIENT = timedelta(minutes=2), timedelta(hours=1)
PARENT = "GIGAGPT_PARENT"  # in the environment of the processes that `launch` starts
PR_SET_PDEATHSIG = 1  # of prctl(2)


class SharedError(UserError):
    """An error that every system raises, whichever had it."""


@dataclass
class World:
    """The place of this process: rank of size, and how many are on this machine."""

    rank: int = 0
    size: int = 1
    here: int = 1
    patient: object = None  # the process group of what may take long,
    prompt: object = None  # and of what may not

    def gather(self, value: object) -> list:
        """The values of all systems, by rank; each must call it."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def agree(self, flag: bool) -> bool:
        """Whether it is so on any system; each must call it."""
        number = torch.tensor(int(flag))
        if self.size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.prompt)
        return bool(number)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises on every system what a user caused on any; each must enter it."""
        mine = None
        try:
            yield
        except Exception as error:
            if self.size == 1 or (mine := explain(error)) is None:
                raise
        told = self.gather(mine)
        for rank, message in enumerate(told):
            if message is not None:
                where = "" if told.count(message) == self.size else f"system {rank}: "
                raise SharedError(where + message)


@contextmanager
def joined(config: Configuration, training: bool = True) -> Iterator[World]:
    """The world of this process; the parent of started ones exits with their status instead."""
    launched = "RANK" in os.environ
    # of this program: the systems of a Cerebras cluster have one between them
    cerebras = config.backend == "CSX" or config.engine == "cerebras"
    processes = 1 if cerebras else config.num_systems
    if processes > 1 and not launched:
        from launch import launch

        sys.exit(launch(config, training))
    size = int(os.environ.get("WORLD_SIZE", 1)) if launched else 1
    rank = int(os.environ.get("RANK", 0))
    if size != processes:
        if rank > 0:  # the first tells it
            sys.exit(1)
        raise UserError(
            f"num_systems: {config.num_systems}, but the launcher started {size} processes "
            f"(WORLD_SIZE); have it start {processes}"
        )
    if size == 1 and config.engine != "sharded":
        yield World()
        return
    if os.environ.get(PARENT) and sys.platform == "linux":  # a parent that is killed takes us along
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(os.environ[PARENT]):
            sys.exit(1)
    if rank > 0:  # one voice
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        world = meet(config, rank, size)
        check_agreement(config, world)
        yield world
    except Exception as error:
        if size == 1:
            raise
        report(error, rank)
        sys.stdout.flush()
        os._exit(1)  # what still waits for the others would hold up a usual exit
    with suppress(RuntimeError):
        dist.destroy_process_group()


def meet(config: Configuration, rank: int, size: int) -> World:
    """Meets the other processes."""
    gpu = config.backend != "CPU" and torch.cuda.is_available()
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    host = socket.gethostname()
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            timeout=PATIENT,
            **(alone if "RANK" not in os.environ else {}),
        )
        patient, prompt = (dist.new_group(backend="gloo", timeout=t) for t in (PATIENT, PROMPT))
        world = World(rank, size, 1, patient, prompt)
        here = world.gather(host).count(host)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"could not meet the other systems at {place} (MASTER_ADDR and MASTER_PORT): {reason}"
        ) from None
    world.here = int(os.environ.get("LOCAL_WORLD_SIZE", here))
    return world


def check_agreement(config: Configuration, world: World) -> None:
    """Every system must have been given the same configuration."""
    mine, first = asdict(config), world.gather(asdict(config))[0]
    with world.together():
        for key, value in mine.items():
            if value != first[key]:
                raise UserError(
                    f"{key} is {value} on {socket.gethostname()}, and {first[key]} on system 0: "
                    f"give every system the same configuration"
                )


def report(error: Exception, rank: int) -> None:
    """Tells the error, or leaves that to the parent, who hears of all; what every system has is
    told by the first."""
    told_elsewhere = isinstance(error, SharedError) and rank > 0
    expected = is_lost(error) or explain(error) is not None
    if is_lost(error):
        reason = str(error).splitlines()[0]
        error = ConnectionError(f"system {rank} lost its connection to another one: {reason}")
    elif expected:
        where = "" if isinstance(error, SharedError) else f"system {rank}: "
        error = UserError(where + explain(error))
    started_here = os.environ.get(PARENT) == str(os.getppid())
    if os.environ.get("TORCHELASTIC_ERROR_FILE") and (started_here or not expected):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    if started_here or told_elsewhere:
        return
    sys.stderr = sys.__stderr__
    if not expected:
        sys.excepthook(type(error), error, error.__traceback__)
        error = f"system {rank} failed"
    print(f"error: {error}", file=sys.stderr, flush=True)


def is_lost(error: Exception) -> bool:
    """Whether it says that another system does not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )
