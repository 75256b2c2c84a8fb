"""Evaluates a checkpoint on val.bin: python eval.py CONFIG --checkpoint_path P [--json]"""

import json
import math
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

import plan
from checkpoint import find_checkpoint
from configuration import model_config, parse_configuration, with_model
from dataset import EvalBatches
from engines import open_engine
from errors import UserError, command
from train import check_tokenizer


def main() -> None:
    config, switches = parse_configuration("Evaluate a checkpoint.", "json")
    checkpoint = find_checkpoint(config.checkpoint_path, Path(config.out_dir), lambda _: None)
    if checkpoint is None:
        raise UserError(
            "which checkpoint? add --checkpoint_path, such as model_dir/checkpoint_10.mdl"
        )
    config = with_model(config, model_config(checkpoint.config))
    config = plan.resolve(config, checkpoint.config, training=False)
    batches = partial(
        EvalBatches,
        config.dataset,
        config.vocab_size,
        config.sequence_length,
        config.batch_size,
        config.eval_batches,
    )
    tokens = batches(0, 1).tokens
    check_tokenizer(checkpoint, tokens.meta, config.dataset)
    engine = open_engine(config, training=False)
    engine.load(checkpoint.read, None)
    loss_sum, count = engine.evaluate(batches, partial(tqdm, unit="batch", file=sys.stderr))
    loss = loss_sum / count
    result = {"step": checkpoint.step, "loss": loss, "perplexity": math.exp(loss), "tokens": count}
    if size := tokens.meta.get("bytes", {}).get("val"):
        result["bits_per_byte"] = loss * tokens.count / size / math.log(2)
    if "json" in switches:
        print(json.dumps(result))
    else:
        print(" | ".join(f"{key} {value:,.6g}" for key, value in result.items()))


if __name__ == "__main__":
    command(main)
