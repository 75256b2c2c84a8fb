"""Writes text with a model: python sample.py --checkpoint_path P [--prompt TEXT]"""

from pathlib import Path

from common.console import UserError, command, read_prompts, warn  # before torch

# isort: split
import torch
from jsonargparse import ArgumentParser

from runtime.generation import open_source
from runtime.samples import Sampling
from weights.huggingface import decode, encode


def sample(
    checkpoint_path: str | None = None,
    init_from: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 500,
    temperature: float = Sampling.temperature,
    top_k: int = Sampling.top_k,
    top_p: float = Sampling.top_p,
    seed: int = 0,
    num_samples: int = 1,
    out_dir: str = "model_dir",
) -> None:
    """Write text with a checkpoint or a released model.

    Args:
        checkpoint_path: a checkpoint, the folder of a run (its newest), or latest (in out_dir)
        init_from: instead of it, a folder or hub name of a Hugging Face model
        prompt: the text to continue; without it, prompts are read from stdin, one a line
        max_new_tokens: tokens to write
        temperature: below 1 likelier tokens, above 1 more surprising ones; 0: the likeliest
        top_k: draw from this many likeliest tokens
        top_p: of these, from the likeliest that together have this probability
        seed: of the draws
        num_samples: texts for each prompt
        out_dir: the folder of the run, for latest
    """
    if min(max_new_tokens, top_k, num_samples) < 1:
        raise UserError("max_new_tokens, top_k and num_samples start at 1")
    if temperature != 0 and not 0.01 <= temperature <= 100:
        raise UserError(f"temperature: {temperature} is neither 0 nor from 0.01 to 100")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p} is not above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: {seed} is not from 0 to 2**63 - 1")
    tokenizer, generate = open_source(checkpoint_path, init_from, Path(out_dir))
    how = Sampling(temperature, top_k, top_p)
    torch.manual_seed(seed)

    def respond(text: str) -> None:
        ids = encode(tokenizer, text)
        for _ in range(num_samples):
            written = generate(ids, max_new_tokens, how, tokenizer.eos_token_id)
            print(decode(tokenizer, written[0]), flush=True)
            if num_samples > 1:
                print("-" * 16)

    if prompt is not None:
        return respond(prompt)
    for line in read_prompts():
        try:
            respond(line)
        except UserError as error:
            warn(str(error))


def main() -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_function_arguments(sample)
    sample(**vars(parser.parse_args()))


if __name__ == "__main__":
    command(main)
