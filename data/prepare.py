"""Prepare text as a dataset, in the folder data/NAME: your own files, or a dataset of the hub.

    python data/prepare.py --name NAME FILES... [--tokenizer T] [--column text]
    python data/prepare.py --name NAME --source HUB_DATASET [--subset S] [--split S] [--tokens N]
    python data/prepare.py --adopt FOLDER

The last adds what is missing to a dataset of nanoGPT. The prepare.py scripts of the named datasets
share the functions of this file. A dataset holds
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
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import multiprocess
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from data.vocabularies import DOCUMENTS_AT_ONCE, KNOWN, Vocabulary, find_vocabulary, gpt2
from runtime.console import UserError, command
from runtime.tokens import write_meta

ROOT = Path(__file__).absolute().parents[1]
SEED = 2357
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # on the disk, for the user, in a file

# Documents are encoded in pieces, because an encoding takes about a hundred bytes a token. A
# space or newline after something else always starts a new GPT-2 word, so pieces that are cut
# there have the tokens of the whole. Other tokenizers may have other words.
PIECE = re.compile(r"(?:.{1,16384}|.+?)(?:\Z|(?<=\S)(?=[ \n]))", re.DOTALL)
PIECES_AT_ONCE = 128
BYTES_A_TOKEN, COUNTED = 4, 20  # of English; documents of which the tokens of one are counted
HALF_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 cannot


def main() -> None:
    parser = ArgumentParser(description="Prepare texts.", allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--name", type=str, help="makes the folder data/NAME")
    parser.add_argument("--adopt", metavar="FOLDER", help="completes nanoGPT's GPT-2 token files")
    parser.add_argument("--tokenizer", type=str, default="gpt2", help=KNOWN)
    parser.add_argument("--column", type=str, default="text", help="key or column of the text")
    parser.add_argument("--source", type=str, help="a dataset of the hub, or a folder like one")
    parser.add_argument("--subset", type=str, help="of the source, which may have several")
    parser.add_argument("--split", type=str, default="train", help="of the source")
    parser.add_argument("--tokens", type=int, help="read about so many of the source; null: all")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="processes to encode")
    kinds = ".txt (one document), .jsonl or .parquet"
    parser.add_argument("files", type=str, nargs="*", help=kinds)
    args = parser.parse_args()
    others = (args.name, args.files, args.source, args.tokenizer)
    if args.adopt is not None and others == (None, [], None, "gpt2"):
        return adopt(Path(args.adopt))
    if args.adopt is not None or args.name is None or bool(args.files) == bool(args.source):
        raise UserError("give --name NAME and FILES or --source, or --adopt FOLDER alone")
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise UserError(f"--name {args.name!r}: use letters, digits, '_', '-' and '.' only")
    if args.num_proc < 1 or (args.tokens is not None and args.tokens < 1):
        raise UserError("--num_proc and --tokens start at 1")
    folder = ROOT / "data" / args.name
    if (script := folder / "prepare.py").exists():
        raise UserError(f"{script} makes data/{args.name}: run it, or give another --name")
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with scratch(folder) as temporary:
            prepare(args, folder, temporary)
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def prepare(args, folder: Path, temporary: str) -> None:
    """Makes the dataset that the command line asks for."""
    if args.source is None:
        documents = keep(_documents(args.files, args.column), temporary)
        source = ", ".join(Path(file).name for file in args.files)
    else:
        texts = hub_texts(args.source, args.subset, args.split, args.column)
        if args.tokens is not None:
            counted = None
            if args.tokenizer != "char" and not args.tokenizer.startswith("bpe:"):
                counted = find_vocabulary(args.tokenizer, {}).tokenizer
            texts = first_tokens(texts, args.tokens, counted, args.tokenizer == "char")
        documents = keep(texts, temporary)
        source = " ".join(filter(None, (args.source, args.subset, args.split)))
    splits = split(documents)
    write(folder, temporary, splits, find_vocabulary(args.tokenizer, splits), source, args.num_proc)


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
        write(folder, temporary, {}, gpt2(), "nanoGPT")
    print(f"{folder} is complete: train with --dataset {folder}")


def read(files: list[str], temporary: str) -> Dataset:
    """The documents of `files` in order, as a dataset with one column, text, kept in `temporary`.

    Raises UserError or OSError for a file that is missing, unknown or not as its kind should be.
    """
    return keep(_documents(files, "text"), temporary)


def keep(texts: Iterable[str], temporary: str) -> Dataset:
    """Documents as a dataset with one column, text, in `temporary`."""
    path = f"{temporary}/documents.arrow"
    schema = pyarrow.schema({"text": pyarrow.large_string()})
    texts = iter(tqdm(texts, "reading", unit=" documents", disable=None))
    with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
            writer.write_batch(pyarrow.record_batch([batch], schema))
    return Dataset.from_file(path)


def hub_texts(source: str, subset: str | None, part: str, column: str) -> Iterator[str]:
    """The documents of a dataset of the hub, or of a folder in its layout, as they are streamed."""
    name = " ".join(filter(None, (source, subset, part)))
    try:
        rows = datasets.load_dataset(source, subset, split=part, streaming=True)
        for row in rows:
            if column not in row:
                raise UserError(f"{name}: no column named {column!r}; it has {', '.join(row)}")
            yield _checked(row[column], name, column)
    except (OSError, ValueError, KeyError, DatasetsError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--source {name}: {reason}") from None


def first_tokens(
    texts: Iterable[str], tokens: int, tokenizer: Tokenizer | None, by_character: bool
) -> Iterator[str]:
    """Documents up to about so many tokens: of one in COUNTED they are counted, else taken from the
    bytes of the others; without a tokenizer BYTES_A_TOKEN."""
    rate, total = 1.0 if by_character else 1 / BYTES_A_TOKEN, 0.0
    counted, of_bytes = 0, 0
    for number, text in enumerate(texts):
        size = len(text) if by_character else len(text.encode())
        if tokenizer is not None and number % COUNTED == 0:
            counted, of_bytes = counted + len(tokenizer.encode(text).ids), of_bytes + size
            rate = counted / max(1, of_bytes)
        yield text
        total += rate * size + 1
        if total >= tokens:
            return


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


def write(
    folder: Path,
    temporary: str,
    splits: dict[str, Dataset],
    vocabulary: Vocabulary,
    source: str,
    num_proc: int = 1,
) -> None:
    """Encode the splits and put the dataset into `folder`, in the place of one that is there.

    `num_proc` processes encode. All files are made in `temporary`, so that a dataset in `folder`
    stays until they are complete. A split that is not among `splits` has its tokens there already,
    as a link to where they are.
    """
    dtype = np.dtype("uint16" if vocabulary.size <= 2**16 else "uint32")
    _check_space(folder, splits, dtype.itemsize, vocabulary)
    definition = vocabulary.tokenizer.to_str()
    meta = {
        "tokenizer": vocabulary.name,
        "tokenizer_sha256": hashlib.sha256(definition.encode()).hexdigest(),
        "vocab_size": vocabulary.size,
        "dtype": dtype.name,
        "bytes": {},  # of UTF-8 text, for bits per byte
        "documents": {name: len(documents) for name, documents in splits.items()},
        "source": source,
    }
    for name, documents in splits.items():
        meta["bytes"][name] = _encode_split(temporary, name, documents, vocabulary, dtype, num_proc)
    Path(temporary, "tokenizer.json").write_bytes(definition.encode())
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
    temporary: str,
    name: str,
    documents: Dataset,
    vocabulary: Vocabulary,
    dtype: np.dtype,
    num_proc: int,
) -> int:
    """Writes the token ids of a split, and returns the bytes of its text."""
    size, keys = 0, (vocabulary, vocabulary.tokenizer.to_str(), dtype)
    batches = (batch["text"] for batch in documents.iter(DOCUMENTS_AT_ONCE))
    with (
        open(f"{temporary}/{name}.bin", "wb") as file,
        tqdm(desc=f"encoding {name}", unit=" tokens", unit_scale=True, disable=None) as bar,
        closing(_encoded(batches, keys, min(num_proc, len(documents)))) as encoded,
    ):
        for ids, text_size in encoded:
            file.write(ids.tobytes())
            size += text_size
            bar.update(len(ids))
    return size


def _encoded(batches: Iterator, keys: tuple, num_proc: int) -> Iterator[tuple[np.ndarray, int]]:
    """The batches in order, encoded here or by processes, with a few on their way."""
    if num_proc <= 1:
        _begin(*keys)
        yield from map(_encode, batches)
        return
    with multiprocess.Pool(num_proc, _begin, keys) as pool:
        waiting = deque(pool.apply_async(_encode, (b,)) for b in islice(batches, 2 * num_proc))
        while waiting:
            yield waiting.popleft().get()
            waiting.extend(pool.apply_async(_encode, (batch,)) for batch in islice(batches, 1))


def _begin(vocabulary: Vocabulary, definition: str, dtype: np.dtype) -> None:
    """Makes what `_encode` uses, once a process."""
    global ENCODER
    tokenizer = Tokenizer.from_str(definition)
    end = tokenizer.encode(vocabulary.end, add_special_tokens=False).ids
    begin = [token for token in tokenizer.encode("").ids if token not in end]
    # in a document a special token's text is text; a tokenizer.json does not keep this setting
    tokenizer.encode_special_tokens = True
    ENCODER = (tokenizer, begin, end, vocabulary.end_bytes, vocabulary.by_words, dtype)


def _encode(texts: list[str]) -> tuple[np.ndarray, int]:
    """The token ids of documents, and the bytes of text they stand for."""
    tokenizer, begin, end, end_bytes, by_words, dtype = ENCODER
    pieces = []  # None: a document ends
    for text in texts:
        pieces += [*(PIECE.findall(text) if by_words else [text]), None]
    ids = [np.array(begin, dtype)]
    for start in range(0, len(pieces), PIECES_AT_ONCE):
        some = pieces[start : start + PIECES_AT_ONCE]
        encodings = tokenizer.encode_batch_fast([p or "" for p in some], add_special_tokens=False)
        for piece, encoding in zip(some, encodings, strict=True):
            ids.append(np.array([*end, *begin] if piece is None else encoding.ids, dtype))
    ids[-1] = ids[-1][: len(end)]
    return np.concatenate(ids), sum(len(text.encode()) + end_bytes for text in texts)


def _documents(files: list[str], column: str) -> Iterator[str]:
    for file in files:
        if Path(file).suffix not in READERS:
            raise UserError(f"{file}: unknown kind of file; use {', '.join(READERS)}")
        open(file, "rb").close()  # finds one that is missing before the others are read
    for file in files:
        for place, text in READERS[Path(file).suffix](file, column):
            yield _checked(text, place, column)


def _checked(text: object, place: str, column: str) -> str:
    if not isinstance(text, str) or HALF_SURROGATE.search(text):
        raise UserError(f"{place}: no text under the name {column!r}")
    return text


def _read_txt(file: str, column: str) -> Iterator[tuple[str, str]]:
    try:
        yield file, Path(file).read_bytes().decode()  # bytes: keeps the line ends as they are
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; convert the file") from None


def _read_jsonl(file: str, column: str) -> Iterator[tuple[str, object]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):
                raise UserError(f"{place}: not JSON in UTF-8, or nested too deep") from None
            yield place, record.get(column) if isinstance(record, dict) else None


def _read_parquet(file: str, column: str) -> Iterator[tuple[str, object]]:
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise UserError(f"{file}: no column named {column!r}")
        batches = table.iter_batches(DOCUMENTS_AT_ONCE, columns=[column])
        texts = (text.as_py() for batch in batches for text in batch[column])
        for row, text in enumerate(texts, start=1):
            yield f"{file}, row {row}", text
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise UserError(f"{file}: not a parquet file or damaged, row {row + 1}: {error}") from None


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _check_space(
    folder: Path, splits: dict[str, Dataset], itemsize: int, vocabulary: Vocabulary
) -> None:
    """A token stands for BYTES_A_TOKEN of text, or for a character."""
    text = sum(documents.data.nbytes for documents in splits.values())
    needed = itemsize * text // (1 if vocabulary.name == "char" else BYTES_A_TOKEN)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.relative_to(ROOT)} needs about {needed / 1e9:.1f} GB on its disk, which has"
            f" {free / 1e9:.1f} GB free; free some, or make the folder a link to another disk"
        )


if __name__ == "__main__":
    command(main)
