"""Trains a GPT: python train.py CONFIG [--key value ...]"""

from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path

import plan
from checkpoint import claim, save
from configuration import Configuration, parse_configuration, write_configuration
from engines import open_engine
from errors import StopSignals, command
from metrics import Metrics, Silence, say, watch
from resume import find_start, lacks_evaluation
from systems import World, joined


def main() -> None:
    config, _ = parse_configuration("Train a GPT.")
    with joined(config) as world:
        train(config, world)


def train(config: Configuration, world: World) -> None:
    with world.together():
        start = find_start(config, world)
        planned = None if world.rank else plan.resolve(start.config, start.chosen, here=world.here)
    planned = world.gather(planned)[0]
    config = planned.config
    out_dir = Path(config.out_dir)

    train_batches, val_batches, tokens = start.open_data(config, world)

    with claim(out_dir, world), StopSignals(world.size) as signals, ExitStack() as stack:
        say(plan.describe(planned))
        engine = stack.enter_context(closing(open_engine(config)))
        if start.read is None:
            engine.initialize(partial(watch, what="starting", unit="unit"))
        else:
            engine.load(start.read, start.updates, partial(watch, what="loading", unit="unit"))
        say(start.origin)
        metrics = Silence()
        if world.rank == 0:
            write_configuration(config, out_dir / "config.yaml")
            flops, peak = plan.flops_per_token(config), planned.machine.products * world.size
            metrics = Metrics(out_dir, start.step, config.num_steps, flops, peak)
        stack.callback(metrics.close)
        world.gather(None)  # the slowest may take long

        def stopping() -> bool:
            return world.agree(signals.stop)

        def save_checkpoint(step: int) -> None:
            done = {"step": step, "updates": engine.updates, "train_tokens": tokens.count}
            state = watch(engine.state(), "saving", "file", 3 * (config.depth + 2))
            say(f"saved {save(out_dir, state, done, asdict(config), config.keep, world)}")

        def evaluate(step: int) -> None:
            loss, count = engine.evaluate(
                val_batches, lambda b: takewhile(lambda _: not stopping(), watch(b))
            )
            if not stopping():  # else it was cut short
                metrics.log_evaluation(step, loss / count)

        if world.gather(lacks_evaluation(config, start.checkpoint))[0]:
            evaluate(start.step)
        for stats in engine.run(train_batches, start.step, config.num_steps, metrics.progress):
            metrics.log(stats)
            last = stats.step == config.num_steps
            saved = last or stats.step % config.checkpoint_steps == 0
            if saved:
                save_checkpoint(stats.step)
            if last or stats.step % config.eval_steps == 0:
                evaluate(stats.step)
            if stopping() and stats.can_save:
                if not saved:
                    save_checkpoint(stats.step)
                say(f"stopped at step {stats.step}; --checkpoint_path latest goes on from here")
                break
        metrics.draw()


if __name__ == "__main__":
    command(main)
