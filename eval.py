"""Evaluates a checkpoint on val.bin: python eval.py CONFIG --checkpoint_path P [--json]"""

import json
import math
from contextlib import closing
from functools import partial

from configuration import Configuration
from dataset import EvalData
from engines import open_engine
from planner.resolve import resolve
from runtime.arguments import parse_configuration
from runtime.console import UserError, command, progress
from runtime.distributed import Group, joined
from runtime.metrics import perplexity
from runtime.resume import check_same_data, check_tokenizer, find_checkpoint


def main() -> None:
    config, more = parse_configuration(
        "Evaluate a checkpoint.", json=(bool, "print the result as JSON")
    )
    with joined(config, training=False) as group:
        evaluate(config, group, more["json"])


def evaluate(config: Configuration, group: Group, as_json: bool) -> None:
    with group.shared_errors():
        checkpoint = find_checkpoint(config, group)
        if checkpoint is None:
            raise UserError(
                "--checkpoint_path is required: the path of a checkpoint, the folder of a run, or "
                "latest, the newest in --out_dir"
            )
        config = config.with_model(checkpoint.check_model())
    plan = group.on_first(resolve, config, {}, False, group.local_size)
    config = plan.config
    with group.shared_errors():
        folder = (config.dataset, config.vocab_size, config.sequence_length, config.batch_size)
        data = EvalData(*folder, config.eval_batches)
        check_tokenizer(checkpoint, data.tokens)
    check_same_data(group, data.tokens)
    batches = partial(progress, what="evaluating", unit="batch")
    with closing(open_engine(config, training=False)) as engine:
        engine.load(checkpoint.read, None, partial(progress, what="loading", unit="layer"))
        group.barrier()  # some may take long to load
        loss_sum, tokens = engine.evaluate(data, plan.eval_sequences, batches)
    loss = loss_sum / tokens
    result = {"step": checkpoint.step, "loss": loss, "perplexity": perplexity(loss)}
    result["tokens"] = tokens
    if data.tokens.text_bytes:
        result["bits_per_byte"] = loss * data.tokens.count / data.tokens.text_bytes / math.log(2)
    text = " | ".join(f"{key} {value:,.6g}" for key, value in result.items())
    finite = {key: value if math.isfinite(value) else None for key, value in result.items()}
    print(json.dumps(finite) if as_json else text)


if __name__ == "__main__":
    command(main)
