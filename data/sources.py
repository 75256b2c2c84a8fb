"""The texts that a dataset is made of: files, folders of files, and datasets of the hub.

A reader yields (position, place, text) for each document of an open file: the position after it,
from which another reading can begin, the place for messages, and the text, None where there is
none.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import HfHubHTTPError

from common.console import UserError
from common.files import replacing, sync

LONGEST = 2**30  # bytes of a document: more is refused before it takes memory
BATCH_ROWS, BATCH_BYTES = 100, 2**26  # of a parquet file at a time
HALF_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 cannot
COPY = 2**26  # characters of a file that documents of the hub are copied to
_READING = (None, 0, None)  # the file that `read_part` has read, up to which position
Found = Iterator[tuple[int, str, object]]


def find_files(names: list[str]) -> list[str]:
    """Return the files of these names; a folder stands for all in it that can be read.

    Raises UserError or OSError for one that is missing or of an unknown kind.
    """
    found = []
    for name in names:
        if Path(name).is_dir():
            inside = (p for p in Path(name).rglob("*") if p.is_file() and _kind(p) in READERS)
            found += sorted(str(p) for p in inside if not _is_hidden(p.relative_to(name)))
        elif _kind(Path(name)) in READERS:
            open(name, "rb").close()  # finds one that is missing before the others are read
            found.append(name)
        else:
            kinds = ", ".join(READERS)
            raise UserError(f"{name}: unknown kind of file; use {kinds}, or one of these and .gz")
    if not found:
        raise UserError(f"{', '.join(names)}: no file in it is a {', '.join(READERS)}")
    return found


def read_file(path: str, column: str, start: int = 0) -> Iterator[tuple[int, str | None]]:
    """Yield (position after it, text) for each document of a file from position `start` on; the
    text is None where it is null or empty.

    Raises UserError for a file that is not as its kind should be.
    """
    try:
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            for position, place, text in READERS[_kind(Path(path))](file, column, start):
                yield position, check_text(text, f"{path}{place}", column)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a gzip file, or damaged ({error})") from None
    except _Bad as error:
        raise UserError(f"{path}{error}") from None


def read_part(path: str, column: str, start: int, documents: int) -> Iterator[str | None]:
    """Yield the texts of so many documents of a file from a position on. A file that can only be
    read in order is not opened again for a later position."""
    global _READING
    before, position, reading = _READING
    in_order = path.lower().endswith(".gz") or _kind(Path(path)) in (".json", ".csv")
    if before == (path, column) and (position == start or (in_order and position < start)):
        while position < start:
            position, _ = next(reading)
    else:
        reading = read_file(path, column, start)
    for position, text in islice(reading, documents):
        _READING = ((path, column), position, reading)
        yield text


def check_text(text: object, place: str, column: str) -> str | None:
    """Return the text of a document, None if it is null or empty. Raises UserError."""
    if text is None or text == "":
        return None
    if not isinstance(text, str) or HALF_SURROGATE.search(text):
        raise UserError(f"{place}: no text under the name {column!r}")
    return text


def hub_files(source: str, subset: str | None, part: str) -> list[str]:
    """Return the files of a split in a folder that is laid out as the hub's datasets are."""
    import datasets  # takes seconds

    with _hub_errors(source, subset, part):
        files = datasets.load_dataset_builder(source, subset).config.data_files
        if part not in files:
            raise ValueError(f"no split {part!r}; it has {', '.join(map(str, files))}")
        return find_files([str(path) for path in files[part]])


def hub_texts(
    source: str, subset: str | None, part: str, column: str, state: dict | None = None
) -> Iterator[tuple[Callable[[], dict], str | None]]:
    """Yield (what gives the state after it, text) for each document of a dataset of the hub as it
    is streamed, from a state on."""
    import datasets

    with _hub_errors(source, subset, part) as name:
        options = {}
        if datasets.load_dataset_builder(source, subset).name == "text":  # a file is a document
            options = {"sample_by": "document", "encoding": "utf-8-sig"}
        rows = datasets.load_dataset(source, subset, split=part, streaming=True, **options)
        if state is not None:
            rows.load_state_dict(state)
        for row in rows:
            if column not in row:
                raise UserError(f"{name}: no column named {column!r}; it has {', '.join(row)}")
            yield rows.state_dict, check_text(row[column], name, column)


class HubCopy:
    """The files that a dataset of the hub is copied to, as it can't be read twice. File i is
    written when copy[i] is asked for, and says where file i + 1 begins."""

    def __init__(self, folder: Path, *source: str | None):
        self.folder, self.source = folder, source
        self.texts: Iterator | None = None

    def __getitem__(self, number: int) -> str:
        """Return the path of a file, whose column is text. Raises IndexError after the last."""
        path, state = self.folder / f"text-{number:05}.parquet", None
        if not path.exists():
            if number:
                before = pyarrow.parquet.read_schema(self[number - 1])
                state = json.loads(before.metadata[b"state"])
                if not state:
                    raise IndexError
            self.texts = self.texts or hub_texts(*self.source, state)
            self._write(path)
        return str(path)

    def _write(self, path: Path) -> None:
        texts, size, state = [], 0, {}  # {}: it was the last
        for get_state, text in self.texts:
            texts.append(text)
            size += len(text or "")
            if size >= COPY:
                state = get_state()
                break
        table = pyarrow.table({"text": pyarrow.array(texts, "large_string")})
        table = table.replace_schema_metadata({"state": json.dumps(state)})
        with replacing(path) as writing:
            pyarrow.parquet.write_table(table, writing, row_group_size=1000)
            sync(writing)


@contextmanager
def _hub_errors(*names: str | None) -> Iterator[str]:
    """Tells the errors of the hub, and of a folder like one, in a line."""
    from datasets.exceptions import DatasetsError

    name = " ".join(filter(None, names))
    try:
        yield name
    except (OSError, ValueError, KeyError, DatasetsError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--source {name}: {reason}") from None


class _Bad(Exception):
    """What is wrong with a file: the place in it, and the reason."""


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _limited(raw: bytes, place: str = "") -> bytes:
    if len(raw) > LONGEST:
        raise _Bad(f"{place}: a document of more than {LONGEST >> 30} GiB; split it")
    return raw


def _field(record: object, column: str, place: str) -> object:
    if not isinstance(record, dict) or column not in record:
        raise _Bad(f"{place}: no text under the name {column!r}")
    return record[column]


def _read_text(file: BinaryIO, column: str, start: int) -> Found:
    if start == 0:
        raw = _limited(file.read(LONGEST + 1)).removeprefix(codecs.BOM_UTF8)
        yield 1, "", raw.decode()  # as bytes it keeps the line ends as they are


def _read_jsonl(file: BinaryIO, column: str, start: int) -> Found:
    file.seek(start)
    for number in count(1):
        position = file.tell()
        place = f", line {number}" if start == 0 else f", byte {position}"
        line = _limited(file.readline(LONGEST + 1), place)
        if not line:
            return
        if position == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield file.tell(), place, _parse(line, place, column) if line.strip() else None


def _parse(line: bytes, place: str, column: str) -> object:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise _Bad(f"{place}: not JSON in UTF-8, or nested too deep") from None
    return _field(record, column, place)


def _read_json(file: BinaryIO, column: str, start: int) -> Found:
    """A list of records, one record, or a record a line as in .jsonl."""
    first = file.readline(LONGEST + 1).removeprefix(codecs.BOM_UTF8)
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(first), dict):
            yield from _read_jsonl(file, column, start)
            return
    file.seek(0)
    try:
        records = json.loads(_limited(file.read(LONGEST + 1)).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise _Bad(": not JSON in UTF-8, or nested too deep") from None
    for number, record in enumerate(records if isinstance(records, list) else [records]):
        if number >= start:
            place = f", record {number + 1}"
            yield number + 1, place, _field(record, column, place)


def _read_csv(file: BinaryIO, column: str, start: int) -> Found:
    csv.field_size_limit(LONGEST)
    rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
    try:
        if column not in (rows.fieldnames or ()):
            raise _Bad(f": no column named {column!r}; it has {', '.join(rows.fieldnames or ())}")
        for number, row in enumerate(rows):
            if number >= start:
                yield number + 1, f", line {rows.line_num}", row[column]
    except csv.Error as error:
        raise _Bad(f", line {rows.line_num}: {error}") from None


def _read_parquet(file: BinaryIO, column: str, start: int) -> Found:
    """Batches are bounded by bytes: no row of a group takes more than all of its pages do, however
    often one of them stands there."""
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise _Bad(f": no column named {column!r}; it has {names}")
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group)
            if row + rows.num_rows <= start:
                row += rows.num_rows
                continue
            at_once = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, _text_bytes(rows, column))))
            for batch in table.iter_batches(at_once, [group], [column], use_threads=False):
                for text in batch[column]:
                    row += 1
                    if row > start:
                        yield row, f", row {row}", text.as_py()
    except _Bad:
        raise
    except MemoryError:
        raise _Bad(f", row {row + 1}: takes more memory than there is; split the text") from None
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise _Bad(f": not a parquet file or damaged, row {row + 1}: {error}") from None


def _text_bytes(group: pyarrow.parquet.RowGroupMetaData, column: str) -> int:
    columns = map(group.column, range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)


READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
