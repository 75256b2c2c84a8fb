"""Trains a GPT: python train.py CONFIG [--key value ...]"""

from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path

import plan
from checkpoint import lock, remove_unfinished, save
from configuration import parse_configuration, write_configuration
from dataset import EvalBatches, TrainBatches
from engines import open_engine
from errors import StopSignals, UserError, command
from metrics import Metrics, say, watch
from resume import find_start

MOST_SKIPPED = 10  # steps in a row that were not finite before training stops


def main() -> None:
    start = find_start(parse_configuration("Train a GPT.")[0])
    planned = plan.resolve(start.config, start.chosen)
    config = planned.config
    out_dir = Path(config.out_dir)

    data = (config.dataset, config.vocab_size, config.sequence_length, config.batch_size)
    train_batches = partial(TrainBatches, *data, config.seed)
    val_batches = partial(EvalBatches, *data, config.eval_batches)
    val_batches(0, 1)  # both are opened here, for their errors
    tokens = train_batches(0, 1).tokens
    start.check_data(tokens)

    out_dir.mkdir(parents=True, exist_ok=True)
    with lock(out_dir), StopSignals() as signals, ExitStack() as stack:
        remove_unfinished(out_dir)
        write_configuration(config, out_dir / "config.yaml")
        say(plan.describe(planned))
        engine = stack.enter_context(closing(open_engine(config)))
        if start.read is None:
            engine.initialize(partial(watch, what="starting", unit="unit"))
        else:
            engine.load(start.read, start.updates, partial(watch, what="loading", unit="unit"))
        say(start.origin)
        flops, peak = plan.flops_per_token(config), planned.machine.products
        metrics = Metrics(out_dir, start.step, config.num_steps, flops, peak)
        stack.callback(metrics.close)

        def save_checkpoint(step: int) -> None:
            done = {"step": step, "updates": engine.updates, "train_tokens": tokens.count}
            state = watch(engine.state(), "saving", "file", 3 * (config.depth + 2))
            say(f"saved {save(out_dir, state, done, asdict(config), config.keep)}")

        skipped = 0
        for stats in engine.run(train_batches, start.step, config.num_steps, metrics.progress):
            metrics.log(stats)
            skipped = 0 if stats.finite else skipped + 1
            if skipped == MOST_SKIPPED:
                raise UserError(
                    f"stopped at step {stats.step}: {skipped} steps in a row had a loss or "
                    f"gradient that is not finite; go on from an earlier checkpoint in another "
                    f"--out_dir, with a lower learning_rate or another seed"
                )
            last = stats.step == config.num_steps
            saved = last or stats.step % config.checkpoint_steps == 0
            if saved:
                save_checkpoint(stats.step)
            if last or stats.step % config.eval_steps == 0:
                loss, count = engine.evaluate(
                    val_batches, lambda b: takewhile(lambda _: not signals.stop, watch(b))
                )
                if not signals.stop:  # else it was cut short
                    metrics.log_evaluation(stats.step, loss / count)
            if signals.stop:
                if not saved:
                    save_checkpoint(stats.step)
                say(f"stopped at step {stats.step}; --checkpoint_path latest goes on from here")
                break
        metrics.draw()


if __name__ == "__main__":
    command(main)
