"""Files that are complete or not there, and JSON that carries a checksum of itself."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.console import UserError, short

END = ',\n "sha256": "%s"\n}\n'
SIZE = len(END % ("0" * 64))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which replaces `path` at the end; after an error `path` is unchanged.
    Raises UserError, which names it, where it can't be written."""
    writing = path.with_name(path.name + ".writing")
    try:
        yield writing
        os.replace(writing, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error})") from None
    finally:
        writing.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds an exclusive lock of a file or folder, which ends with the process at the latest.
    Raises BlockingIOError if another process has it, unless told to wait."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sealed(path: Path, content: dict) -> None:
    """Writes JSON that ends in the SHA-256 of all before it. It finds accidents: whoever changes a
    file on purpose can seal it again."""
    body = json.dumps(content, indent=1).removesuffix("\n}")
    path.write_text(body + END % hashlib.sha256(body.encode()).hexdigest(), encoding="utf-8")


def read_sealed(path: Path) -> dict:
    """Returns what was written there, without the checksum. Raises ValueError where anything was
    changed, or where it is not JSON of this program."""
    raw = path.read_bytes()
    body = raw[:-SIZE]
    end = raw[-SIZE:]
    if end != (END % hashlib.sha256(body).hexdigest()).encode():
        raise ValueError("it was changed (its checksum differs)")
    try:
        content = json.loads(raw)
        del content["sha256"]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError("it is not JSON of this program") from None
    return content


def checked_count(value: object) -> int:
    """A count from JSON; ValueError where it is none that a file could hold."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{short(value)} is not a count")
    return value
