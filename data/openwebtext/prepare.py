"""Prepare OpenWebText with the GPT-2 vocabulary.

    python data/openwebtext/prepare.py [--source DIR_OR_HUB_NAME] [--num_proc N]

The source is a dataset of the Hugging Face hub, or a folder of such parquet or jsonl files.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jsonargparse import ArgumentParser

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from common.console import UserError, command, track
from data.pieces import State, pieces
from data.shards import building, encode, job_of, known, publish
from data.sources import read_file
from data.vocabularies import gpt2


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
    source = args.source
    if Path(source).is_dir():
        name = Path(source).absolute().name
    else:
        name, source = source, fetched(source)
    files = files_below(source)
    vocabulary = gpt2()
    with building(folder, job_of(files, vocabulary, source=name)) as work:
        plan = pieces(files, "text", nanogpt_split(files), known=partial(known, work))
        encode(work, plan, vocabulary, args.num_proc, sum(map(os.path.getsize, files)))
        publish(folder, work, vocabulary, name)


def files_below(folder: str) -> list[str]:
    """The parquet and jsonl files in `folder` and in the folders inside it, in order of name."""
    files = (path for path in Path(folder).rglob("*") if path.suffix in (".parquet", ".jsonl"))
    return sorted(map(str, files))


def fetched(name: str) -> str:
    """The folder that the files of a dataset of the hub are in, fetched where they are not."""
    try:
        patterns = ["*.parquet", "*.jsonl"]
        return snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"{name} is not a folder here and could not be had from the hub ({error});"
            " check the network and the name, or give a folder: --source DIR"
        ) from None


def nanogpt_split(files: list[str]) -> Callable:
    """The documents that nanoGPT's `train_test_split` of `datasets` takes for validation: 1 in
    2,000."""
    texts = (text for file in files for _, text in read_file(file, "text") if text is not None)
    number = sum(1 for _ in track(texts, "counting", " documents"))
    if number < 2:
        raise UserError(f"{number} documents in the source; it takes 2 to split them")
    order = np.random.default_rng(2357).permutation(number)
    chosen = np.sort(order[: ceil(number * 0.0005)])

    def choose(state: State, sizes: np.ndarray, number: int) -> tuple[np.ndarray, int, float]:
        first, last = np.searchsorted(chosen, [state.documents, state.documents + len(sizes)])
        return chosen[first:last] - state.documents, 0, 0.0

    return choose


if __name__ == "__main__":
    command(main)
