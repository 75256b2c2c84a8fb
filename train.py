"""Trains a GPT: python train.py CONFIG [--key value ...]"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import plan
from checkpoint import claim, save
from configuration import Configuration, parse_configuration, write_configuration
from engines import StepStats, open_engine
from errors import StopSignals, UserError, command
from metrics import Metrics, Silence, harmless, say, watch
from resume import find_start, lacks_evaluation
from systems import World, joined

MOST_SKIPPED = 10  # steps in a row that were not finite before training stops


def main() -> None:
    config, _ = parse_configuration("Train a GPT.")
    with joined(config) as world:
        train(config, world)


def train(config: Configuration, world: World) -> None:
    with world.together():
        start = find_start(config, world)
        planned = None if world.rank else plan.resolve(start.config, start.chosen, here=world.here)
    planned = world.gather(planned)[0]
    asked, config = start.config, planned.config
    out_dir = Path(config.out_dir)

    train_batches, val_batches = start.open_data(config, world)

    with claim(out_dir, world), StopSignals(world.size) as signals, ExitStack() as stack:
        say("\n".join([plan.describe(planned), *plan.warnings(planned)]))
        engine = stack.enter_context(closing(open_engine(config)))
        if start.read is None:
            engine.initialize(partial(watch, what="starting", unit="unit"))
        else:
            engine.load(start.read, start.updates, partial(watch, what="loading", unit="unit"))
        engine.recent.extend(start.recent)
        say(start.origin)
        metrics = Silence()
        if world.rank == 0:
            write_configuration(asked, config, out_dir / "config.yaml")
            flops, peak = plan.flops_per_token(config), planned.machine.products * world.size
            times = (planned.eval_seconds, planned.save_seconds)
            every = (config.eval_steps, config.checkpoint_steps)
            steps = (start.step, config.num_steps)
            metrics = Metrics(out_dir, *steps, flops, peak, *times, *every)
        stack.callback(metrics.close)
        world.gather(None)  # the slowest may take long

        def stopping() -> bool:
            return world.agree(signals.stop)

        good = start.checkpoint and start.checkpoint.path  # the newest with weights that work

        def save_checkpoint(stats: StepStats) -> None:
            nonlocal good
            done = {"step": stats.step, "updates": engine.updates, "recent": list(engine.recent)}
            done |= {"tokens": tokens, "train_digest": train_batches.tokens.digest}
            state = watch(engine.state(), "saving", "file", 3 * (config.depth + 2))
            keep = config.keep if stats.finite else None
            tokenizer = train_batches.tokens.tokenizer
            with metrics.timed("save_seconds"):
                path = save(out_dir, state, done, asdict(config), keep, world, tokenizer)
            good = path if stats.finite else good
            say(f"saved {path}")

        def evaluate(step: int) -> None:
            failed = False

            def until_stopped(batches: Iterable) -> Iterator:
                nonlocal failed
                source, batch = iter(watch(batches)), None
                while True:
                    failed = True  # unless the next line is passed
                    with harmless(f"the evaluation after step {step}"):
                        batch, failed = next(source, None), False
                    if world.agree(signals.stop or failed) or batch is None:
                        return
                    yield batch

            with metrics.timed("eval_seconds"):
                loss, count = engine.evaluate(val_batches.share, until_stopped)
            if not world.agree(signals.stop or failed):  # else it was cut short
                metrics.log_evaluation(step, loss / count)

        def may_evaluate(step: int) -> None:
            if world.size > 1:  # others would wait for one that failed: that is for max_restarts
                evaluate(step)
                return
            with harmless(f"the evaluation after step {step}"):
                evaluate(step)

        if world.gather(lacks_evaluation(config, start.checkpoint))[0]:
            may_evaluate(start.step)
        skipped, due, tokens = 0, False, start.tokens
        for stats in engine.run(
            train_batches.share, start.step, config.num_steps, metrics.progress
        ):
            tokens += stats.tokens
            places = [] if stats.counted else train_batches.places(stats.step - 1)
            metrics.log(stats, tokens, places)
            skipped = 0 if stats.finite else skipped + 1
            if skipped == MOST_SKIPPED:
                with world.together():
                    raise UserError(
                        f"stopped at step {stats.step}: {skipped} steps in a row had a loss or "
                        f"gradient that is not finite; {good or 'no checkpoint'} is the last that "
                        f"is good: go on from there in another --out_dir, with a lower "
                        f"learning_rate or another seed"
                    )
            last = stats.step == config.num_steps
            # of weights that may not work the end alone is saved: others may stand there for long
            can_save = stats.can_save and stats.finite
            due = due or stats.step % config.checkpoint_steps == 0
            saved = last or (due and can_save)
            if saved:  # before anything that may fail
                save_checkpoint(stats)
                due = False
            if last or stats.step % config.eval_steps == 0:
                may_evaluate(stats.step)
            if stopping() and (saved or can_save):
                if not saved:
                    save_checkpoint(stats)
                say(f"stopped at step {stats.step}; --checkpoint_path latest goes on from here")
                break
        metrics.draw()


if __name__ == "__main__":
    command(main)
