"""Writes a checkpoint as a Hugging Face model: python export.py --checkpoint_path P --out DIR"""

import json
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from model import GPT
from runtime.card import check_token, push, write_card
from runtime.checkpoint import open_newest
from runtime.console import UserError, command
from runtime.families import NotInTransformers, family_of
from runtime.files import follow_umask
from runtime.huggingface import (
    INDEX,
    check_same,
    hugging_face_tensors,
    load_tokenizer,
)


def export(
    checkpoint_path: str,
    out: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    push_to: str | None = None,
) -> None:
    """Write a checkpoint as Hugging Face GPT-2 or Llama, one layer at a time.

    Args:
        checkpoint_path: a checkpoint, or the folder of a run: its newest
        out: the folder to write configuration, tokenizer, weights and a model card into; new or
            empty
        dtype: of the weights
        push_to: a repository of the Hugging Face hub, USER/NAME, to upload the folder to
    """
    if push_to is not None:
        check_token()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; use another --out")
    checkpoint = open_newest(checkpoint_path)
    config = checkpoint.check_model()
    try:
        check_same(checkpoint, config, config.max_position_embeddings)
    except NotInTransformers as error:
        raise UserError(
            f"{error}, so it can't be exported; sample.py and eval.py can use it"
        ) from None
    family = family_of(config)
    theirs = family.theirs(config)
    theirs.dtype = dtype
    if checkpoint.tokenizer is not None:
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(out)
        theirs.bos_token_id, theirs.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    theirs.save_pretrained(out)
    weight_map, total = {}, 0
    with torch.device("meta"):
        layers = GPT(config).layers()
    for layer in tqdm(layers, unit="layer", disable=None):
        named, file = hugging_face_tensors(checkpoint, config, f"{layer}."), f"{layer}.safetensors"
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in named}
        try:
            save_file(tensors, out / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{out} could not be written ({error}); free some space") from None
        follow_umask(out / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=1))
    write_card(checkpoint, out, push_to or out.name, family.title, dtype)
    print(f"wrote {out}")
    if push_to is not None:
        print(f"pushed to {push(out, push_to)}")


def main() -> None:
    auto_cli(export, as_positional=False, allow_abbrev=False, exit_on_error=False)


if __name__ == "__main__":
    command(main)
