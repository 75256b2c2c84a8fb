"""The group of processes that train together, started here or by a launcher such as torchrun.

`joined` gives a command its place in the group. Without a launcher (no RANK in the environment) and
with num_systems above 1 it starts the processes (launch.py) and is their parent.
"""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.console import UserError, explain, one_line
from configuration import Configuration
from ops import find_gpu
from runtime.launch import BY_USER, FAILED, LOST, PARENT, launch

# A process that does not answer for so long is lost: SHORT where all are at the same place, LONG
# where one may be reading or writing a checkpoint; within a step it is step_timeout. These are for
# lost machines; a lost process is noticed at once.
SHORT = timedelta(minutes=2)
LONG = timedelta(hours=1)
PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass
class Group:
    """The place of this process: rank of size, and how many are on this machine. An error in one
    process ends it, and the launcher, or the lost connection, the others."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    restarted: bool = False  # by a launcher, after a process was lost
    long: object = None  # process groups, by timeout
    short: object = None

    def gather(self, value: object) -> list:
        """Returns the values of all processes, by rank; each must call it."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.long)
        return values

    def barrier(self) -> None:
        """Waits until every process is here."""
        self.gather(None)

    def any(self, flag: bool) -> bool:
        """Returns whether it is so on any process; each must call it."""
        number = torch.tensor(int(flag))
        if self.size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.short)
        return bool(number)

    def on_first(self, function: Callable, *arguments: object) -> object:
        """Returns what the function returns on rank 0, to every process."""
        return self.gather(function(*arguments) if self.rank == 0 else None)[0]


def starts_processes(config: Configuration) -> bool:
    """Returns whether this process is to start those of the run, as no launcher did."""
    return _processes(config) > 1 and "RANK" not in os.environ


def _processes(config: Configuration) -> int:
    # a Cerebras cluster needs one process, whatever the number of its systems
    cerebras = config.backend == "CSX" or config.engine == "cerebras"
    return 1 if cerebras else config.num_systems


@contextmanager
def joined(config: Configuration, training: bool = True) -> Iterator[Group]:
    """Yields the group of this process; the parent of started processes exits with their status."""
    if starts_processes(config):
        sys.exit(launch(config, training))
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if size != _processes(config):
        if rank > 0:  # rank 0 reports it
            sys.exit(1)
        wrong = f"but the launcher started {size} processes (WORLD_SIZE)"
        remedy = f"have it start {_processes(config)}"
        raise UserError(f"num_systems: {config.num_systems}, {wrong}; {remedy}")
    if size == 1 and config.engine != "sharded":
        yield Group()
        return
    parent = os.environ.get(PARENT)
    if parent and sys.platform == "linux":  # end with the parent if it is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(1)
    if rank > 0:  # rank 0 alone prints
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        group = _connect(config, rank, size)
        _check_same_configuration(config, group)
        yield group
    except Exception as error:
        if size == 1:
            raise
        status = _report(error, rank)
        sys.stdout.flush()
        os._exit(status)  # threads that still wait for other processes would delay a usual exit
    with suppress(RuntimeError):
        dist.destroy_process_group()


def _connect(config: Configuration, rank: int, size: int) -> Group:
    environment = os.environ
    gpu = config.backend != "CPU" and find_gpu()[0]
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    store = None if "RANK" in environment else dist.HashStore()  # None: at MASTER_ADDR
    host = socket.gethostname()
    try:
        dist.init_process_group(backend, timeout=LONG, store=store, rank=rank, world_size=size)
        group = Group(rank, size)
        group.long = dist.new_group(backend="gloo", timeout=LONG)
        group.short = dist.new_group(backend="gloo", timeout=SHORT)
        here = group.gather(host).count(host)
    except (RuntimeError, ValueError) as error:
        address = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        wrong = f"no connection to the other processes at {address} (MASTER_ADDR and MASTER_PORT)"
        raise UserError(f"{wrong}: {str(error).splitlines()[0]}") from None
    group.local_size = int(environment.get("LOCAL_WORLD_SIZE", here))
    group.restarted = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return group


def _check_same_configuration(config: Configuration, group: Group) -> None:
    mine = asdict(config)
    first = group.gather(mine)[0]
    for key, value in mine.items():
        if value != first[key]:
            wrong = f"{key} is {value} on {socket.gethostname()}, and {first[key]} on rank 0"
            raise UserError(f"{wrong}: give every process the same configuration")


def _report(error: Exception, rank: int) -> int:
    """Prints an error of this process; returns the exit status. That of a lost connection follows
    from another process's error, which our parent reports if that process could not."""
    sys.stderr = sys.__stderr__
    where = f"rank {rank}: " if rank > 0 else ""
    started_here = os.environ.get(PARENT) == str(os.getppid())
    if _is_lost(error):
        status = LOST
        message = f"{where}the connection to another process was lost: {one_line(error)}"
    elif reason := explain(error):
        status = BY_USER
        message = where + reason
    else:
        sys.excepthook(type(error), error, error.__traceback__)
        status = FAILED
        message = f"rank {rank} failed"
    if status != LOST or not started_here:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return status if started_here else 1


def _is_lost(error: Exception) -> bool:
    """Returns whether it says that another process does not answer."""
    from_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return from_gloo or isinstance(error, dist.DistError)
