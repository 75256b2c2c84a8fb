"""The metrics of a run: a line a step, metrics.jsonl, a tracker and loss.png."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from engines.base import StepStats
from planner.costs import Plan, flops_per_token, headline
from planner.machine import peak_resident
from runtime.console import log, optional, warn
from runtime.files import count_of, replacing
from runtime.tracking import Tracker

OF_A_STEP = ("step", "loss", "learning_rate", "grad_norm", "seconds", "tokens")


class Metrics:
    """Records the steps of a run from step `start`; later records in the folder are dropped. If not
    enabled, as on every rank but the first, nothing is recorded. The plan has forecasts of the time
    of evaluations and saves, which measured times replace, and what model FLOPs utilization (MFU)
    is computed from."""

    def __init__(self, plan: Plan, start: int, processes: int = 1, enabled: bool = True):
        config = self.config = plan.config
        self.start, self.stop, self.done = start, config.num_steps, start
        self.flops_per_token = flops_per_token(config)
        self.peak_flops = plan.machine.matmul * processes
        self.seconds = {"evaluation": plan.eval_seconds, "save": plan.save_seconds}
        self.out_dir, self.enabled = Path(config.out_dir), enabled
        self.path = self.out_dir / "metrics.jsonl"
        if not enabled:
            return
        found = list(_read_lines(self.path))
        with replacing(self.path) as kept, open(kept, "w") as file:
            file.writelines(_line(r) for r in found if r and r["step"] <= start)
        if damaged := found.count(None):
            warn(f"{self.path}: {damaged} damaged lines were dropped")
        self.file, self.unwritten = open(self.path, "ab", buffering=0), b""  # noqa: SIM115
        self.tracker = Tracker(config, start)
        # None: a bar on a terminal only; a log has its lines
        bar = {"unit": "step", "disable": None, "dynamic_ncols": True}
        self.bar = tqdm(total=self.stop, initial=start, **bar)
        self.began = self.shown = time.monotonic()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measures an "evaluation" or a "save"; one that fails is not counted."""
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        if self.enabled:
            self.began += self.seconds[name]  # the pace is that of the steps alone

    def log_step(self, stats: StepStats) -> None:
        if not self.enabled:
            return
        rate = self.config.batch_size * self.config.sequence_length / stats.seconds
        mfu = rate * self.flops_per_token / self.peak_flops
        values = {name: getattr(stats, name) for name in OF_A_STEP}
        values |= {"tokens_per_second": rate, "mfu": mfu, "memory": memory_used()}
        self._record(**values, **({} if stats.applied else {"sequences": stats.offsets}))
        self.done = stats.step
        log(
            f"step {stats.step}/{self.stop} | loss {stats.loss:.4f} | lr {stats.learning_rate:.3e} "
            f"| grad_norm {stats.grad_norm:.3f} | {rate:,.0f} tokens/s | "
            + ("" if math.isnan(mfu) else f"MFU {mfu:.1%} | ")
            + f"peak {memory_used() / 1e9:.2f} GB | ETA {self._left(0)}"
            + ("" if stats.applied else f" | {_skipped(stats)}")
        )
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update(1)
        self.shown = time.monotonic()

    def progress(self, fraction: float) -> None:
        """Shows the part of the current step that is done: on the bar, or in a line a minute."""
        if not self.enabled or time.monotonic() - self.shown < (60 if self.bar.disable else 1):
            return
        self.shown = time.monotonic()
        self.bar.set_postfix_str(f"{fraction:.0%} of step {self.done + 1}")
        if self.bar.disable:
            log(f"step {self.done + 1}/{self.stop} | {fraction:.0%} | ETA {self._left(fraction)}")

    def _left(self, fraction: float) -> str:
        """The time to the end at the pace so far; `fraction` of the current step is done. With 0 a
        step has just ended, and its evaluation and its save are still to come."""
        done, config = self.done - self.start + fraction, self.config
        left = (time.monotonic() - self.began) / done * (self.stop - self.start - done)
        before = self.done if fraction else self.done - 1
        for name, every in (("evaluation", config.eval_steps), ("save", config.checkpoint_steps)):
            times = math.ceil(self.stop / every) - before // every
            left += times * max(0, self.seconds[name])
        return format_time(left)

    def log_evaluation(self, step: int, val_loss: float) -> None:
        """Records an evaluation after `step`, and draws loss.png."""
        if not self.enabled:
            return
        self._record(step=step, val_loss=val_loss)
        log(
            f"step {step}/{self.stop} | val_loss {val_loss:.4f} "
            f"| perplexity {perplexity(val_loss):.2f}"
        )
        self.draw()

    def log_samples(self, step: int, samples: list[str]) -> None:
        """Records texts that the model wrote after `step`."""
        if not self.enabled or not samples:
            return
        self._write_line({"step": step, "samples": samples})
        self.tracker.log_samples(step, samples)
        for sample in samples:
            log(f"step {step}/{self.stop} | sample | {sample}")

    def _record(self, step: int, **values: float | list[int]) -> None:
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        self.tracker.log(step, numbers)
        finite = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        self._write_line({"step": step, **values, **finite})

    def _write_line(self, record: dict) -> None:
        self.unwritten += _line(record).encode()
        self._write()

    def _write(self) -> None:
        """Writes the pending lines; what can't be written is kept and tried again with the next."""
        before = len(self.unwritten.splitlines())
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if before == 1:
                reason = f"{self.path} can't be written ({error.strerror})"
                warn(f"{reason}; its lines are kept and tried again")

    def draw(self) -> None:
        """Draws loss.png from metrics.jsonl."""
        with optional("loss.png"):
            if self.enabled:
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
        # $ is an ordinary character there
        axes.set_title(self._title(records), parse_math=False, fontsize="medium")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        with replacing(self.out_dir / "loss.png") as drawing:
            figure.savefig(drawing, format="png", dpi=120)

    def _title(self, records: list[dict]) -> str:
        """What ran, and how far it came."""
        text = f"{self.out_dir}: {headline(self.config)}\nstep {self.done:,} of {self.stop:,}"
        for key in ("loss", "val_loss"):
            found = [r[key] for r in records if r.get(key) is not None]
            text += f", {key} {found[-1]:.4f}" if found else ""
        return text

    def close(self) -> None:
        if not self.enabled:
            return
        self.bar.close()
        self._write()
        self.file.close()
        self.tracker.close()


def _skipped(stats: StepStats) -> str:
    shown = ", ".join(str(offset) for offset in stats.offsets[:4])
    more = len(stats.offsets) - 4
    return (
        f"{'loss spike' if stats.finite else 'not finite'}: update skipped; the sequences begin at "
        f"tokens {shown}{f' and {more} more (metrics.jsonl)' if more > 0 else ''} of train.bin"
    )


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def read_records(path: Path) -> Iterator[dict]:
    """The records of a metrics.jsonl; damaged lines are dropped."""
    return filter(None, _read_lines(path))


def _read_lines(path: Path) -> Iterator[dict | None]:
    """The record of each line, None for a damaged one; an incomplete last line is dropped."""
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
    return peak_resident()


def format_time(seconds: float) -> str:
    """3725 -> '1:02:05', with days in front where there are any."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock
