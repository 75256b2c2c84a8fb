"""Threads that work beside the one that computes."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def start_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Start threads of which each runs its operations on one core. With OpenMP teams of their own
    there would be more threads than cores, and OpenMP's threads then sleep at each barrier: a tenth
    of a step on a CPU, and on a GPU's host checksums that wait for each other."""
    before, all_started = torch.get_num_threads(), Barrier(count)
    threads = ThreadPoolExecutor(count, name, _run_alone)
    list(threads.map(lambda _: all_started.wait(), range(count)))
    torch.set_num_threads(before)  # for threads that are started later
    return threads


def _run_alone() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # has this thread take the number now, not at its first operation
