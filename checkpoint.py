"""Checkpoints: folders of safetensors files and a manifest that is written last.

`checkpoint_{step}.mdl/manifest.json` names every tensor with its shape and the parts of it in the
files, every file with its size and SHA-256, the step, the configuration and the tokenizer. A folder
is written under another name and renamed when it is whole, and renamed before it is deleted: one of
this name is always whole. Nothing that is read can run code.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
UNFINISHED = (".writing", ".deleting")


def checkpoint_path(out_dir: Path, step: int) -> Path:
    return out_dir / f"checkpoint_{step}.mdl"


def find_checkpoints(out_dir: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, oldest first."""
    found = {}
    for path in out_dir.glob("checkpoint_*.mdl"):
        match = re.fullmatch(r"checkpoint_(\d+)\.mdl", path.name)
        if match and (path / MANIFEST).is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


@contextmanager
def lock(out_dir: Path) -> Iterator[None]:
    """Keeps other runs out of the folder; the system lets go of it when the process ends."""
    with open(out_dir / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{out_dir} is in use by process {file.read()}; take another --out_dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def remove_unfinished(out_dir: Path) -> None:
    """What a killed run left half-written or half-deleted."""
    for suffix in UNFINISHED:
        for path in out_dir.glob(f"checkpoint_*.mdl{suffix}"):
            shutil.rmtree(path)


def save(
    out_dir: Path,
    state: Iterable[tuple[str, dict[str, Tensor]]],
    progress: dict,
    config: dict,
    keep: int | None,
) -> Path:
    """Writes a checkpoint and deletes all but the newest `keep`.

    progress: step, updates (steps that changed the weights) and train_tokens (in the dataset).
    state: (name of a file, its tensors by name), emptied once they are written. The tokenizer
    of config["dataset"] is carried along. A checkpoint that is already there is left as it is.
    Raises UserError or OSError when it can't be written; then no folder has its name.
    """
    path = checkpoint_path(out_dir, progress["step"])
    if (path / MANIFEST).is_file():
        return path
    if path.exists():
        _delete(path)  # not ours, or not whole: only whole ones are given the name
    writing = path.with_name(path.name + UNFINISHED[0])
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    files, tensors = {}, {}
    try:
        for group, members in state:
            name = f"{group}.safetensors"
            save_file({k: tensor.contiguous() for k, tensor in members.items()}, writing / name)
            files[name] = _describe(writing / name)
            for key, tensor in members.items():
                tensors[key] = {
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "parts": [{"file": name, "rows": [0, tensor.shape[0]]}],
                }
            members.clear()  # frees them before the next are made, whoever passed them on
            del tensor
        tokenizer = Path(config["dataset"]) / TOKENIZER
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, writing / TOKENIZER)
            files[TOKENIZER] = _describe(writing / TOKENIZER)
        manifest = {"format": FORMAT, **progress, "config": config}
        manifest |= {"files": files, "tensors": tensors}
        (writing / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in [*files, MANIFEST]:
            _sync(writing / name)
        _sync(writing)
        writing.rename(path)
        _sync(out_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written ({error}); free some space: the checkpoints before it "
            f"are whole, and --checkpoint_path latest goes on from the newest"
        ) from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)  # not there any more when all went well
    prune(out_dir, keep)
    return path


def _describe(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(out_dir: Path, keep: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for path in list(find_checkpoints(out_dir).values())[: -keep if keep else 0]:
        _delete(path)


def _delete(path: Path) -> None:
    deleting = path.with_name(path.name + UNFINISHED[1])
    path.rename(deleting)
    shutil.rmtree(deleting)


class Checkpoint:
    """A whole checkpoint, read by tensor.

    Raises UserError where it is missing, not a checkpoint, incomplete or changed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path}: there is no such checkpoint")
        if not (self.path / MANIFEST).is_file():
            raise UserError(f"{self.path} is not a checkpoint of gigaGPT: it has no {MANIFEST}")
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise UserError(f"{self.path} has format {manifest['format']}, not {FORMAT}")
            self.step, self.updates = int(manifest["step"]), int(manifest["updates"])
            self.train_tokens = int(manifest["train_tokens"])
            self.config, self.files = dict(manifest["config"]), dict(manifest["files"])
            self.tensors = dict(manifest["tensors"])
            for name, entry in self.files.items():
                self._check_size(name, entry["bytes"])
            for name, entry in self.tensors.items():
                self._check_cover(name, entry)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(f"{MANIFEST} can't be understood") from None
        self._verified: set[str] = set()

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is damaged: {what}; delete it to go on from the one before")

    def _check_size(self, name: str, size: int) -> None:
        if Path(name).name != name:
            raise self._damaged(f"file name {name!r}")
        file = self.path / name
        if not file.is_file():
            raise self._damaged(f"{name} is missing")
        if file.stat().st_size != size:
            raise self._damaged(f"{name} has {file.stat().st_size:,} bytes, not {size:,}")

    def _check_cover(self, name: str, entry: dict) -> None:
        """Every row of every tensor must be held exactly once."""
        row = 0
        for part in sorted(entry["parts"], key=lambda part: part["rows"]):
            if part["file"] not in self.files or part["rows"][0] != row:
                raise self._damaged(f"rows from {row} of {name} are not held exactly once")
            row = part["rows"][1]
        if row != entry["shape"][0]:
            raise self._damaged(f"rows from {row} of {name} are missing")

    def _open(self, name: str):
        """The tensors of a file whose checksum was found right."""
        if name not in self._verified:
            if _describe(self.path / name)["sha256"] != self.files[name]["sha256"]:
                raise self._damaged(f"{name} was changed (its checksum differs)")
            self._verified.add(name)
        return safe_open(self.path / name, framework="pt")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        if name not in self.tensors:
            raise UserError(f"{self.path} holds no {name}: it is of another model")
        entry, rows = self.tensors[name], []
        try:
            for part in sorted(entry["parts"], key=lambda part: part["rows"]):
                with self._open(part["file"]) as file:
                    rows.append(file.get_tensor(name))
        except SafetensorError as error:
            raise self._damaged(str(error)) from None
        tensor = rows[0] if len(rows) == 1 else torch.cat(rows)
        if list(tensor.shape) != entry["shape"]:
            raise self._damaged(f"{name} has shape {list(tensor.shape)}, not {entry['shape']}")
        return tensor

    @property
    def tokenizer(self) -> Path | None:
        """The file of its tokenizer, unless the model was trained without one."""
        return self.path / TOKENIZER if TOKENIZER in self.files else None
