"""Starts the processes of a run on this machine, with torch elastic, and is their parent."""

import logging
import os
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SignalException,
    start_processes,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import plan
from checkpoint import newest
from configuration import Configuration
from errors import UserError
from resume import check_out_dir, find_checkpoint, lacks_evaluation
from systems import PARENT, World


def launch(config: Configuration, training: bool) -> int:
    """Runs this command on num_systems processes, again from the newest checkpoint if one fails and
    max_restarts allow; returns the exit status."""
    gpus = torch.cuda.device_count() if config.backend != "CPU" else 0
    if config.num_systems > gpus and (gpus or config.backend == "GPU"):
        raise UserError(
            f"num_systems: {config.num_systems}, and this machine has {gpus} GPUs; take at most "
            f"so many, --backend CPU, or torchrun on several machines (docs/scale-out.md)"
        )
    if training:  # what is in out_dir when a restart looks for it must be of this run
        check_out_dir(Path(config.out_dir), find_checkpoint(config, World()))
        if not gpus and config.init_from is None:  # on a GPU a plan would take memory from it
            plan.resolve(config, {}, here=config.num_systems)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT"  # SIGHUP is nohup's
    try:
        return run(config, training)
    except SignalException:  # in the moment of starting
        raise KeyboardInterrupt from None


def run(config: Configuration, training: bool) -> int:
    """The processes, again and again."""
    for attempt in range(config.max_restarts + 1):
        more, latest = [], None
        if training and attempt:
            latest = find_checkpoint(replace(config, checkpoint_path="latest"), World())
        if latest is not None:
            if latest.step == config.num_steps and not lacks_evaluation(config, latest):
                return 0  # it was lost in its last breath
            more = ["--checkpoint_path", "latest"]
        failures = run_processes(config.num_systems, more)
        if not failures:
            return 0
        failure = min(failures, key=_blame)
        lost = _kind(failure) != "UserError"
        final = attempt == config.max_restarts or not lost
        saved = training and newest("latest", Path(config.out_dir)) is not None
        cure = "; --checkpoint_path latest goes on from the newest checkpoint"
        print(describe(failure) + (cure if lost and final and saved else ""), file=sys.stderr)
        if final:
            return 1
        print(f"restarting: {attempt + 1} of {config.max_restarts}", flush=True)
    raise AssertionError


def run_processes(count: int, more: list[str]) -> list[ProcessFailure]:
    """Runs the command `count` times with `more` arguments; returns what failed. Signals that ask
    for an end are passed on."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared = {
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
            args=dict.fromkeys(ranks, (*sys.argv, *more)),
            envs={r: {**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in ranks},
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        asked = False
        while True:
            try:
                failures = list(processes.wait(period=0.1).failures.values())
            except SignalException as caught:
                asked = True
                for pid in processes.pids().values():
                    with suppress(ProcessLookupError):
                        os.kill(pid, caught.sigval)
            else:
                if failures and asked and all(_was_asked(failure) for failure in failures):
                    raise KeyboardInterrupt  # a second signal ended them at once
                return failures


def _was_asked(failure: ProcessFailure) -> bool:
    return failure.exitcode in (130, -signal.SIGINT, -signal.SIGTERM)


def _kind(failure: ProcessFailure) -> str:
    """The type of the exception that a process left, if it left one."""
    message = failure.error_file_data["message"]
    return message["message"].split(":")[0] if isinstance(message, dict) else ""


def _blame(failure: ProcessFailure) -> tuple:
    """Sorts the cause before its consequences: who was killed, who had an error, who then lost the
    connection, who was told to end."""
    kind = _kind(failure)
    ended = failure.exitcode == -signal.SIGTERM
    return (ended, kind == "ConnectionError", failure.exitcode > 0 and not kind, failure.timestamp)


def describe(failure: ProcessFailure) -> str:
    """What the console is told of the process that failed first."""
    kind, rank = _kind(failure), failure.local_rank
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        memory = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"error: system {rank} was killed by {name}{memory}"
    if not kind:
        return f"error: system {rank} ended with status {failure.exitcode}"
    message = failure.error_file_data["message"]
    text = message["message"].removeprefix(f"{kind}: ")
    if kind in ("UserError", "ConnectionError"):
        return f"error: {text}"
    return f"{message['extraInfo']['py_callstack']}error: system {rank} failed"
