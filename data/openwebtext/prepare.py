"""Prepare OpenWebText with the GPT-2 vocabulary.

    python data/openwebtext/prepare.py [--source DIR_OR_HUB_NAME] [--num_proc N]

The source is a dataset of the Hugging Face hub, or a folder of such parquet or jsonl files.
"""

import os
import sys
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from jsonargparse import ArgumentParser

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from data.prepare import read, scratch, write
from data.vocabularies import gpt2
from runtime.console import UserError, command


def main() -> None:
    parser = ArgumentParser(
        description="Prepare OpenWebText.", allow_abbrev=False, exit_on_error=False
    )
    kinds = "a dataset of the hub, or a folder of .parquet or .jsonl files"
    parser.add_argument("--source", type=str, default="Skylion007/openwebtext", help=kinds)
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="processes to use")
    args = parser.parse_args()
    if args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc}: use 1 or more")
    folder = Path(__file__).absolute().parent
    with scratch(folder) as temporary:
        if Path(args.source).is_dir():
            documents = read(files_below(args.source), temporary)
            source = Path(args.source).absolute().name
        else:
            documents = load_from_hub(args.source, args.num_proc)
            source = args.source
        write(folder, temporary, split(documents), gpt2(), source, args.num_proc)


def files_below(folder: str) -> list[str]:
    """The parquet and jsonl files in `folder` and in the folders inside it, in order of name."""
    files = (path for path in Path(folder).rglob("*") if path.suffix in (".parquet", ".jsonl"))
    return sorted(map(str, files))


def load_from_hub(name: str, num_proc: int) -> Dataset:
    """The split train of a dataset on the hub, from the cache of `datasets` once it is there."""
    try:
        documents = load_dataset(name, split="train", num_proc=num_proc)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{name} is not a folder here and could not be had from the hub ({error});"
            " check the network and the name, or give a folder: --source DIR"
        ) from None
    if "text" not in documents.column_names:
        raise UserError(f"{name}: no column named 'text'; has {', '.join(documents.column_names)}")
    return documents


def split(documents: Dataset) -> dict[str, Dataset]:
    """The split that nanoGPT makes: 1 document in 2,000 for validation."""
    if len(documents) < 2:
        raise UserError(f"{len(documents)} documents in the source; it takes 2 to split them")
    parts = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    return {"train": parts["train"], "val": parts["test"]}


if __name__ == "__main__":
    command(main)
