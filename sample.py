"""Writes text with a checkpoint: python sample.py --checkpoint_path P [--prompt TEXT]

Without a prompt it asks for one after the other. Generation is transformers' own.
"""

from dataclasses import dataclass

import torch
from jsonargparse import ArgumentParser

from checkpoint import Checkpoint
from configuration import model_config
from errors import UserError, command
from export import hugging_face_config, hugging_face_tensors, load_tokenizer


@dataclass
class Options:
    """How to sample.

    Args:
        checkpoint_path: a checkpoint
        prompt: the text to go on from; without it, asks for one after the other
        max_new_tokens: tokens to write
        temperature: below 1 likelier tokens, above 1 more surprising ones; 0: the likeliest
        top_k: draw from this many likeliest tokens
        seed: of the draws
        num_samples: texts for each prompt
    """

    checkpoint_path: str
    prompt: str | None = None
    max_new_tokens: int = 500
    temperature: float = 0.8
    top_k: int = 200
    seed: int = 0
    num_samples: int = 1


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_class_arguments(Options)
    options = Options(**vars(parser.parse_args()))
    if (
        min(options.max_new_tokens, options.top_k, options.num_samples) < 1
        or options.temperature < 0
    ):
        raise UserError("max_new_tokens, top_k and num_samples start at 1, temperature at 0")
    checkpoint = Checkpoint(options.checkpoint_path)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(f"{checkpoint.path} carries no tokenizer, so it can't read a prompt")
    prompt = None if options.prompt is None else encode(tokenizer, options.prompt)
    model = load_model(checkpoint)
    torch.manual_seed(options.seed)
    if prompt is not None:
        respond(model, tokenizer, prompt, options)
        return
    while line := ask():
        try:
            respond(model, tokenizer, encode(tokenizer, line), options)
        except UserError as error:
            print(error)


def ask() -> str:
    try:
        return input("Enter a prompt (RETURN to exit): ")
    except EOFError:
        return ""


def encode(tokenizer, prompt: str) -> torch.Tensor:
    """The ids (1, n) of a prompt; UserError where the vocabulary lacks one of its characters."""
    try:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(
            f"the prompt has a character that the checkpoint's vocabulary lacks ({error})"
        ) from None
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty; give at least one character")
    return ids


def respond(model, tokenizer, ids: torch.Tensor, options: Options) -> None:
    """Prints the prompt with what follows it, num_samples times."""
    for _ in range(options.num_samples):
        print(tokenizer.decode(generate(model, ids, options)[0]), flush=True)
        if options.num_samples > 1:
            print("-" * 16)


def load_model(checkpoint: Checkpoint):
    """The checkpoint as transformers' GPT2LMHeadModel, on a GPU if there is one."""
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = hugging_face_config(model_config(checkpoint.config))
    weights = dict(hugging_face_tensors(checkpoint))
    model = GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=weights).eval()
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else None)
    return model


@torch.no_grad()
def generate(model, ids: torch.Tensor, options: Options) -> torch.Tensor:
    """ids (1, n) -> (1, n + max_new_tokens), or fewer where the text ends.

    The model's positions end somewhere: from there on it sees the second half of what it wrote.
    """
    limit, ids = model.config.n_positions, ids.to(model.device)
    end = ids.shape[1] + options.max_new_tokens
    draw = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    while ids.shape[1] < end:
        seen = ids if ids.shape[1] < limit else ids[:, -max(1, limit // 2) :]
        new = model.generate(
            seen,
            attention_mask=torch.ones_like(seen),
            max_new_tokens=min(end - ids.shape[1], limit - seen.shape[1]),
            pad_token_id=0,
            **(draw if options.temperature > 0 else {"do_sample": False}),
        )[:, seen.shape[1] :]
        ids = torch.cat([ids, new], dim=1)
        if ids[0, -1] == model.config.eos_token_id:
            break
    return ids


if __name__ == "__main__":
    command(main)
