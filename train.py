"""Trains a GPT: python train.py CONFIG [--key value ...]"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from common.console import StopSignals, UserError, command, log, optional, track, warn
from configuration import Configuration
from dataset import EvalData, TrainData
from engines import open_engine
from engines.base import Engine, StepStats
from planner.costs import Plan
from planner.report import describe, warnings
from planner.resolve import resolve
from runtime.arguments import parse_configuration, write_configuration
from runtime.distributed import Group, joined, starts_processes
from runtime.metrics import Metrics, NoMetrics, mean_losses
from runtime.profiling import profiled
from runtime.resume import MAX_SKIPPED, check_start, diverged, find_start
from runtime.samples import Samples
from weights.checkpoint import lock_out_dir, save

NEXT = """loss curve: {out_dir}/loss.png
next: python eval.py {out_dir}/config.yaml --checkpoint_path {out_dir}
      python sample.py --checkpoint_path {out_dir}
      python export.py --checkpoint_path {out_dir} --out FOLDER"""


def main() -> None:
    config, _ = parse_configuration("Train a GPT.")
    if starts_processes(config):  # check before they start, to report an error once
        check_start(config)
    with joined(config) as group:
        train(config, group)


def train(config: Configuration, group: Group) -> None:
    start = find_start(config, group)
    if group.gather(start.finished)[0]:  # restarted, but the run was already complete
        return
    plan = group.on_first(resolve, start.config, start.resolved_before, True, group.local_size)
    config = plan.config
    out_dir = Path(config.out_dir)
    train_data, val_data, samples = start.open_data(config, group)
    with (
        lock_out_dir(out_dir, group),
        StopSignals(group.size) as signals,
        closing(open_engine(config, blocks_on_device=plan.blocks_on_device)) as engine,
    ):
        log(describe(plan))
        for warning in warnings(plan):
            warn(warning)
        start.restore(engine)
        group.on_first(write_configuration, start.config, config, out_dir / "config.yaml")
        metrics = Metrics(plan, start.step, group.size) if group.rank == 0 else NoMetrics()
        group.barrier()  # some may take long to load
        with closing(metrics):
            run = Run(engine, train_data, val_data, samples, plan, group, signals, metrics)
            run.evaluate(start.step, group.gather(start.missing)[0])
            run.train(start.step)


@dataclass
class Run:
    """Trains with an engine, saves and evaluates."""

    engine: Engine
    train_data: TrainData
    val_data: list[EvalData]  # of each source
    samples: Samples
    plan: Plan
    group: Group
    signals: StopSignals
    metrics: Metrics

    def train(self, start: int) -> None:
        """Trains from a step to the last one, or until a signal asks for a stop."""
        config = self.plan.config
        report_progress = self.metrics.report_progress
        steps = self.engine.run(self.train_data, start, config.num_steps, report_progress)
        skipped = 0
        due = False  # a checkpoint, as soon as it can be saved
        for stats in profiled(steps, config, start, self.group.rank):
            self.metrics.log_step(stats)
            skipped = 0 if stats.finite else skipped + 1
            if skipped == MAX_SKIPPED:
                raise UserError(diverged(stats.step, config))
            last = stats.step == config.num_steps
            # after a loss or gradient that is not finite, only the last step is saved
            can_save = last or (stats.can_save and stats.finite)
            due = due or last or stats.step % config.checkpoint_steps == 0
            saved = due and can_save
            if saved:  # before anything that may fail
                self.save(stats)
                due = False
            if last or stats.step % config.eval_steps == 0:
                self.evaluate(stats.step)
            if last:
                log(NEXT.format(out_dir=config.out_dir))
            if self.is_stopping() and can_save:
                if not saved:
                    self.save(stats)
                log(f"stopped at step {stats.step}; resume with --checkpoint_path latest")
                break
        self.metrics.draw()

    def is_stopping(self) -> bool:
        """Returns whether a process got a signal; each must call it."""
        return self.group.any(self.signals.stop)

    def save(self, stats: StepStats) -> None:
        engine = self.engine
        config = self.plan.config
        tokens = self.train_data.tokens
        manifest = {
            "step": stats.step,
            "optimizer_steps": engine.optimizer_steps,
            "tokens": stats.tokens,
            "recent": list(engine.recent),
            "train_digest": self.train_data.digest,
            "bos_token": tokens.meta.get("bos_token"),  # weights/hub.py reads them
            "eos_token": tokens.meta.get("eos_token"),
            "config": asdict(config),
        }
        state = track(engine.state(), "saving", "file", 3 * len(engine.layers))
        keep = config.keep_checkpoints if stats.finite else None
        path = save(Path(config.out_dir), state, manifest, keep, self.group, tokens.tokenizer)
        log(f"saved {path}")

    def evaluate(self, step: int, records: Sequence[str] = ("val_loss", "samples")) -> None:
        """Makes these records after a step, until a signal asks for a stop. An error ends only the
        evaluation; with several processes it ends the run, as the others would wait."""
        with optional(f"evaluation after step {step}") if self.group.size == 1 else nullcontext():
            if "val_loss" in records:
                self.log_losses(step)
            if "samples" in records and not self.is_stopping():
                texts = self.samples.write(self.engine, self.until_stopped)
                if not self.is_stopping():
                    self.metrics.log_samples(step, texts)

    def log_losses(self, step: int) -> None:
        sums = []
        for data in self.val_data:
            sums.append(self.engine.evaluate(data, self.plan.eval_sequences, self.until_stopped))
        if not self.is_stopping():
            loss, each = mean_losses(self.plan.config.dataset, sums)
            self.metrics.log_evaluation(step, loss, each)

    def until_stopped(self, items: Iterable, what="evaluating", unit="batch") -> Iterator:
        for item in track(items, what, unit):
            if self.is_stopping():
                return
            yield item


if __name__ == "__main__":
    command(main)
