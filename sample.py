"""Writes text with a checkpoint: python sample.py --checkpoint_path P [--prompt TEXT]

Without a prompt it asks for one after the other. Generation is transformers' own where its GPT-2
computes what model.py does, else a plain loop over model.py.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from checkpoint import Checkpoint, open_newest
from errors import UserError, command
from export import NotGPT2, assign, check_gpt2, check_memory, encode, load_model, load_tokenizer
from model import GPT
from resume import model_config


def sample(
    checkpoint_path: str,
    prompt: str | None = None,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int = 0,
    num_samples: int = 1,
    out_dir: Path = Path("model_dir"),
) -> None:
    """Write text with a checkpoint.

    Args:
        checkpoint_path: a checkpoint, the folder of a run (its newest), or latest (in out_dir)
        prompt: the text to go on from; without it, asks for one after the other
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
    checkpoint = open_newest(checkpoint_path, out_dir)
    tokenizer = load_tokenizer(checkpoint)
    ids = None if prompt is None else encode(tokenizer, prompt)
    length = sys.maxsize if ids is None else ids.shape[1] + max_new_tokens
    generate = open_model(checkpoint, length)
    torch.manual_seed(seed)

    def respond(ids: torch.Tensor) -> None:
        for _ in range(num_samples):
            written = generate(ids, max_new_tokens, temperature, top_k, tokenizer.eos_token_id)
            print(tokenizer.decode(written[0]), flush=True)
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


def open_model(checkpoint: Checkpoint, length: int) -> Callable[..., Tensor]:
    """generate(ids, max_new_tokens, temperature, top_k, end) for texts of `length` tokens: ids
    (1, n) -> (1, n + max_new_tokens), or fewer where the text ends."""
    config, (device, dtype) = model_config(checkpoint), check_memory(checkpoint)
    try:
        check_gpt2(checkpoint, config, min(length, config.max_position_embeddings))
    except NotGPT2 as error:
        print(f"note: {error}; generating with model.py, which is slower", file=sys.stderr)
    else:
        return partial(generate, load_model(checkpoint, config, device, dtype))
    with torch.device("meta"):
        model = GPT(config).eval()
    names = [name for name, _ in model.named_parameters()]
    assign(model, ((name, checkpoint.read(name).to(device, dtype)) for name in names))
    return partial(generate_plain, model)


def generate(
    model, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int, end: int | None
) -> Tensor:
    """With transformers' model. Its positions end somewhere: from there on it sees the second half
    of what it wrote."""
    limit, ids = model.config.n_positions, ids.to(model.device)
    length = ids.shape[1] + max_new_tokens
    draw = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    draw = draw if temperature > 0 else {"do_sample": False}
    while ids.shape[1] < length:
        seen = ids if ids.shape[1] < limit else ids[:, -max(1, limit // 2) :]
        new = min(length - ids.shape[1], max(1, limit - seen.shape[1]))
        mask = torch.ones_like(seen)
        out = model.generate(seen, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **draw)
        ids = torch.cat([ids, out[:, seen.shape[1] :]], dim=1)
        if ids[0, -1] == end:
            break
    return ids


@torch.no_grad()
def generate_plain(
    model: GPT, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int, end: int | None
) -> Tensor:
    """With model.py, which sees as many of the last tokens as it has positions."""
    ids = ids.to(model.norm.weight.device)
    for _ in range(max_new_tokens):
        logits = model(ids[:, -model.config.max_position_embeddings :])[0, -1].float()
        top, tokens = logits.topk(min(top_k, len(logits)) if temperature > 0 else 1)
        drawn = (top / (temperature or 1)).softmax(0).multinomial(1)
        ids = torch.cat([ids, tokens[drawn][None]], dim=1)
        if ids[0, -1] == end:
            break
    return ids


def main() -> None:
    auto_cli(sample, as_positional=False, allow_abbrev=False, exit_on_error=False)


if __name__ == "__main__":
    command(main)
