"""Encode the documents of a dataset in several processes and put it into its folder.

Until it is complete it is made in the folder `unfinished` in its own: job.json says of what, and
shard-00000.json that train-00000.bin and val-00000.bin are complete. The same command leaves these
out when it is run again. meta.json is the last file that gets to its place.
"""

import errno
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, count, islice, takewhile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from common.console import UserError, log, track
from common.files import locked, read_sealed, replacing, sync, write_sealed
from common.tokens import find_shards, shard_names, write_checksums, write_meta
from data.pieces import BYTES_A_TOKEN, State
from data.vocabularies import Vocabulary
from weights.hub import reading

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # on the disk, for the user, in a file
SPLITS = ("train", "val")
KEPT = ("shard-*.json", "text-*.parquet", "vocabulary.json")  # what is worth resuming from

# Documents are encoded in pieces, because an encoding takes about a hundred bytes a token. A
# space or newline after something else always starts a new GPT-2 word, so pieces that are cut
# there have the tokens of the whole. Other tokenizers may have other words.
PIECE = re.compile(r"(?:.{1,16384}|.+?)(?:\Z|(?<=\S)(?=[ \n]))", re.DOTALL)
PIECES_AT_ONCE = 128


@dataclass
class Given:
    """The documents of a shard, (split, text), that are in memory already."""

    documents: list[tuple[str, str]]
    after: State

    def texts(self) -> list[tuple[str, str]]:
        return self.documents


def write(
    folder: Path, documents: list[tuple[str, str]], vocabulary: Vocabulary, source: str
) -> None:
    """Make a dataset of a few documents, (split, text), in the place of one that is there."""
    after = State(text=sum(len(text.encode()) for _, text in documents), end=True)
    with building(folder, job_of([], vocabulary, source=source)) as work:
        encode(work, [(0, Given(documents, after))], vocabulary, 1, after.text)
        publish(folder, work, vocabulary, source)


def job_of(files: list[str], vocabulary: Vocabulary | None, **options: str | int | None) -> dict:
    """Return what decides the content of a dataset: its files, tokenizer and the options."""
    found = [(os.path.abspath(file), os.stat(file)) for file in files]
    found = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    options |= {"files": hashlib.sha256(repr(found).encode()).hexdigest()}
    return options | {"content of the tokenizer": vocabulary and vocabulary.sha256}


@contextmanager
def building(folder: Path, job: dict) -> Iterator[Path]:
    """The folder inside `folder` where it is made, with what the same job left there. Nothing else
    is changed in `folder`. Raises UserError where another job or process makes it."""
    work, shown = folder / "unfinished", os.path.relpath(folder)
    made = not folder.exists()
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(work))
        except BlockingIOError:
            raise UserError(f"{shown} is being prepared by another process") from None
        try:
            _begin_job(work, job)
            yield work
        except Exception as error:
            cause: BaseException | None = error  # `datasets` may fail once more, at its end
            while cause and getattr(cause, "errno", None) not in NO_SPACE:
                cause = cause.__context__
            if cause is None:
                raise
            raise UserError(
                f"{shown} could not be written ({os.strerror(cause.errno)}); free some space, or "
                f"make the folder a link to another disk, and run the same command again to resume"
            ) from None
        finally:
            if not any(any(work.glob(kept)) for kept in KEPT):
                shutil.rmtree(work, ignore_errors=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def _begin_job(work: Path, job: dict) -> None:
    """Write the job into `work`, or compare it with the one that left something there."""
    path = work / "job.json"
    if not path.exists():  # what is there was begun or removed in part
        for left in work.iterdir():
            left.unlink()
        write_json(path, job)
        return
    try:
        before = read_sealed(path)
    except ValueError as error:
        raise UserError(f"{os.path.relpath(path)}: {error}; delete its folder") from None
    for key in job:
        if job[key] != before.get(key):
            raise UserError(
                f"{os.path.relpath(work)} was begun by another command (other {key}): run that one "
                f"again to complete it, or delete the folder"
            )


def known(work: Path, number: int) -> dict | None:
    """Return what is known of a shard that is complete, else None."""
    with suppress(FileNotFoundError, ValueError):
        return read_sealed(work / f"shard-{number:05}.json")
    return None


def encode(
    work: Path, pieces: Iterable[tuple], vocabulary: Vocabulary, num_proc: int, expected: int
) -> None:
    """Make the shards of pieces, (number, documents), in `num_proc` processes. `expected` is about
    how many bytes of text there are, for the time that is left."""
    pieces = iter(pieces)
    first = list(islice(pieces, num_proc))  # no more processes than shards
    if not first:
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes work side by side instead
    context = multiprocessing.get_context("fork")
    waiting: set[Future] = set()
    with (
        _Bar(work, vocabulary.dtype.itemsize) as bar,
        ProcessPoolExecutor(len(first), context, _begin, (work, vocabulary)) as pool,
    ):
        try:
            for number, piece in chain(first, pieces):
                waiting.add(pool.submit(_encode_shard, number, piece))
                bar.text = max(bar.text, piece.after.text)
                waiting = bar.wait(waiting, 0, expected)
            while waiting:
                waiting = bar.wait(waiting, 0.5)
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                log("run the same command again to resume")
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a process was killed, perhaps as the memory was full: run the same command "
                    "again, with a lower --num_proc"
                ) from None
            raise


class _Bar:
    """Shows the tokens in the files that are being written, and the time that is left for `text`
    bytes of text, if these give as many tokens as those of the shards that are complete."""

    def __init__(self, work: Path, itemsize: int):
        self.work, self.itemsize = work, itemsize
        numbers = (int(path.stem.split("-")[1]) for path in work.glob("shard-*.json"))
        shards = [shard for number in numbers if (shard := known(work, number))]
        if shards:
            log(f"resuming: {len(shards):,} shards are complete")
        self.text = max((shard["after"]["text"] for shard in shards), default=0)
        self.complete = [sum(sum(s[key].values()) for s in shards) for key in ("tokens", "bytes")]
        self.bar = track((), "encoding", " tokens")
        self.bar.unit_scale = True
        self.bar.n = self.bar.initial = self.complete[0]

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def wait(self, waiting: set[Future], seconds: float, expected: int = 0) -> set[Future]:
        """Wait for a shard, at most so long, and return those that are not complete."""
        done, waiting = wait(waiting, seconds, FIRST_COMPLETED)
        for shard in done:
            self.complete = [a + b for a, b in zip(self.complete, shard.result(), strict=True)]
        tokens, size = self.complete
        files = (path for kind in ("train-*.bin", "val-*.part") for path in self.work.glob(kind))
        written = sum(path.stat().st_size for path in files) // self.itemsize
        rate = tokens / size if size else 1 / BYTES_A_TOKEN
        self.bar.total = max(written, round(max(self.text, expected) * rate))
        self.bar.update(written - self.bar.n)
        return waiting


def _begin(work: Path, vocabulary: Vocabulary) -> None:
    """Make what `_encode_shard` uses, once a process."""
    global WORKER, ENCODER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = Tokenizer.from_str(vocabulary.tokenizer.to_str())
    end = tokenizer.encode(vocabulary.end, add_special_tokens=False).ids
    begin = [token for token in tokenizer.encode("").ids if token not in end]
    # in a document a special token's text is text; a tokenizer.json does not keep this setting
    tokenizer.encode_special_tokens = True
    begin, end = (np.array(ids, vocabulary.dtype) for ids in (begin, end))
    ENCODER = (tokenizer, begin, end, vocabulary.by_words, vocabulary.dtype)
    WORKER = (work, vocabulary.end_bytes)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_shard(number: int, piece) -> tuple[int, int]:
    """Write the token files of a shard, and last the file that says so. Return how many tokens and
    bytes of text it has."""
    work, end_bytes = WORKER
    paths = {"train": work / f"train-{number:05}.bin", "val": work / f"val-{number:05}.part"}
    shard = {key: dict.fromkeys(SPLITS, 0) for key in ("documents", "tokens", "bytes")}
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(path, "wb")) for split, path in paths.items()}
        for split, text in piece.texts():
            ids = _encode(text)
            files[split].write(ids.tobytes())
            shard["documents"][split] += 1
            shard["tokens"][split] += len(ids)
            shard["bytes"][split] += len(text.encode()) + end_bytes
    shard["checksum"] = write_checksums(paths["train"])  # of train: val's are joined at the end
    for path in (*paths.values(), paths["train"].with_suffix(".crc")):
        sync(path)
    write_json(work / f"shard-{number:05}.json", shard | {"after": asdict(piece.after)})
    return sum(shard["tokens"].values()), sum(shard["bytes"].values())


def write_json(path: Path, content: dict) -> None:
    """Write JSON that is complete or not there, also after a power failure."""
    with replacing(path) as writing:
        write_sealed(writing, content)
        sync(writing)
    sync(path.parent)


def _encode(text: str) -> np.ndarray:
    """The token ids of a document."""
    tokenizer, begin, end, by_words, dtype = ENCODER
    parts = PIECE.findall(text) if by_words else [text]
    ids = [begin]
    for start in range(0, len(parts), PIECES_AT_ONCE):
        some = parts[start : start + PIECES_AT_ONCE]
        with reading("the tokenizer can't encode the documents"):
            encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        ids += [np.array(encoding.ids, dtype) for encoding in encodings]
    return np.concatenate([*ids, end])


def publish(folder: Path, work: Path, vocabulary: Vocabulary, source: str) -> None:
    """Put the dataset into its folder, in the place of one that is there. Run again after any
    interruption, it does the rest."""
    shards = list(takewhile(bool, (known(work, number) for number in count())))
    sums = {
        key: {split: sum(shard[key][split] for shard in shards) for split in SPLITS}
        for key in ("documents", "tokens", "bytes")
    }
    if skipped := shards[-1]["after"]["skipped"]:
        print(f"skipped {skipped:,} empty lines, and empty or null texts")
    if min(sums["tokens"].values()) < 2:
        shutil.rmtree(work)
        raise UserError("the files hold no text to split; give at least one document")
    with open(work / "val.bin", "wb") as val:
        for number in range(len(shards)):
            with open(work / f"val-{number:05}.part", "rb") as part:
                shutil.copyfileobj(part, val)
    train = [[shard["tokens"]["train"], shard["checksum"]] for shard in shards]
    meta = describe(work, vocabulary, source)
    meta |= {"bytes": sums["bytes"], "documents": sums["documents"]}
    write_meta(work, meta, {"train": train})
    _move(folder, work, shard_names("train", len(shards)))
    for split, shown in (
        ("train", "train.bin" if len(shards) == 1 else "train-*.bin"),
        ("val", "val.bin"),
    ):
        path = os.path.relpath(folder / shown)
        print(f"{path}: {sums['tokens'][split]:,} tokens, {sums['bytes'][split]:,} bytes of text")
    print(f"{vocabulary.name}: a vocabulary of {vocabulary.size:,} tokens")
    place = os.path.relpath(folder)
    print(f"next: python train.py CONFIG --dataset {place} --vocab_size {vocabulary.size}")


def describe(folder: Path, vocabulary: Vocabulary, source: str) -> dict:
    """Write the tokenizer.json of a dataset, and return what meta.json says of it."""
    (folder / "tokenizer.json").write_bytes(vocabulary.tokenizer.to_str().encode())
    return {
        "tokenizer": vocabulary.name,
        "tokenizer_sha256": vocabulary.sha256,
        "vocab_size": vocabulary.size,
        "dtype": vocabulary.dtype.name,
        "bos_token": vocabulary.begin,
        "eos_token": vocabulary.end,
        "bytes": {},  # of UTF-8 text, for bits per byte
        "documents": {},
        "source": source,
    }


def _move(folder: Path, work: Path, names: list[str]) -> None:
    """Move the files that are not moved yet, meta.json last, and remove `work`."""
    (folder / "meta.json").unlink(missing_ok=True)
    moves = {f"train-{number:05}.bin": name for number, name in enumerate(names)}
    moves |= {"val.bin": "val.bin"}
    moves |= {
        Path(a).with_suffix(".crc").name: Path(b).with_suffix(".crc").name for a, b in moves.items()
    }
    for path in (path for split in SPLITS for path in find_shards(folder, split)):
        if path.name not in moves.values():  # of the dataset before
            path.unlink()
            path.with_suffix(".crc").unlink(missing_ok=True)
    for name in ("val.bin", "val.crc", "tokenizer.json", "meta.json"):
        sync(work / name)
    for before, after in (moves | {name: name for name in ("tokenizer.json", "meta.json")}).items():
        if (work / before).exists():
            os.replace(work / before, folder / after)
    sync(folder)
    (work / "job.json").unlink()  # so that what follows is removed, if this is killed here
    shutil.rmtree(work)
