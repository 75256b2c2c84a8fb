"""Checkpoints: folders of safetensors files and a manifest that is written last.

`checkpoint_{step}.mdl/manifest.json` names every tensor with its shape and the parts of it in the
files, every file with its size and SHA-256, the step, the configuration and the tokenizer, and ends
in a checksum of itself. A folder is written under another name and renamed when it is complete, and
renamed before it is deleted: one of this name is always complete. Nothing that is read can run
code, leave the folder, or use more memory than its file has bytes.

    python -m runtime.checkpoint verify DIR

checks every byte of a checkpoint, or of all in a folder.

Several processes write one together, each its own rows. `group` is their Group
(runtime/distributed.py).
"""

import ast
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path

import torch
from jsonargparse import auto_cli
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from configuration import MODEL_KEYS, Configuration
from model import GPT, GPTConfig
from runtime.arguments import make_configuration
from runtime.console import UserError, command, short, warn
from runtime.files import (
    Changed,
    count_of,
    follow_umask,
    locked,
    read_sealed,
    sync,
    write_sealed,
)

FORMAT = 4
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
LOCK = "lock"
UNFINISHED = (".writing", ".deleting")
KINDS = ("", "exp_avg.", "exp_avg_sq.")  # prefixes of the names of weights and of Adam's moments


def model_code(folder: Path) -> str:
    """A digest of the code that computes the model, without comments and layout."""
    files = (folder / name for name in ("model.py", "loss.py"))
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return hashlib.sha256("".join(map(ast.unparse, trees)).encode()).hexdigest()


# At the start: the files may be edited while this process runs
MODEL_CODE = model_code(Path(__file__).parents[1])


def checkpoint_path(out_dir: Path, step: int) -> Path:
    return out_dir / f"checkpoint_{step}.mdl"


def find_checkpoints(out_dir: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, oldest first."""
    paths = out_dir.glob("checkpoint_*.mdl")
    found = {step_of(path): path for path in paths if (path / MANIFEST).is_file()}
    found.pop(None, None)
    return dict(sorted(found.items()))


def newest(name: str, out_dir: Path) -> Path | None:
    """The checkpoint with this path, the newest of the run in this folder, or for `latest` the
    newest in out_dir; None where that has none."""
    found = find_checkpoints(out_dir if name == "latest" else Path(name))
    if found:
        return found[max(found)]
    return None if name == "latest" else Path(name)


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name, or None."""
    match = re.fullmatch(r"checkpoint_(\d{1,18})\.mdl", path.name)
    return int(match[1]) if match else None


@contextmanager
def claim(out_dir: Path, group) -> Iterator[None]:
    """Creates the folder if needed, locks it against other runs, and removes what a killed run left
    unfinished. It must be the same folder for every process."""
    with ExitStack() as stack:
        with group.shared_errors():
            if group.rank == 0:
                out_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_owned(out_dir / LOCK))
                remove_unfinished(out_dir)
        owner = (out_dir / LOCK).read_text() if (out_dir / LOCK).is_file() else None
        first = group.gather(owner)[0]
        with group.shared_errors():
            if owner != first:
                raise UserError(
                    f"out_dir: {out_dir} is not the folder that rank 0 has by this name; use one "
                    f"that all share"
                )
        yield


@contextmanager
def _owned(path: Path) -> Iterator[None]:
    """Locks a file, which then holds our process id and a number that no other run has."""
    path.touch()
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except BlockingIOError:
            owner = path.read_text().partition(" ")[0]
            raise UserError(
                f"{path.parent} is in use by process {owner}; use another --out_dir"
            ) from None
        path.write_text(f"{os.getpid()} {uuid.uuid4()}")
        sync(path)  # for the other processes
        yield


def remove_unfinished(out_dir: Path) -> None:
    """Removes what a killed run left half-written or half-deleted."""
    for suffix in UNFINISHED:
        for path in out_dir.glob(f"checkpoint_*.mdl{suffix}"):
            shutil.rmtree(path)


def save(
    out_dir: Path,
    state: Iterable[tuple[str, dict[str, Tensor]]],
    manifest: dict,
    keep: int | None,
    group,
    tokenizer: bytes | None = None,
) -> Path:
    """Writes a checkpoint and deletes all but the newest `keep`; returns its path.

    state: (name of a file, its tensors by name), emptied once they are written; of a tensor that
    several processes have, each gives the rows that follow those of the rank before it.
    manifest: step, optimizer_steps (applied ones), tokens (seen so far), recent (losses and norms
    of the last steps, to detect spikes), train_digest (of train.bin) and config.
    tokenizer: the content of tokenizer.json, if there is one. A checkpoint that exists is kept as
    it is. Raises UserError when it can't be written; then no folder has its name.
    """
    path, first = checkpoint_path(out_dir, manifest["step"]), group.rank == 0
    writing = path.with_name(path.name + UNFINISHED[0])
    with group.shared_errors():
        exists = (path / MANIFEST).is_file()
        if first and not exists:
            if os.path.lexists(path):
                _delete(path)  # not ours, or incomplete: only complete ones are given the name
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
    if group.gather(exists)[0]:
        return path
    try:
        with group.shared_errors(), _write_errors(path):
            written = [_write(writing, name, members) for name, members in state]
        gathered = group.gather(written)
        with group.shared_errors(), _write_errors(path):
            if first:
                manifest = {"format": FORMAT, "model_code": MODEL_CODE, **manifest}
                parts = [part for rank in gathered for part in rank]
                _finish(path, writing, manifest, parts, tokenizer)
    finally:
        if first:
            shutil.rmtree(writing, ignore_errors=True)  # gone if all went well
    with group.shared_errors():
        if first:
            prune(out_dir, keep)
    return path


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from None


def write_error(path: Path, reason: object) -> UserError:
    return UserError(
        f"{path} could not be written ({reason}); free some space and resume with "
        f"--checkpoint_path latest: earlier checkpoints are complete"
    )


def _write(folder: Path, name: str, members: dict[str, Tensor]) -> tuple[str, dict, dict]:
    """Writes a file; returns its name, size and digest, and the dtype and shape of its tensors."""
    file = f"{name}.safetensors"
    save_file({k: tensor.contiguous() for k, tensor in members.items()}, folder / file)
    follow_umask(folder / file)
    kinds = {k: (str(t.dtype).removeprefix("torch."), list(t.shape)) for k, t in members.items()}
    members.clear()  # frees them before the next are made
    sync(folder / file)
    return file, _describe(folder / file), kinds


def _finish(
    path: Path, writing: Path, manifest: dict, written: list[tuple], tokenizer: bytes | None
) -> None:
    """Writes the manifest beside the files, and gives the folder its name."""
    files, tensors = {}, {}
    for name, description, kinds in written:
        files[name] = description
        for key, (dtype, shape) in kinds.items():
            entry = tensors.setdefault(key, {"dtype": dtype, "shape": [0, *shape[1:]], "parts": []})
            if shape[0]:
                rows = [entry["shape"][0], entry["shape"][0] + shape[0]]
                entry["parts"].append({"file": name, "rows": rows})
                entry["shape"][0] = rows[1]
    if tokenizer is not None:
        (writing / TOKENIZER).write_bytes(tokenizer)
        files[TOKENIZER] = _describe(writing / TOKENIZER)
        sync(writing / TOKENIZER)
    write_sealed(writing / MANIFEST, manifest | {"files": files, "tensors": tensors})
    sync(writing / MANIFEST)
    sync(writing)
    writing.rename(path)
    sync(path.parent)


def _describe(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def prune(out_dir: Path, keep: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for path in list(find_checkpoints(out_dir).values())[: -keep if keep else 0]:
        _delete(path)


def _delete(path: Path) -> None:
    if path.is_symlink():  # what was moved to another disk stays there
        path.unlink()
        return
    deleting = path.with_name(path.name + UNFINISHED[1])
    path.rename(deleting)
    shutil.rmtree(deleting)


class Checkpoint:
    """A complete checkpoint, read by tensor. Raises UserError where it is missing, not a
    checkpoint, incomplete or changed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path}: there is no such checkpoint")
        if not (self.path / MANIFEST).is_file():
            raise UserError(f"{self.path} is not a checkpoint of gigaGPT: it has no {MANIFEST}")
        try:
            self._read_manifest(read_sealed(self.path / MANIFEST))
        except OSError as error:
            raise self._unreadable(error) from None
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise self._damaged(f"{MANIFEST}: {error}", isinstance(error, Changed)) from None
        if step_of(self.path) not in (None, self.step):
            raise self._damaged(f"it is from step {self.step}, and was renamed")
        self._verified: set[str] = set()
        if TOKENIZER in self.files:  # small, and not every command reads it
            self._verify(TOKENIZER)

    def _read_manifest(self, manifest: dict) -> None:
        if manifest["format"] != FORMAT:
            found = short(manifest["format"])
            raise UserError(f"{self.path} has format {found}; this program reads {FORMAT}")
        self.step, self.tokens = count_of(manifest["step"]), count_of(manifest["tokens"])
        self.optimizer_steps = count_of(manifest["optimizer_steps"])
        self.train_digest, self.model_code = manifest["train_digest"], manifest["model_code"]
        self.recent = [(float(loss), float(norm)) for loss, norm in manifest["recent"]]
        values = dict(manifest["config"])
        cluster = dict(values.pop("cluster", {}))
        values |= {f"cluster.{key}": value for key, value in cluster.items()}
        self.config: Configuration = make_configuration(values)
        self.files, self.tensors = dict(manifest["files"]), dict(manifest["tensors"])
        for name, entry in self.files.items():
            self._check_file(name, count_of(entry["bytes"]), str(entry["sha256"]))
        room = {name: entry["bytes"] for name, entry in self.files.items()}
        for name, entry in self.tensors.items():
            self._check_tensor(name, entry, room)

    def verify(self, rank: int, size: int) -> None:
        """Checks every size-th file from the rank-th on, so that all processes together check all
        of them."""
        for name in list(self.files)[rank::size]:
            self._verify(name)
        self._verified = set(self.files)

    def _damaged(self, what: str, changed: bool = False) -> UserError:
        """changed: a checksum differs, so that the checkpoint is lost."""
        if not self.path.exists():
            return UserError(
                f"{self.path} was deleted while it was read, maybe by a run with keep_checkpoints; "
                f"use --checkpoint_path latest"
            )
        what = what[:500]  # names are as long as who wrote the manifest wants
        cure = "delete it to resume from the one before" if changed else "copy it again, if you can"
        return UserError(f"{self.path} is damaged: {what}; {cure}")

    def _unreadable(self, error: OSError) -> UserError:
        """A file could not be read, which may still be undamaged."""
        if isinstance(error, FileNotFoundError):
            return self._damaged(f"{Path(error.filename or '').name} is missing")
        file = error.filename or self.path
        return UserError(f"{file} can't be read ({error.strerror or error}); try again")

    def _check_file(self, name: str, size: int, sha256: str) -> None:
        file = self.path / name
        if Path(name).name != name or name == ".." or file.is_symlink():
            raise self._damaged(f"file name {short(name)} is not in the folder")
        if not file.is_file():
            raise self._damaged(f"{name} is missing")
        if file.stat().st_size != size:
            raise self._damaged(f"{name} has {file.stat().st_size:,} bytes, not {size:,}")

    def _check_tensor(self, name: str, entry: dict, room: dict[str, int]) -> None:
        """Every row must be stored exactly once, in a file large enough for it; `room` is what is
        left of each file."""
        shape, row = [count_of(size) for size in entry["shape"]], 0
        if entry["dtype"] != "float32":
            raise self._damaged(f"{name} is of {short(entry['dtype'])}")
        if not 1 <= len(shape) <= 8 or 0 in shape:
            raise self._damaged(f"{name} has shape {short(shape)}")
        for part in sorted(entry["parts"], key=lambda part: part["rows"]):
            first, last = map(count_of, part["rows"])
            if part["file"] not in self.files or first != row or last <= first:
                raise self._damaged(f"rows from {row} of {name} are not stored exactly once")
            row = last
            room[part["file"]] -= 4 * (last - first) * prod(shape[1:])
            if room[part["file"]] < 0:
                raise self._damaged(f"{part['file']} is too small for {name}")
        if row != shape[0]:
            raise self._damaged(f"rows from {row} of {name} are missing")

    def _verify(self, name: str) -> None:
        try:
            found = _describe(self.path / name)["sha256"]
        except OSError as error:
            raise self._unreadable(error) from None
        if found != self.files[name]["sha256"]:
            raise self._damaged(f"{name} was changed (its checksum differs)", changed=True)
        self._verified.add(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor on the CPU, or some of its rows."""
        if name not in self.tensors:
            raise UserError(f"{self.path} has no {name}: it belongs to another model")
        entry, pieces = self.tensors[name], []
        begin, end = (rows.start, rows.stop) if rows else (0, entry["shape"][0])
        for part in sorted(entry["parts"], key=lambda part: part["rows"]):
            low, high = max(begin, part["rows"][0]), min(end, part["rows"][1])
            if low < high:
                pieces.append(self._read_rows(part, name, low, high))
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces) if pieces else torch.empty(0, *entry["shape"][1:])

    def _read_rows(self, part: dict, name: str, low: int, high: int) -> Tensor:
        first, last = part["rows"]
        if part["file"] not in self._verified:
            self._verify(part["file"])
        try:
            with safe_open(self.path / part["file"], framework="pt") as file:
                whole = file.get_slice(name)
                found, shape = whole.get_shape(), self.tensors[name]["shape"]
                if found != [last - first, *shape[1:]] or whole.get_dtype() != "F32":
                    raise self._damaged(
                        f"{name} is {whole.get_dtype()} of shape {found} in {part['file']}"
                    )
                return whole[low - first : high - first]
        except OSError as error:
            raise self._unreadable(error) from None
        except SafetensorError as error:
            raise self._damaged(f"{part['file']}: {error}") from None

    @property
    def tokenizer(self) -> Path | None:
        """The file of its tokenizer, unless the model was trained without one."""
        return self.path / TOKENIZER if TOKENIZER in self.files else None

    @property
    def weights(self) -> list[str]:
        """Names of the weights."""
        return [name for name in self.tensors if not name.startswith(KINDS[1:])]

    def check_model(self) -> GPTConfig:
        """The shape of the model, which every tensor must match. Logs if the code of the model has
        changed since the checkpoint was saved."""
        if self.model_code != MODEL_CODE:
            warn(f"model.py or loss.py has changed since {self.path} was saved")
        config = GPTConfig(**{key: getattr(self.config, key) for key in MODEL_KEYS})
        numbers = sum(entry["bytes"] for entry in self.files.values()) // 4
        rows = max(4 * config.width, config.vocab_size, config.max_position_embeddings)
        if config.depth > len(self.tensors) or rows * config.width > numbers:  # too large to build
            raise UserError(f"{self.path}: its model is smaller than its configuration says")
        with torch.device("meta"):
            model = GPT(config)
        for name, parameter in model.named_parameters():
            for kind in KINDS:
                found = self.tensors.get(kind + name, {}).get("shape")
                if found != list(parameter.shape):
                    raise UserError(
                        f"{self.path}: {kind}{name} has shape {found}, the model in model.py "
                        f"{list(parameter.shape)}"
                    )
        return config


def open_newest(name: str, out_dir: Path = Path("model_dir")) -> Checkpoint:
    """The checkpoint of this name (see `newest`). Raises UserError where there is none."""
    if (path := newest(name, out_dir)) is None:
        raise UserError(f"{out_dir} has no checkpoint; use the --out_dir of a run")
    return Checkpoint(path)


def verify(folder: Path) -> int:
    """Check every byte of a checkpoint, or of all in a folder; status 1 if one is damaged.

    Args:
        folder: a checkpoint, or the out_dir of a run
    """
    paths = [path for path in folder.glob("checkpoint_*.mdl") if step_of(path) is not None]
    if (folder / MANIFEST).is_file() or not paths:
        paths = [folder]
    status = 0
    for path in sorted(paths, key=lambda path: (step_of(path) or 0, path)):
        try:
            checkpoint = Checkpoint(path)
            for name in tqdm(checkpoint.files, path.name, unit="file", leave=False, disable=None):
                checkpoint._verify(name)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
        else:
            size = sum(entry["bytes"] for entry in checkpoint.files.values())
            print(f"{path} is complete: {len(checkpoint.files)} files, {size / 1e9:,.3f} GB")
    return status


if __name__ == "__main__":
    command(lambda: auto_cli({"verify": verify}, exit_on_error=False))
