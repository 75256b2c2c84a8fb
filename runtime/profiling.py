"""--profile START:STOP: a torch.profiler trace of some steps of a run."""

from collections.abc import Iterator
from pathlib import Path

from torch.profiler import profile

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
    trace = profile()
    for step in range(start + 1, config.num_steps + 1):
        if step == first:
            trace.start()
        stats = next(steps)
        if step == last:
            trace.stop()
            path = Path(config.out_dir) / f"trace_{first}-{last}_rank{rank}.json"
            with optional("the trace"):
                with replacing(path) as writing:
                    trace.export_chrome_trace(str(writing))
                log(f"wrote {path}")
        yield stats
