"""--profile START:STOP: a torch.profiler trace of some steps of a run."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from common.console import log, optional, warn
from common.files import replacing
from configuration import Configuration
from engines.base import StepStats


def profiled(
    steps: Iterator[StepStats], config: Configuration, start: int, rank: int
) -> Iterator[StepStats]:
    """Yields the steps that follow `start`. Those that `config.profile` names are traced, into one
    file of each process in out_dir, which https://ui.perfetto.dev and chrome://tracing show."""
    if config.profile is None:
        yield from steps
        return
    first, last = map(int, config.profile.split(":"))
    if first <= start:
        warn(f"profile: {config.profile} begins with a step that is done; nothing is traced")
        yield from steps
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    trace = profile(activities=activities)
    for step in range(start + 1, config.num_steps + 1):
        if step == first:
            trace.start()
        if (stats := next(steps, None)) is None:
            return
        if step == last:
            trace.stop()
            path = Path(config.out_dir) / f"trace_{first}-{last}_rank{rank}.json"
            with optional("the trace"):
                with replacing(path) as writing:
                    trace.export_chrome_trace(str(writing))
                log(f"wrote {path}")
        yield stats
