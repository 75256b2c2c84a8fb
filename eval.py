"""Evaluates a checkpoint, or a released model with --init_from, on val.bin: python eval.py CONFIG
--checkpoint_path P [--json]"""

import json
from contextlib import closing
from functools import partial

from common.console import UserError, command, track
from configuration import Configuration, Data, Distributed, Memory, Weights
from dataset import open_val
from engines import open_engine
from model import GPTConfig
from planner.resolve import resolve
from runtime.arguments import parse_configuration
from runtime.distributed import Group, joined, starts_processes
from runtime.metrics import finite, measures
from runtime.resume import Start, check_same_data, find_checkpoint, open_weights
from weights.checkpoint import Checkpoint


def main() -> None:
    config, options = parse_configuration(
        "Evaluate a checkpoint or a released model.",
        shown=(GPTConfig, Data, Weights, Memory, Distributed),
        json=(bool, "print the result as JSON"),
    )
    if starts_processes(config):  # check before they start, to report an error once
        find_weights(config, Group())
    with joined(config, training=False) as group:
        result = evaluate(config, group)
    if options["json"]:
        print(json.dumps(finite(result)))
    else:
        print(" | ".join(f"{key} {value:,.6g}" for key, value in result.items()))


def find_weights(config: Configuration, group: Group) -> Start:
    """Returns a start at the checkpoint or the released model that a configuration names."""
    checkpoint = None
    if config.checkpoint_path is not None:
        checkpoint = find_checkpoint(config, group) or Checkpoint(config.out_dir)  # says why not
    elif config.init_from is None:
        raise UserError(
            "--checkpoint_path is required: the path of a checkpoint, the folder of a run, or "
            "latest, the newest in --out_dir; or --init_from, a released model"
        )
    return open_weights(config, checkpoint)


def evaluate(config: Configuration, group: Group) -> dict[str, float]:
    """Returns the loss of a model over val.bin, and what follows from it."""
    start = find_weights(config, group)
    plan = group.on_first(resolve, start.config, {}, False, group.local_size)
    sources = open_val(plan.config)
    start.check_tokenizer(sources[0].tokens)
    check_same_data(group, [data.tokens for data in sources])
    batches = partial(track, what="evaluating", unit="batch")
    with closing(open_engine(plan.config, training=False)) as engine:
        engine.load(start.read, None, partial(track, what="loading", unit="layer"))
        group.barrier()  # some may take long to load
        sums = [engine.evaluate(data, plan.eval_sequences, batches) for data in sources]
    return {"step": start.step, **measures(config.dataset, sources, sums)}


if __name__ == "__main__":
    command(main)
