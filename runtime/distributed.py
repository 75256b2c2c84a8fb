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
from pathlib import Path

import torch
import torch.distributed as dist

from configuration import Configuration
from engines.base import find_gpu
from runtime.console import UserError, explain
from runtime.files import replacing
from runtime.launch import PARENT, RESTARTED, launch

# A process that does not answer for so long is lost: SHORT where all are at the same place, LONG
# where one may be reading or writing a checkpoint; within a step it is step_timeout. These are for
# lost machines; a lost process is noticed at once.
SHORT, LONG = timedelta(minutes=2), timedelta(hours=1)
PR_SET_PDEATHSIG = 1  # of prctl(2)


class SharedError(UserError):
    """An error that every process raises, whichever had it."""


@dataclass
class Group:
    """The place of this process: rank of size, and how many are on this machine.

    restarted: when the first attempt was started, in seconds since 1970, if this is a later one.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    restarted: float | None = None
    long: object = None  # process groups, by timeout
    short: object = None

    def gather(self, value: object) -> list:
        """The values of all processes, by rank; each must call it."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.long)
        return values

    def barrier(self) -> None:
        """Waits until every process is here."""
        self.gather(None)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process; each must call it."""
        number = torch.tensor(int(flag))
        if self.size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.short)
        return bool(number)

    def on_first(self, function: Callable, *arguments: object) -> object:
        """What the function returns on rank 0, for every process; its errors are shared."""
        value, message = None, None
        if self.rank == 0:
            try:
                value = function(*arguments)
            except Exception as error:
                if self.size == 1 or (message := explain(error)) is None:
                    raise
        value, message = self.gather((value, message))[0]
        if message is not None:
            raise SharedError(message)
        return value

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Raises an error that a user caused in one process in all of them; each must enter it."""
        mine = None
        try:
            yield
        except Exception as error:
            if self.size == 1 or (mine := explain(error)) is None:
                raise
        messages = self.gather(mine)
        for rank, message in enumerate(messages):
            if message is not None:
                where = "" if messages.count(message) == self.size else f"rank {rank}: "
                raise SharedError(where + message)


@contextmanager
def joined(config: Configuration, training: bool = True) -> Iterator[Group]:
    """The group of this process; the parent of started processes exits with their status."""
    launched = "RANK" in os.environ
    # a Cerebras cluster needs one process, whatever the number of its systems
    cerebras = config.backend == "CSX" or config.engine == "cerebras"
    processes = 1 if cerebras else config.num_systems
    if processes > 1 and not launched:
        sys.exit(launch(config, training))
    size = int(os.environ.get("WORLD_SIZE", 1)) if launched else 1
    rank = int(os.environ.get("RANK", 0))
    if size != processes:
        if rank > 0:  # rank 0 reports it
            sys.exit(1)
        raise UserError(
            f"num_systems: {config.num_systems}, but the launcher started {size} processes "
            f"(WORLD_SIZE); have it start {processes}"
        )
    if size == 1 and config.engine != "sharded":
        yield Group()
        return
    if os.environ.get(PARENT) and sys.platform == "linux":  # end with the parent if it is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(os.environ[PARENT]):
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
        _report(error, rank)
        sys.stdout.flush()
        os._exit(1)  # threads that still wait for other processes would delay a usual exit
    with suppress(RuntimeError):
        dist.destroy_process_group()


def _connect(config: Configuration, rank: int, size: int) -> Group:
    gpu = config.backend != "CPU" and find_gpu()[0]
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            timeout=LONG,
            **(alone if "RANK" not in os.environ else {}),
        )
        long, short = (dist.new_group(backend="gloo", timeout=t) for t in (LONG, SHORT))
        restarted = float(os.environ[RESTARTED]) if RESTARTED in os.environ else None
        group = Group(rank, size, 1, restarted, long, short)
        host = socket.gethostname()
        here = group.gather(host).count(host)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no connection to the other processes at {address} (MASTER_ADDR and MASTER_PORT): "
            f"{reason}"
        ) from None
    group.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", here))
    return group


def _check_same_configuration(config: Configuration, group: Group) -> None:
    mine, first = asdict(config), group.gather(asdict(config))[0]
    with group.shared_errors():
        for key, value in mine.items():
            if value != first[key]:
                raise UserError(
                    f"{key} is {value} on {socket.gethostname()}, and {first[key]} on rank 0: give "
                    f"every process the same configuration"
                )


def _report(error: Exception, rank: int) -> None:
    """Prints the error, or leaves it to the parent, who hears from all; rank 0 prints what all
    have."""
    printed_by_first = isinstance(error, SharedError) and rank > 0
    expected = _is_lost(error) or explain(error) is not None
    if _is_lost(error):
        reason = str(error).splitlines()[0]
        error = ConnectionError(f"rank {rank} lost its connection to another one: {reason}")
    elif expected:
        where = "" if isinstance(error, SharedError) else f"rank {rank}: "
        error = UserError(where + explain(error))
    started_here = os.environ.get(PARENT) == str(os.getppid())
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and (started_here or not expected):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        # at once complete: the parent may read it, and end this process, at any moment
        with replacing(Path(path)) as writing:
            os.environ["TORCHELASTIC_ERROR_FILE"] = str(writing)
            get_error_handler().record_exception(error)
    if started_here or printed_by_first:
        return
    sys.stderr = sys.__stderr__
    if not expected:
        sys.excepthook(type(error), error, error.__traceback__)
        error = f"rank {rank} failed"
    print(f"error: {error}", file=sys.stderr, flush=True)


def _is_lost(error: Exception) -> bool:
    """Whether it says that another process does not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )
