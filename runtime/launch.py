"""Starts the processes of a run on this machine, with torch elastic, and is their parent."""

import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

from common.console import UserError
from configuration import Configuration
from weights.checkpoint import find_checkpoints

PARENT = "GIGAGPT_PARENT"  # in the environment of the processes: our process id
END = signal.SIGUSR1  # what ends those that a lost process leaves: SIGTERM would ask them to save
# Exit statuses of a process
BY_USER = 1  # an error that a user can cause, which it printed
FAILED = 2  # another error, which it printed
LOST = 3  # it lost its connection to another process


def launch(config: Configuration, training: bool) -> int:
    """Runs this command in num_systems processes, again if one is lost and max_restarts allows;
    returns the exit status. A restarted process resumes from what the run has saved."""
    from torch.distributed.elastic import multiprocessing as elastic  # slow to import

    gpus = torch.cuda.device_count() if config.backend != "CPU" else 0
    if config.num_systems > gpus and (gpus or config.backend == "GPU"):
        wrong = f"num_systems: {config.num_systems}, and this machine has {gpus} GPUs"
        others = "--backend CPU, or torchrun on several machines (docs/scale-out.md)"
        raise UserError(f"{wrong}; use no more than that, {others}")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT"  # SIGHUP is nohup's
    arguments = sys.argv
    began = time.time()
    for attempt in count():
        try:
            failures = _run_processes(config.num_systems, arguments, attempt)
        except elastic.SignalException:  # while they were being started
            raise KeyboardInterrupt from None
        if not failures:
            return 0
        by_user = any(failure.exitcode == BY_USER for failure in failures)
        final = by_user or attempt == config.max_restarts
        saved = find_checkpoints(Path(config.out_dir)) if training else {}
        if message := _describe(failures):
            hint = "; resume with --checkpoint_path latest" if saved and final else ""
            print(message + hint, file=sys.stderr)
        if final:
            return 1
        print(f"restarting: {attempt + 1} of {config.max_restarts}", flush=True)
        if saved and saved[max(saved)].stat().st_mtime >= began:  # by this run
            arguments = [*sys.argv, "--checkpoint_path", "latest"]


def _run_processes(size: int, arguments: list[str], attempt: int) -> list:
    """Runs the command in `size` processes; returns the ProcessFailures. Passes on signals that ask
    for an end."""
    from torch.distributed.elastic import multiprocessing as elastic

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": attempt,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores // size)),
        PARENT: os.getpid(),
    }
    if sys.platform == "linux":  # not the address of the host's name, which may have none
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    shared = {key: str(value) for key, value in shared.items()}
    ranks = range(size)
    with tempfile.TemporaryDirectory() as folder:
        processes = elastic.start_processes(
            "train",
            sys.executable,
            args=dict.fromkeys(ranks, tuple(arguments)),
            envs={rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
            logs_specs=elastic.DefaultLogsSpecs(log_dir=folder),
        )
        processes.close = partial(processes.close, END)
        signalled = False
        while True:
            try:
                failures = list(processes.wait(period=0.1).failures.values())
                if failures and signalled:  # a second signal ends them at once
                    raise KeyboardInterrupt
                return failures
            except elastic.SignalException as caught:
                signalled = True
                for pid in processes.pids().values():
                    with suppress(ProcessLookupError):
                        os.kill(pid, caught.sigval)


def _describe(failures: list) -> str | None:
    """Returns the message for the process that failed first, unless one has printed its own."""
    failures = [failure for failure in failures if failure.exitcode != -END]
    for failure in sorted(failures, key=lambda failure: failure.timestamp):
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            memory = "; the system may have run out of memory" if name == "SIGKILL" else ""
            return f"error: rank {failure.local_rank} was killed by {name}{memory}"
    if all(failure.exitcode == LOST for failure in failures):
        return f"error: rank {failures[0].local_rank} lost its connection to another one"
    return None
