"""Evaluates a checkpoint on val.bin: python eval.py CONFIG --checkpoint_path P [--json]"""

import json
import math
from contextlib import closing
from functools import partial

import plan
from configuration import Configuration, parse_configuration
from dataset import EvalBatches
from engines import open_engine
from errors import UserError, command
from metrics import perplexity, watch
from resume import check_same_data, check_tokenizer, find_checkpoint, model_config, with_model
from systems import World, joined


def main() -> None:
    config, more = parse_configuration(
        "Evaluate a checkpoint.", json=(bool, "print the result as JSON")
    )
    with joined(config, training=False) as world:
        evaluate(config, world, more["json"])


def evaluate(config: Configuration, world: World, as_json: bool) -> None:
    with world.together():
        checkpoint = find_checkpoint(config, world)
        if checkpoint is None:
            raise UserError(
                "which checkpoint? add --checkpoint_path with its path, the folder of a run, or "
                "latest, the newest in --out_dir"
            )
        config = with_model(config, model_config(checkpoint))
        if world.rank == 0:
            config = plan.resolve(config, {}, False, world.here).config
        data = (config.dataset, config.vocab_size, config.sequence_length, config.batch_size)
        batches = EvalBatches(*data, config.eval_batches)
        tokens = batches.tokens
        check_tokenizer(checkpoint, tokens)
    config = world.gather(config)[0]
    check_same_data(world, tokens)
    with closing(open_engine(config, training=False)) as engine:
        engine.load(checkpoint.read, None, partial(watch, what="loading", unit="unit"))
        world.gather(None)  # the slowest may take long
        loss_sum, count = engine.evaluate(batches.share, watch)
    loss = loss_sum / count
    result = {"step": checkpoint.step, "loss": loss, "perplexity": perplexity(loss)}
    result["tokens"] = count
    if tokens.text_bytes:
        result["bits_per_byte"] = loss * tokens.count / tokens.text_bytes / math.log(2)
    text = " | ".join(f"{key} {value:,.6g}" for key, value in result.items())
    finite = {key: value if math.isfinite(value) else None for key, value in result.items()}
    print(json.dumps(finite) if as_json else text)


if __name__ == "__main__":
    command(main)
