"""Writes text with a checkpoint: python sample.py --checkpoint_path P [--prompt TEXT]

Without a prompt it asks for one after the other. Generation is transformers' own.
"""

import torch
from jsonargparse import auto_cli

from checkpoint import Checkpoint
from errors import UserError, command
from export import encode, load_model, load_tokenizer


def sample(
    checkpoint_path: str,
    prompt: str | None = None,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int = 0,
    num_samples: int = 1,
) -> None:
    """Write text with a checkpoint.

    Args:
        checkpoint_path: a checkpoint
        prompt: the text to go on from; without it, asks for one after the other
        max_new_tokens: tokens to write
        temperature: below 1 likelier tokens, above 1 more surprising ones; 0: the likeliest
        top_k: draw from this many likeliest tokens
        seed: of the draws
        num_samples: texts for each prompt
    """
    if min(max_new_tokens, top_k, num_samples) < 1 or temperature < 0:
        raise UserError("max_new_tokens, top_k and num_samples start at 1, temperature at 0")
    checkpoint = Checkpoint(checkpoint_path)
    tokenizer = load_tokenizer(checkpoint)
    ids = None if prompt is None else encode(tokenizer, prompt)
    model = load_model(checkpoint)
    draw = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    draw = draw if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)

    def respond(ids: torch.Tensor) -> None:
        for _ in range(num_samples):
            print(tokenizer.decode(generate(model, ids, max_new_tokens, **draw)[0]), flush=True)
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


def generate(model, ids: torch.Tensor, max_new_tokens: int, **draw: object) -> torch.Tensor:
    """ids (1, n) -> (1, n + max_new_tokens), or fewer where the text ends.

    The model's positions end somewhere: from there on it sees the second half of what it wrote.
    """
    limit, ids = model.config.n_positions, ids.to(model.device)
    end = ids.shape[1] + max_new_tokens
    while ids.shape[1] < end:
        seen = ids if ids.shape[1] < limit else ids[:, -(limit // 2) :]
        new = min(end - ids.shape[1], limit - seen.shape[1])
        mask = torch.ones_like(seen)
        out = model.generate(seen, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **draw)
        ids = torch.cat([ids, out[:, seen.shape[1] :]], dim=1)
        if ids[0, -1] == model.config.eos_token_id:
            break
    return ids


def main() -> None:
    auto_cli(sample, as_positional=False, allow_abbrev=False, exit_on_error=False)


if __name__ == "__main__":
    command(main)
