"""Trains a GPT: python train.py CONFIG [--key value ...]"""

from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from configuration import Configuration
from dataset import EvalData, TrainData
from engines import open_engine
from engines.base import Engine, StepStats
from planner.costs import Plan
from planner.report import describe, warnings
from planner.resolve import resolve
from runtime.arguments import parse_configuration, write_configuration
from runtime.checkpoint import claim, newest, save
from runtime.console import StopSignals, UserError, command, log, optional, progress, warn
from runtime.distributed import Group, joined
from runtime.metrics import Metrics
from runtime.profiling import profiled
from runtime.resume import find_start
from runtime.samples import Samples

MAX_SKIPPED = 10  # steps in a row that were not finite before training stops


def main() -> None:
    config, _ = parse_configuration("Train a GPT.")
    with joined(config) as group:
        train(config, group)


def train(config: Configuration, group: Group) -> None:
    with group.shared_errors():
        start = find_start(config, group)
    if group.gather(start.finished)[0]:  # restarted, but the run was already complete
        return
    plan = group.on_first(resolve, start.config, start.chosen, True, group.local_size)
    config, out_dir = plan.config, Path(plan.config.out_dir)
    train_data, val_data, samples = start.open_data(config, group)
    with (
        claim(out_dir, group),
        StopSignals(group.size) as signals,
        closing(open_engine(config)) as engine,
    ):
        log(describe(plan))
        for warning in warnings(plan):
            warn(warning)
        start.restore(engine)
        group.on_first(write_configuration, start.config, config, out_dir / "config.yaml")
        with closing(Metrics(plan, start.step, group.size, enabled=group.rank == 0)) as metrics:
            group.barrier()  # some may take long to load
            run = Run(engine, train_data, val_data, samples, plan, group, signals, metrics)
            if group.any(start.lacks_evaluation):
                run.evaluate(start.step)
            skipped, due = 0, False
            steps = engine.run(train_data, start.step, config.num_steps, metrics.progress)
            for stats in profiled(steps, config, start.step, group.rank):
                metrics.log_step(stats)
                skipped = 0 if stats.finite else skipped + 1
                if skipped == MAX_SKIPPED:
                    with group.shared_errors():
                        raise UserError(diverged(stats.step, out_dir))
                last = stats.step == config.num_steps
                # a checkpoint of non-finite weights is saved at the very end only
                can_save = stats.can_save and stats.finite
                due = due or stats.step % config.checkpoint_steps == 0
                saved = last or (due and can_save)
                if saved:  # before anything that may fail
                    run.save(stats)
                    due = False
                if last or stats.step % config.eval_steps == 0:
                    run.evaluate(stats.step)
                if group.any(signals.stop) and (saved or can_save):
                    if not saved:
                        run.save(stats)
                    log(f"stopped at step {stats.step}; resume with --checkpoint_path latest")
                    break
            metrics.draw()


@dataclass
class Run:
    """What saving and evaluating need."""

    engine: Engine
    train_data: TrainData
    val_data: EvalData
    samples: Samples
    plan: Plan
    group: Group
    signals: StopSignals
    metrics: Metrics

    def save(self, stats: StepStats) -> None:
        engine, config, tokens = self.engine, self.plan.config, self.train_data.tokens
        manifest = {
            "step": stats.step,
            "optimizer_steps": engine.optimizer_steps,
            "tokens": stats.tokens,
            "recent": list(engine.recent),
            "train_digest": tokens.digest,
            "config": asdict(config),
        }
        state = progress(engine.state(), "saving", "file", 3 * len(engine.layers))
        keep = config.keep_checkpoints if stats.finite else None
        with self.metrics.timed("save"):
            path = save(Path(config.out_dir), state, manifest, keep, self.group, tokens.tokenizer)
        log(f"saved {path}")

    def evaluate(self, step: int) -> None:
        """Evaluates after a step, until a signal asks for a stop. An error ends the evaluation
        only, but with several processes the run, as the others would wait for one that failed."""
        sequences = self.plan.eval_sequences
        with optional(f"evaluation after step {step}") if self.group.size == 1 else nullcontext():
            with self.metrics.timed("evaluation"):
                loss, tokens = self.engine.evaluate(self.val_data, sequences, self._until_stopped)
            if not self.group.any(self.signals.stop):
                self.metrics.log_evaluation(step, loss / tokens)
                self.metrics.log_samples(step, self.samples.write(self.engine, self._until_stopped))

    def _until_stopped(self, items: Iterable, what="evaluating", unit="batch") -> Iterator:
        for item in progress(items, what, unit):
            if self.group.any(self.signals.stop):
                return
            yield item


def diverged(step: int, out_dir: Path) -> str:
    good = newest("latest", out_dir)
    return (
        f"stopped at step {step}: {MAX_SKIPPED} steps in a row had a loss or gradient that is not "
        f"finite; resume from {good or 'an earlier checkpoint'} in another --out_dir, with a lower "
        f"learning_rate or another seed"
    )


if __name__ == "__main__":
    command(main)
