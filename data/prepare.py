"""Prepare text as a dataset, in data/NAME or any folder: your own files, or a dataset of the hub.

    python data/prepare.py --name NAME FILES... [--tokenizer T] [--column text]
    python data/prepare.py --name NAME --source HUB_DATASET [--subset S] [--split S] [--tokens N]
    python data/prepare.py --out FOLDER ...
    python data/prepare.py --adopt FOLDER

The last adds what is missing to a dataset of nanoGPT. Interrupted, the same command resumes. A
dataset holds
    train.bin, val.bin  token ids, document after document: uint16, or uint32 for ids above 65,535;
                        of a long text train-00000.bin, train-00001.bin and so on
    tokenizer.json      a file of Hugging Face `tokenizers`, whichever kind the tokenizer is
    meta.json           what the other files are; written last, so it never describes other files
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from common.console import UserError, command
from common.files import read_sealed
from common.tokens import write_meta
from data.pieces import BYTES_A_TOKEN, Limit, draw, pieces
from data.shards import building, describe, encode, job_of, known, publish, write_json
from data.sources import READERS, HubCopy, find_files, hub_files
from data.vocabularies import KNOWN, Vocabulary, find_vocabulary, gpt2, is_of_the_text
from weights.hub import reading

ROOT = Path(__file__).absolute().parents[1]


def main() -> None:
    parser = ArgumentParser(description="Prepare texts.", allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--name", type=str, help="makes the folder data/NAME")
    parser.add_argument("--out", type=str, help="makes this folder instead")
    parser.add_argument("--adopt", metavar="FOLDER", help="completes nanoGPT's GPT-2 token files")
    parser.add_argument("--tokenizer", type=str, default="gpt2", help=KNOWN)
    parser.add_argument("--column", type=str, default="text", help="key or column of the text")
    parser.add_argument("--source", type=str, help="a dataset of the hub, or a folder like one")
    parser.add_argument("--subset", type=str, help="of the source, which may have several")
    parser.add_argument("--split", type=str, default="train", help="of the source")
    parser.add_argument("--tokens", type=int, help="read about so many of the source; null: all")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="processes to encode")
    kinds = f"{', '.join(READERS)}, these and .gz, or folders of them"
    parser.add_argument("files", type=str, nargs="*", help=kinds)
    args = parser.parse_args()
    others = (args.name, args.out, args.files, args.source, args.tokenizer)
    if args.adopt is not None and others == (None, None, [], None, "gpt2"):
        return adopt(Path(args.adopt))
    one_place = (args.name is None) != (args.out is None)
    one_source = bool(args.files) != bool(args.source)
    if args.adopt is not None or not one_place or not one_source:
        raise UserError(
            "give --name NAME or --out FOLDER, and FILES or --source; or --adopt FOLDER alone"
        )
    if args.name is not None and not re.fullmatch(r"\w[\w.-]*", args.name):
        raise UserError(f"--name {args.name!r}: use letters, digits, '_', '-' and '.' only")
    if args.num_proc < 1 or (args.tokens is not None and args.tokens < 1):
        raise UserError("--num_proc and --tokens start at 1")
    folder = Path(args.out) if args.out else ROOT / "data" / args.name
    check_free(folder)
    prepare(args, folder)


def check_free(folder: Path) -> None:
    """Raises UserError for a folder with a dataset, which is never replaced."""
    if (script := folder / "prepare.py").exists():
        raise UserError(f"{script} makes {folder}: run it, or give another --name or --out")
    complete = (folder / "meta.json").exists()
    if complete:  # perhaps since a moment, before which this was to be removed
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
    if complete or (any(folder.glob("*.bin")) and not (folder / "unfinished/job.json").exists()):
        shown = os.path.relpath(folder)
        raise UserError(f"{shown} has a dataset: delete it, or give another --name or --out")


def prepare(args, folder: Path) -> None:
    """Make the dataset that the command line asks for."""
    of_hub = args.source is not None and not Path(args.source).is_dir()
    where = (args.source, args.subset, args.split)
    vocabulary = None
    if not is_of_the_text(args.tokenizer):
        vocabulary = find_vocabulary(args.tokenizer, ())
    files = [] if of_hub else find_files(args.files) if args.source is None else hub_files(*where)
    names = ("source", "subset", "split", "tokens", "column", "tokenizer")
    job = job_of(files, vocabulary, **{name: getattr(args, name) for name in names})
    with building(folder, job) as work:
        column, limit, expected = args.column, None, sum(map(os.path.getsize, files))
        if args.source is not None and args.tokens is not None:
            tokenizer = vocabulary and vocabulary.tokenizer
            limit = Limit(args.tokens, tokenizer, args.tokenizer == "char")
            expected = args.tokens * BYTES_A_TOKEN
        if of_hub:
            files, column = HubCopy(work, *where, column), "text"
        plan = partial(pieces, files, column, draw, limit)
        if vocabulary is None:
            documents = (text for _, piece in plan() for text in piece.texts())
            vocabulary = trained(work, args.tokenizer, documents)
        encode(work, plan(partial(known, work)), vocabulary, args.num_proc, expected)
        source = where if args.source else [", ".join(Path(file).name for file in args.files)]
        publish(folder, work, vocabulary, " ".join(filter(None, source)))


def trained(work: Path, name: str, documents: Iterator[tuple[str, str]]) -> Vocabulary:
    """Return the tokenizer of this name that is made from the documents, or was before."""
    path = work / "vocabulary.json"
    if path.exists():
        with reading(os.path.relpath(path)):
            kept = read_sealed(path)
        return Vocabulary(Tokenizer.from_str(kept.pop("definition")), **kept)
    vocabulary = find_vocabulary(name, documents)
    fields = {key: value for key, value in vars(vocabulary).items() if key != "tokenizer"}
    write_json(path, fields | {"definition": vocabulary.tokenizer.to_str()})
    return vocabulary


def adopt(folder: Path) -> None:
    """Add tokenizer.json and meta.json to the train.bin and val.bin of nanoGPT in `folder`.

    Raises UserError or OSError, and leaves it as it is, if they do not hold GPT-2 tokens.
    """
    there = os.listdir(folder)
    if "meta.pkl" in there:  # a pickle can run code, so it is not read
        raise UserError(f"{folder}/meta.pkl: not GPT-2; prepare the text with --tokenizer char")
    if "meta.json" in there or "tokenizer.json" in there:  # a dataset, perhaps replaced in part
        raise UserError(f"{folder} has a meta.json or tokenizer.json already; move it away first")
    with TemporaryDirectory(prefix="unfinished-", dir=folder) as temporary:
        # GPT-2 has 50,257 tokens; a file may be larger than the memory
        for path in (folder / "train.bin", folder / "val.bin"):
            with open(path, "rb") as file:
                while ids := file.read(2**20):
                    if len(ids) % 2 or np.frombuffer(ids, "<u2").max() >= 50257:
                        raise UserError(f"{path}: not uint16 ids of GPT-2; prepare the text again")
            os.symlink(path.absolute(), f"{temporary}/{path.name}")
        meta = write_meta(Path(temporary), describe(Path(temporary), gpt2(), "nanoGPT"))
        if min(meta["tokens"].values()) < 2:
            raise UserError(f"{folder}: train.bin or val.bin has under 2 tokens")
        for name in ("train.crc", "val.crc", "tokenizer.json", "meta.json"):
            os.replace(f"{temporary}/{name}", folder / name)
    print(f"{folder} is complete: train with --dataset {folder}")


if __name__ == "__main__":
    command(main)
