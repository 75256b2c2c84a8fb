"""Writes a checkpoint as Hugging Face GPT-2: python export.py --checkpoint_path P --out DIR"""

import json
from pathlib import Path

from jsonargparse import auto_cli
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from runtime.checkpoint import open_newest
from runtime.console import UserError, command
from runtime.files import follow_umask
from runtime.huggingface import (
    INDEX,
    NotGPT2,
    check_gpt2,
    hugging_face_config,
    hugging_face_tensors,
    load_tokenizer,
)


def export(checkpoint_path: str, out: Path) -> None:
    """Write a checkpoint as Hugging Face GPT-2, one layer at a time.

    Args:
        checkpoint_path: a checkpoint, or the folder of a run: its newest
        out: the folder to write configuration, tokenizer and weights into; new or empty
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; use another --out")
    checkpoint = open_newest(checkpoint_path)
    config = checkpoint.check_model()
    try:
        check_gpt2(checkpoint, config, config.max_position_embeddings)
    except NotGPT2 as error:
        raise UserError(
            f"{error}, so it can't be exported; sample.py and eval.py can use it"
        ) from None
    hugging_face_config(config).save_pretrained(out)
    if checkpoint.tokenizer is not None:
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(out)
    weight_map, total = {}, 0
    layers = ["embedding", *(f"decoder.{i}" for i in range(config.depth)), "norm"]
    for layer in tqdm(layers, unit="layer", disable=None):
        tensors, file = dict(hugging_face_tensors(checkpoint, f"{layer}.")), f"{layer}.safetensors"
        try:
            save_file(tensors, out / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{out} could not be written ({error}); free some space") from None
        follow_umask(out / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=1))
    print(f"wrote {out}")


def main() -> None:
    auto_cli(export, as_positional=False, allow_abbrev=False, exit_on_error=False)


if __name__ == "__main__":
    command(main)
