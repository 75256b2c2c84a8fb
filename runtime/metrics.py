"""The metrics of a run: a bar or lines of a log, metrics.jsonl, a tracker and loss.png."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from common.console import log, optional, warn
from common.files import checked_count, replacing
from common.tokens import sources_of
from dataset import EvalData
from engines.base import StepStats
from planner.costs import Plan, flops_per_token, headline
from planner.machine import peak_resident
from runtime.tracking import Tracker

Sums = list[tuple[float, int]]  # of each source: of the losses of its tokens, and their number
OF_A_STEP = ("step", "loss", "learning_rate", "grad_norm", "seconds", "tokens")


class NoMetrics:
    """Records nothing: the metrics of every rank but the first."""

    def log_step(self, *record: object) -> None:
        """Drops a record, as each of these does."""

    report_progress = log_evaluation = log_samples = draw = close = log_step


class Metrics:
    """Records the steps of a run from step `start`; later records in the folder are moved to
    metrics.dropped.jsonl. The plan has what model FLOPs utilization (MFU) is computed from."""

    def __init__(self, plan: Plan, start: int, processes: int = 1):
        self.config = plan.config
        self.start = start
        self.done = start
        self.stop = plan.config.num_steps
        self.flops_per_token = flops_per_token(plan.config)
        self.peak_flops = plan.machine.matmul * processes
        self.out_dir = Path(plan.config.out_dir)
        self.path = self.out_dir / "metrics.jsonl"
        self._drop_later_records()
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self.unwritten = b""
        self.tracker = Tracker(plan.config, start)
        self.bar = tqdm(
            total=self.stop,
            initial=start,
            disable=None,  # on a terminal only; a log has its lines
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt}{postfix} {bar}",
        )
        self.began = time.monotonic()
        self.shown = self.began

    def _drop_later_records(self) -> None:
        found = list(_read_lines(self.path))
        records = [record for record in found if record is not None]
        later = [_line(record) for record in records if record["step"] > self.start]
        if later:
            with open(self.out_dir / "metrics.dropped.jsonl", "a") as dropped:
                dropped.writelines(later)
        with replacing(self.path) as kept, open(kept, "w") as file:
            file.writelines(_line(record) for record in records if record["step"] <= self.start)
        if damaged := found.count(None):
            warn(f"{self.path}: {damaged} damaged lines were dropped")

    def log_step(self, stats: StepStats) -> None:
        self.done = stats.step
        rate = self.config.batch_size * self.config.sequence_length / stats.seconds
        mfu = rate * self.flops_per_token / self.peak_flops
        memory = memory_used()
        values = {name: getattr(stats, name) for name in OF_A_STEP}
        values |= {"tokens_per_second": rate, "mfu": mfu, "memory": memory}
        self.tracker.log(stats.step, values)
        skipped = {} if stats.applied else {"sequences": stats.offsets.tolist()}
        self._write(finite(values) | skipped)
        self._show(stats, values)

    def _show(self, stats: StepStats, values: dict[str, float]) -> None:
        """Moves the bar; a log has a line every log_steps, of the first and last step and of one
        without an update."""
        loss = f"loss {stats.loss:.4f}"
        rate = f"{values['tokens_per_second']:,.0f} tokens/s"
        memory = f"{values['memory'] / 1e9:.2f} GB"
        left = f"ETA {self._time_left(0)}"
        self.bar.set_postfix_str(f"{loss}, {rate}, {memory}, {left}", refresh=False)
        self.bar.update(1)
        self.shown = time.monotonic()
        parts = [f"step {stats.step}/{self.stop}", loss, f"lr {stats.learning_rate:.3e}"]
        parts += [f"grad_norm {stats.grad_norm:.3f}", rate]
        if not math.isnan(values["mfu"]):  # the peak is known
            parts.append(f"MFU {values['mfu']:.1%}")
        parts += [f"peak {memory}", left]
        if not stats.applied:
            parts.append(_skipped(stats))
        first_or_last = stats.step in (self.start + 1, self.stop)
        due = first_or_last or stats.step % self.config.log_steps == 0
        if not stats.applied or (self.bar.disable and due):
            log(" | ".join(parts))

    def report_progress(self, fraction: float) -> None:
        """Shows the part of the current step that is done: on the bar, or in a line a minute."""
        if time.monotonic() - self.shown < (60 if self.bar.disable else 1):
            return
        self.shown = time.monotonic()
        self.bar.set_postfix_str(f"{fraction:.0%} of the next")
        if self.bar.disable:
            left = self._time_left(fraction)
            log(f"step {self.done + 1}/{self.stop} | {fraction:.0%} | ETA {left}")

    def _time_left(self, fraction: float) -> str:
        """Returns the time to the end at the pace so far, evaluations and saves included;
        `fraction` of the current step is done."""
        done = self.done - self.start + fraction
        seconds = time.monotonic() - self.began
        return format_time(seconds / done * (self.stop - self.start - done))

    def log_evaluation(self, step: int, val_loss: float, each: dict[str, float]) -> None:
        """Records an evaluation after `step`, of `each` source where there are several, and draws
        loss.png."""
        values = {"step": step, "val_loss": val_loss}
        values |= {f"val_loss/{name}": loss for name, loss in each.items()}
        self.tracker.log(step, values)
        self._write(finite(values))
        parts = [f"step {step}/{self.stop}", f"val_loss {val_loss:.4f}"]
        parts.append(f"perplexity {perplexity(val_loss):.2f}")
        parts += [f"{name} {loss:.4f}" for name, loss in each.items()]
        log(" | ".join(parts))
        self.draw()

    def log_samples(self, step: int, samples: list[str]) -> None:
        """Records texts that the model wrote after `step`."""
        if not samples:
            return
        self.tracker.log(step, {}, samples)
        self._write({"step": step, "samples": samples})
        for prompt, text in zip(self.config.sample_prompts, samples, strict=True):
            written = text.removeprefix(prompt)
            log(f"step {step}/{self.stop} | after {json.dumps(prompt)} | {written}")

    def _write(self, *records: dict) -> None:
        """Writes records; what can't be written is kept and tried again with the next."""
        self.unwritten += "".join(map(_line, records)).encode()
        before = len(self.unwritten.splitlines())
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if before == 1:
                reason = f"{self.path} can't be written ({error.strerror})"
                warn(f"{reason}; its lines are kept and tried again")

    @optional("loss.png")
    def draw(self) -> None:
        """Draws loss.png from metrics.jsonl."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        records = list(read_records(self.path))
        steps, losses = _points(records, "loss")
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(losses), color="tab:blue", label="loss, smoothed")
        steps, losses = _points(records, "val_loss")
        axes.plot(steps, losses, color="tab:orange", marker="o", label="val_loss")
        if steps:
            last = (steps[-1], losses[-1])
            above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "right"}
            axes.annotate(f"{losses[-1]:.3f}", last, **above)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        # $ is an ordinary character there
        axes.set_title(self._title(records), parse_math=False, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing(self.out_dir / "loss.png") as drawing:
            figure.savefig(drawing, format="png", dpi=120)

    def _title(self, records: list[dict]) -> str:
        """Returns what ran, and how far."""
        text = f"{self.out_dir}: {headline(self.config)}\nstep {self.done:,} of {self.stop:,}"
        for key in ("loss", "val_loss"):
            _, losses = _points(records, key)
            text += f", {key} {losses[-1]:.4f}" if losses else ""
        return text

    def close(self) -> None:
        self.bar.close()
        self._write()
        self.file.close()
        self.tracker.close()


def _points(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Returns the steps that have a value of this key, and the values."""
    found = [record for record in records if record.get(key) is not None]
    return [record["step"] for record in found], [record[key] for record in found]


def _smoothed(losses: list[float]) -> list[float]:
    """Returns the exponential moving average over a hundredth of the losses, without the bias of a
    start at zero (Kingma and Ba 2015, 3)."""
    decay = 1 - 1 / max(1, len(losses) / 100)
    smoothed = []
    mean = 0.0
    weight = 0.0
    for loss in losses:
        weight = decay * weight + 1
        mean += (loss - mean) / weight
        smoothed.append(mean)
    return smoothed


def _skipped(stats: StepStats) -> str:
    reason = "loss spike" if stats.finite else "not finite"
    places = ", ".join(map(str, stats.offsets[:4]))
    if len(stats.offsets) > 4:
        places += f" and {len(stats.offsets) - 4} more (metrics.jsonl)"
    return f"{reason}: update skipped; the sequences begin at tokens {places} of train"


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def mean_losses(dataset: str | dict[str, float], sums: Sums) -> tuple[float, dict[str, float]]:
    """Returns the loss a token of all sources, and that of each where there are several, from the
    sums of their losses and the numbers of their tokens."""
    mean = sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)
    if len(sums) == 1:
        return mean, {}
    names = sources_of(dataset)
    return mean, {name: loss / n for name, (loss, n) in zip(names, sums, strict=True)}


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Returns what JSON can hold: it has no NaN."""
    return {name: v if math.isfinite(v) else None for name, v in values.items()}


def measures(
    dataset: str | dict[str, float], sources: list[EvalData], sums: Sums
) -> dict[str, float]:
    """Return what eval.py prints of the sums of losses and numbers of tokens of these sources."""
    loss, each = mean_losses(dataset, sums)
    found = {"loss": loss, "perplexity": perplexity(loss), "tokens": sum(n for _, n in sums)}
    if all(data.tokens.text_bytes for data in sources):
        tokens = sum(data.tokens.count for data in sources)
        text_bytes = sum(data.tokens.text_bytes for data in sources)
        found["bits_per_byte"] = loss * tokens / text_bytes / math.log(2)
    return found | {f"loss/{name}": value for name, value in each.items()}


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def read_records(path: Path) -> Iterator[dict]:
    """Yields the records of a metrics.jsonl without damaged lines."""
    return filter(None, _read_lines(path))


def _read_lines(path: Path) -> Iterator[dict | None]:
    """Yields the record of each line, None for a damaged one; drops an incomplete last line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
            checked_count(record["step"])
        except (ValueError, LookupError, TypeError, RecursionError):
            record = None
        if record or line.endswith(b"\n"):
            yield record


def memory_used() -> int:
    """Returns the peak bytes so far: allocated on the GPU if it is in use, else resident here."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def format_time(seconds: float) -> str:
    """Returns 3725 as '1:02:05', with days in front where there are any."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock
