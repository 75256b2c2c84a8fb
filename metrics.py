"""What a run tells: a line a step, metrics.jsonl, TensorBoard events and loss.png."""

import json
import math
import resource
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from engines import StepStats
from errors import explain
from files import count_of, replacing

OF_A_STEP = ("step", "loss", "learning_rate", "grad_norm", "seconds")  # what is kept of its stats


def say(message: str) -> None:
    """One line on the console, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def watch(
    items: Iterable, what: str = "evaluating", unit: str = "batch", total: int | None = None
) -> Iterable:
    """Shows the progress of long work on stderr: a bar on a terminal, a line a minute in a log."""
    if sys.stderr.isatty():
        return tqdm(items, what, total, unit=unit, leave=False, dynamic_ncols=True)
    form = "{desc}: {percentage:.0f}% | {rate_fmt} | {remaining} left\n"
    return tqdm(items, what, total, unit=unit, mininterval=60, delay=60, bar_format=form)


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """An error in it is told, and training goes on."""
    try:
        yield
    except Exception as error:
        if (reason := explain(error)) is None:  # a bug, which somebody will want to see
            traceback.print_exc()
            reason = type(error).__name__
        say(f"note: {what} failed ({reason}); training goes on")


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


class Silence:
    """The metrics of a system that leaves them to the first."""

    timed = nullcontext

    def log(self, stats: StepStats, tokens: int, places: list[int]) -> None: ...
    def log_evaluation(self, step: int, val_loss: float) -> None: ...
    def progress(self, fraction: float) -> None: ...
    def draw(self) -> None: ...
    def close(self) -> None: ...


@dataclass
class Metrics:
    """Records the steps of one run after `start`; records beyond `start` in the folder are dropped.

    eval_seconds and save_seconds are forecasts until one was `timed`; nan counts as nothing.
    """

    out_dir: Path
    start: int
    stop: int
    flops_per_token: int
    peak_flops: float  # FLOP/s; with flops_per_token the model FLOPs utilisation, MFU
    eval_seconds: float
    save_seconds: float
    eval_steps: int
    checkpoint_steps: int

    def __post_init__(self):
        self.done, start, stop = self.start, self.start, self.stop
        self.path = self.out_dir / "metrics.jsonl"
        found = list(_read_lines(self.path))
        with replacing(self.path) as kept, open(kept, "w") as file:
            file.writelines(_line(r) for r in found if r and r["step"] <= start)
        if damaged := found.count(None):
            say(f"note: {self.path}: {damaged} damaged lines were left out")
        self.file, self.unwritten = open(self.path, "ab", buffering=0), b""  # noqa: SIM115
        self.events = None
        with harmless("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(f"{self.out_dir}/tensorboard", purge_step=start + 1)
        # None: a bar on a terminal alone; a log has its lines
        self.bar = tqdm(total=stop, initial=start, unit="step", disable=None, dynamic_ncols=True)
        self.began = self.told = time.monotonic()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Around an evaluation or a save: what it takes is `name`, eval_seconds or save_seconds,
        from then on, unless it fails."""
        began = time.monotonic()
        yield
        setattr(self, name, time.monotonic() - began)
        self.began += time.monotonic() - began  # the pace is that of the steps alone

    def log(self, stats: StepStats, tokens: int, places: list[int]) -> None:
        """A finished step, with which the run has seen `tokens`; `places` is where the sequences of
        its batch begin in train.bin."""
        rate = stats.tokens / stats.seconds
        mfu = rate * self.flops_per_token / self.peak_flops
        values = {name: getattr(stats, name) for name in OF_A_STEP}
        values |= {"tokens": tokens, "tokens_per_second": rate, "mfu": mfu, "memory": memory_used()}
        self._record(**values, **({} if stats.counted else {"sequences": places}))
        self.done = stats.step
        say(
            f"step {stats.step}/{self.stop} | loss {stats.loss:.4f} | lr {stats.learning_rate:.3e} "
            f"| norm {stats.grad_norm:.3f} | {rate:,.0f} tokens/s | "
            + ("" if math.isnan(mfu) else f"MFU {mfu:.1%} | ")
            + f"{memory_used() / 1e9:.2f} GB | {self._left(0)} left"
            + ("" if stats.counted else f" | {self._skipped(stats, places)}")
        )
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update(1)
        self.told = time.monotonic()

    def _skipped(self, stats: StepStats, places: list[int]) -> str:
        shown = ", ".join(f"{place}" for place in places[:4])
        more = f" and {len(places) - 4} more (metrics.jsonl)" if len(places) > 4 else ""
        return (
            f"{'a spike' if stats.finite else 'not finite'}: this step changed nothing; its "
            f"sequences begin at tokens {shown}{more} of train.bin"
        )

    def progress(self, fraction: float) -> None:
        """The part of the current step that is done: on the bar, or in a line a minute."""
        if time.monotonic() - self.told < (60 if self.bar.disable else 1):
            return
        self.told = time.monotonic()
        self.bar.set_postfix_str(f"{fraction:.0%} of step {self.done + 1}")
        if self.bar.disable:
            say(f"step {self.done + 1}/{self.stop} | {fraction:.0%} | {self._left(fraction)} left")

    def _left(self, fraction: float) -> str:
        """The time to the end at the pace so far; `fraction` of the current step is done. With 0 a
        step has just ended, so that its evaluation and its save are still to come."""
        done = self.done - self.start + fraction
        left = (time.monotonic() - self.began) / done * (self.stop - self.start - done)
        before = self.done if fraction else self.done - 1
        evaluations = math.ceil(self.stop / self.eval_steps) - before // self.eval_steps
        saves = math.ceil(self.stop / self.checkpoint_steps) - before // self.checkpoint_steps
        left += evaluations * max(0, self.eval_seconds) + saves * max(0, self.save_seconds)
        return format_time(left)

    def log_evaluation(self, step: int, val_loss: float) -> None:
        """An evaluation after `step`, and the picture up to here."""
        self._record(step=step, val_loss=val_loss)
        say(
            f"step {step}/{self.stop} | val_loss {val_loss:.4f} "
            f"| perplexity {perplexity(val_loss):.2f}"
        )
        self.draw()

    def _record(self, step: int, **values: float | list[int]) -> None:
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        if self.events is not None:
            events, self.events = self.events, None  # once it has failed it is left alone
            with harmless("TensorBoard"):
                for name, value in numbers.items():
                    events.add_scalar(name, value, step)
                self.events = events
        finite = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        self.unwritten += _line({"step": step, **values, **finite}).encode()
        self._write()

    def _write(self) -> None:
        """Writes what there is; what can't be written is kept, and tried again with the next."""
        before = len(self.unwritten.splitlines())
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if before == 1:
                reason = f"{self.path} can't be written ({error.strerror})"
                say(f"note: {reason}; its lines are kept and tried again")

    def draw(self) -> None:
        """Writes loss.png, of everything in metrics.jsonl."""
        with harmless("the picture"):
            self._draw()

    def _draw(self) -> None:
        from matplotlib.figure import Figure

        axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
        records = list(read_records(self.path))
        for key, style in (("loss", {"linewidth": 0.8}), ("val_loss", {"marker": "o"})):
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, **style)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.set_title(str(self.out_dir), parse_math=False)  # $ is an ordinary character there
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        with replacing(self.out_dir / "loss.png") as drawing:
            figure.savefig(drawing, format="png", dpi=120)

    def close(self) -> None:
        self.bar.close()
        self._write()
        self.file.close()
        if self.events is not None:
            with harmless("TensorBoard"):
                self.events.close()


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def read_records(path: Path) -> Iterator[dict]:
    """The records of a metrics.jsonl; lines that are damaged or cut off are left out."""
    return filter(None, _read_lines(path))


def _read_lines(path: Path) -> Iterator[dict | None]:
    """The record of each line, None for a damaged one; a last line that was cut off is left out."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        record = None
        with suppress(ValueError, TypeError, LookupError, OverflowError, RecursionError):
            values = json.loads(line)
            count_of(values["step"])
            losses = [values[key] for key in ("loss", "val_loss") if values.get(key) is not None]
            record = values if all(map(math.isfinite, losses)) else None
        if record or line.endswith(b"\n"):
            yield record


def memory_used() -> int:
    """Peak bytes so far: allocated on the GPU if it is in use, else resident in this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_time(seconds: float) -> str:
    """3725 -> '1:02:05', with days in front where there are any."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock
