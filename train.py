"""Trains a GPT: python train.py CONFIG [--key value ...]"""

import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path

import plan
from checkpoint import (
    TOKENIZER,
    Checkpoint,
    checkpoint_path,
    find_checkpoint,
    find_checkpoints,
    prune,
    remove_unfinished,
    save,
)
from configuration import MODEL_KEYS, Configuration, parse_configuration, write_configuration
from dataset import EvalBatches, TrainBatches
from engines import open_engine
from errors import UserError, command
from metrics import Metrics, say

MOST_SKIPPED = 10  # steps in a row that were not finite before training stops


def main() -> None:
    config, _ = parse_configuration("Train a GPT.")
    out_dir = Path(config.out_dir)
    checkpoint = find_checkpoint(config.checkpoint_path, out_dir, say)
    check_out_dir(out_dir, checkpoint)
    read, start, updates, origin = None, 0, None, ""
    if checkpoint is not None:
        check_resume(config, checkpoint)
        read, start, updates = checkpoint.read, checkpoint.step, checkpoint.updates
        origin = f"resumed from {checkpoint.path} at step {start}"
    elif config.init_from is not None:
        from export import read_hugging_face  # transformers takes seconds to import

        config, read = read_hugging_face(config)
        origin = f"started from the weights of {config.init_from}"
    config = plan.resolve(config, checkpoint.config if checkpoint else None)

    data = (config.dataset, config.vocab_size, config.sequence_length, config.batch_size)
    train_batches = partial(TrainBatches, *data, config.seed)
    val_batches = partial(EvalBatches, *data, config.eval_batches)
    meta = train_batches(0, 1).tokens.meta  # both are opened here for their errors
    val_batches(0, 1)
    if checkpoint is not None:
        check_tokenizer(checkpoint, meta, config.dataset)

    out_dir.mkdir(parents=True, exist_ok=True)
    remove_unfinished(out_dir)
    write_configuration(config, out_dir / "config.yaml")
    say(describe(config))
    engine = open_engine(config)
    if read is None:
        engine.initialize()
    else:
        engine.load(read, updates)
        say(origin)
    peak = plan.peak_flops(config.backend, config.precision)
    metrics = Metrics(out_dir, start, config.num_steps, plan.flops_per_token(config), peak)

    def save_checkpoint(step: int) -> None:
        path = checkpoint_path(out_dir, step)
        tokenizer = Path(config.dataset) / TOKENIZER
        save(
            path,
            engine.state(),
            step,
            engine.updates,
            asdict(config),
            tokenizer if tokenizer.is_file() else None,
        )
        prune(out_dir, config.keep)
        say(f"saved {path}")

    skipped = 0
    try:
        with StopSignals() as signals:
            for stats in engine.run(train_batches, start, config.num_steps, metrics.progress):
                metrics.log(stats)
                skipped = 0 if stats.finite else skipped + 1
                if skipped == MOST_SKIPPED:
                    raise UserError(
                        f"stopped at step {stats.step}: {skipped} steps in a row had a loss or "
                        f"gradient that is not finite; go on from an earlier checkpoint with a "
                        f"lower learning_rate, or another seed"
                    )
                last = stats.step == config.num_steps or signals.stop
                if last or stats.step % config.checkpoint_steps == 0:
                    save_checkpoint(stats.step)
                if signals.stop:
                    break
                if last or stats.step % config.eval_steps == 0:
                    loss, tokens = engine.evaluate(val_batches)
                    metrics.log_evaluation(stats.step, loss / tokens)
        metrics.draw()
    finally:
        metrics.close()
        engine.close()
    if signals.stop:
        say(f"stopped by a signal at step {stats.step}; --checkpoint_path latest goes on from here")


def check_out_dir(out_dir: Path, checkpoint: Checkpoint | None) -> None:
    """A run never mixes its checkpoints with those of another."""
    others = find_checkpoints(out_dir)
    if checkpoint is not None and checkpoint.path.resolve().parent == out_dir.resolve():
        names = [path.name for path in others]
        others = others[names.index(checkpoint.path.resolve().name) + 1 :]
    if others:
        raise UserError(
            f"{out_dir} already holds {others[-1].name}; add --checkpoint_path latest to go on "
            f"from it, or take another --out_dir"
        )


def check_resume(config: Configuration, checkpoint: Checkpoint) -> None:
    """The checkpoint must be of this model and leave something to do."""
    now = asdict(config)
    for key in MODEL_KEYS:
        if key not in ("dropout", "init_std") and checkpoint.config.get(key) != now[key]:
            raise UserError(
                f"{checkpoint.path} is of another model: its {key} is "
                f"{checkpoint.config.get(key)}, this configuration's {now[key]}"
            )
    if checkpoint.step >= config.num_steps:
        raise UserError(
            f"{checkpoint.path} is at step {checkpoint.step} and num_steps is {config.num_steps}: "
            f"nothing is left to train; raise --num_steps"
        )
    free = ("out_dir", "checkpoint_path", "init_from", "num_steps", "memory_limit", "keep")
    for key, value in checkpoint.config.items():
        if key in now and key not in free and now[key] not in (value, "auto", None):
            say(f"note: {key} is {now[key]}; it was {value} when {checkpoint.path} was saved")


def check_tokenizer(checkpoint: Checkpoint, meta: dict, dataset: str) -> None:
    """Data in another vocabulary would train, to no purpose."""
    if checkpoint.tokenizer is None or "tokenizer_sha256" not in meta:
        return
    if checkpoint.files[TOKENIZER]["sha256"] != meta["tokenizer_sha256"]:
        raise UserError(
            f"{dataset} was made with another tokenizer ({meta.get('tokenizer')}) than "
            f"{checkpoint.path}; take the dataset that it was trained on"
        )


def describe(config: Configuration) -> str:
    """What is about to run, in a line."""
    micro_batches = -(-config.batch_size // config.micro_batch_size)
    return (
        f"{plan.count_parameters(config):,} parameters, {config.engine} on {config.backend}, "
        f"{config.precision}, {config.batch_size * config.sequence_length:,} tokens a step in "
        f"{micro_batches} micro-batches of {config.micro_batch_size} × {config.sequence_length}"
    )


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second one does what it always does."""

    def __init__(self):
        self.stop = False

    def __enter__(self) -> "StopSignals":
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        self.stop = True
        self.__exit__()
        say(f"{signal.Signals(number).name}: finishing this step and saving; again to quit at once")

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    command(main)
