"""Starts the processes of a run on this machine, with torch elastic, and is their parent."""

import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as dist

from configuration import Configuration
from runtime.console import UserError

# In the environment of the processes: our process id, and in a later attempt when the first began
PARENT, RESTARTED = "GIGAGPT_PARENT", "GIGAGPT_RESTARTED"
END = signal.SIGUSR1  # what ends those that a lost process leaves: SIGTERM would ask them to save


def launch(config: Configuration, training: bool) -> int:
    """Runs this command in num_systems processes, again if one is lost and max_restarts allows;
    returns the exit status. A restarted process resumes by itself."""
    from torch.distributed.elastic.multiprocessing import SignalException  # slow to import

    gpus = torch.cuda.device_count() if config.backend != "CPU" else 0
    if config.num_systems > gpus and (gpus or config.backend == "GPU"):
        raise UserError(
            f"num_systems: {config.num_systems}, and this machine has {gpus} GPUs; use no more "
            f"than that, --backend CPU, or torchrun on several machines (docs/scale-out.md)"
        )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT"  # SIGHUP is nohup's
    try:
        return _run_attempts(config.num_systems, config.max_restarts, training)
    except SignalException:  # while they were being started
        raise KeyboardInterrupt from None


def _run_attempts(processes: int, restarts: int, training: bool) -> int:
    began = time.time()
    for attempt in range(restarts + 1):
        failures = _run_processes(processes, {RESTARTED: began} if attempt else {})
        if not failures:
            return 0
        failure = min(failures, key=_blame)
        lost = _kind(failure) != "UserError"
        final = not lost or attempt == restarts
        hint = "; resume with --checkpoint_path latest" if training and lost and final else ""
        print(_describe(failure) + hint, file=sys.stderr)
        if final:
            break
        print(f"restarting: {attempt + 1} of {restarts}", flush=True)
    return 1


def _run_processes(count: int, environment: dict) -> list:
    """Runs the command `count` times; returns the ProcessFailures. Passes on signals that ask for
    an end."""
    from torch.distributed.elastic.multiprocessing import (
        DefaultLogsSpecs,
        SignalException,
        start_processes,
    )

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared = environment | {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores // count)),
        PARENT: os.getpid(),
    }
    if sys.platform == "linux":  # not the address of the host's name, which may have none
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    shared = {key: str(value) for key, value in shared.items()}
    ranks = range(count)
    with tempfile.TemporaryDirectory() as folder:
        processes = start_processes(
            "train",
            sys.executable,
            args=dict.fromkeys(ranks, tuple(sys.argv)),
            envs={r: {**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in ranks},
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        processes.close = partial(processes.close, END)
        signalled = False
        while True:
            try:
                failures = list(processes.wait(period=0.1).failures.values())
            except SignalException as caught:
                signalled = True
                for pid in processes.pids().values():
                    with suppress(ProcessLookupError):
                        os.kill(pid, caught.sigval)
            else:
                if failures and signalled and all(map(_was_interrupted, failures)):
                    raise KeyboardInterrupt  # a second signal ended them at once
                return failures


def _was_interrupted(failure) -> bool:
    return failure.exitcode in (130, -signal.SIGINT, -signal.SIGTERM, -END)


def _kind(failure) -> str:
    """The type of the exception that a process left, if it left one."""
    message = failure.error_file_data["message"]
    return message["message"].split(":")[0] if isinstance(message, dict) else ""


def _blame(failure) -> tuple:
    """Sorts the cause before its consequences: who was killed, who had an error, who then lost the
    connection, who was told to end."""
    kind = _kind(failure)
    ended = failure.exitcode == -END
    return (ended, kind == "ConnectionError", failure.exitcode > 0 and not kind, failure.timestamp)


def _describe(failure) -> str:
    """The message for the process that failed first."""
    kind, rank = _kind(failure), failure.local_rank
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        memory = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"error: rank {rank} was killed by {name}{memory}"
    if not kind:
        return f"error: rank {rank} ended with status {failure.exitcode}"
    message = failure.error_file_data["message"]
    text = message["message"].removeprefix(f"{kind}: ")
    if kind in ("UserError", "ConnectionError"):
        return f"error: {text}"
    return f"{message['extraInfo']['py_callstack']}error: rank {rank} failed"
