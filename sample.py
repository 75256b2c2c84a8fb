"""Writes text with a model: python sample.py --checkpoint_path P [--prompt TEXT]"""

import sys
from pathlib import Path

import torch
from jsonargparse import auto_cli

from runtime.console import UserError, command
from runtime.generation import open_source
from runtime.huggingface import encode


def sample(
    checkpoint_path: str | None = None,
    init_from: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int = 0,
    num_samples: int = 1,
    out_dir: Path = Path("model_dir"),
) -> None:
    """Write text with a checkpoint or a released model.

    Args:
        checkpoint_path: a checkpoint, the folder of a run (its newest), or latest (in out_dir)
        init_from: instead of it, a folder or hub name of a Hugging Face model
        prompt: the text to continue; without it, prompts are read from the terminal
        max_new_tokens: tokens to write
        temperature: below 1 likelier tokens, above 1 more surprising ones; 0: the likeliest
        top_k: draw from this many likeliest tokens
        seed: of the draws
        num_samples: texts for each prompt
        out_dir: the folder of the run, for latest
    """
    if min(max_new_tokens, top_k, num_samples) < 1:
        raise UserError("max_new_tokens, top_k and num_samples start at 1")
    if temperature != 0 and not 0.01 <= temperature <= 100:
        raise UserError(f"temperature: {temperature} is neither 0 nor from 0.01 to 100")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: {seed} is not from 0 to 2**63 - 1")
    tokenizer, open_for = open_source(checkpoint_path, init_from, out_dir)
    ids = None if prompt is None else encode(tokenizer, prompt)
    length = sys.maxsize if ids is None else ids.shape[1] + max_new_tokens
    generate = open_for(length)
    torch.manual_seed(seed)

    def respond(ids: torch.Tensor) -> None:
        for _ in range(num_samples):
            written = generate(ids, max_new_tokens, temperature, top_k, tokenizer.eos_token_id)
            print(tokenizer.decode(written[0], skip_special_tokens=True), flush=True)
            if num_samples > 1:
                print("-" * 16)

    if ids is not None:
        return respond(ids)
    while line := ask():
        try:
            respond(encode(tokenizer, line))
        except UserError as error:
            print(error)


def ask() -> str:
    try:
        return input("Enter a prompt (RETURN to exit): ")
    except EOFError:
        return ""


def main() -> None:
    auto_cli(sample, as_positional=False, allow_abbrev=False, exit_on_error=False)


if __name__ == "__main__":
    command(main)
