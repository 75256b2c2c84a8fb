"""Writes a checkpoint as a Hugging Face model: python export.py --checkpoint_path P --out DIR"""

import json
from pathlib import Path
from typing import Literal

from common.console import UserError, command  # before torch

# isort: split
import torch
from jsonargparse import ArgumentParser

from runtime.card import check_token, push, write_card
from weights.checkpoint import open_newest
from weights.families import family_of
from weights.hub import reading
from weights.huggingface import check_same, load_tokenizer, write_weights


def export(
    checkpoint_path: str,
    out: str,
    dtype: Literal["float32", "bfloat16"] = "float32",
    push_to: str | None = None,
) -> None:
    """Write a checkpoint as a model of Hugging Face, one tensor at a time.

    Args:
        checkpoint_path: a checkpoint, or the folder of a run: its newest
        out: the folder to write configuration, tokenizer, weights and a model card into; new or
            empty
        dtype: of the weights
        push_to: a repository of the Hugging Face hub, USER/NAME, to upload the folder to
    """
    if push_to is not None:
        check_token()
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; use another --out")
    checkpoint = open_newest(checkpoint_path)
    config = checkpoint.check_model()
    try:
        family = family_of(config)
        theirs = family.theirs(config)
        check_same(config, theirs)
    except UserError as error:
        raise UserError(
            f"{error}, so it can't be exported; sample.py and eval.py can use it"
        ) from None
    theirs.dtype = dtype
    if checkpoint.tokenizer is not None:
        tokenizer = load_tokenizer(checkpoint)
        write_tokenizer(tokenizer, folder, config.max_position_embeddings)
        theirs.bos_token_id = tokenizer.bos_token_id
        theirs.eos_token_id = tokenizer.eos_token_id
    write_config(theirs, folder)
    with reading(f"{folder} could not be written; free some space"):
        write_weights(folder, config, checkpoint.read, getattr(torch, dtype))
    write_card(checkpoint, folder, push_to or folder.name, family.title, dtype)
    print(f"wrote {folder}")
    if push_to is not None:
        print(f"pushed to {push(folder, push_to)}")


def write_tokenizer(tokenizer, out: Path, positions: int) -> None:
    """Write a tokenizer under the class name that every version of transformers knows."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions}
    keys |= {"clean_up_tokenization_spaces": False, **tokenizer.special_tokens_map}
    (out / "tokenizer_config.json").write_text(json.dumps(keys, indent=2))


def write_config(theirs, out: Path) -> None:
    """Write config.json, with the rotary keys where transformers 4, llama.cpp and vLLM look for
    them too, and generation_config.json."""
    from transformers import GenerationConfig

    theirs.save_pretrained(out)
    ends = {"bos_token_id": theirs.bos_token_id, "eos_token_id": theirs.eos_token_id}
    GenerationConfig(**ends).save_pretrained(out)
    if rope := dict(getattr(theirs, "rope_parameters", {})):
        keys = json.loads((out / "config.json").read_text())
        keys["rope_theta"] = rope.pop("rope_theta")
        keys["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        (out / "config.json").write_text(json.dumps(keys, indent=2))


def main() -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_function_arguments(export)
    export(**vars(parser.parse_args()))


if __name__ == "__main__":
    command(main)
