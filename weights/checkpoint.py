"""Checkpoints: folders of safetensors files and a manifest that is written last.

`checkpoint_{step}.mdl/manifest.json` names every file with its size and SHA-256, the step, the
configuration and the tokenizer, and ends in a checksum of itself. What tensors there are, and their
shapes, the headers of the files say; a tensor that several processes share is in a file of each, in
the order of the manifest. A folder is written under another name and renamed when it is complete,
and renamed before it is deleted: one of this name that is not complete was changed by somebody
else. It is refused by name and never deleted. Nothing that is read can run code, leave the folder,
or use more memory than its file has bytes.

    python -m weights.checkpoint verify DIR

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
from functools import cached_property
from pathlib import Path

import torch
from jsonargparse import auto_cli
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from common.console import UserError, command, one_line, short, warn
from common.files import checked_count, locked, read_sealed, sync, write_sealed
from configuration import MODEL_KEYS, make_configuration
from model import GPT, GPTConfig

FORMAT = 6
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
LOCK = "lock"
UNFINISHED = (".writing", ".deleting")
ODD = (ValueError, LookupError, TypeError, AttributeError, OverflowError)  # of a manifest
KINDS = ("", "exp_avg.", "exp_avg_sq.")  # prefixes of the names of weights and of Adam's moments


def model_code(folder: Path) -> str:
    """A digest of the code that computes the model, without comments and layout."""
    files = (folder / name for name in ("model.py", "loss.py", "ops.py"))
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return hashlib.sha256("".join(map(ast.unparse, trees)).encode()).hexdigest()


# At the start: the files may be edited while this process runs
MODEL_CODE = model_code(Path(__file__).parents[1])


def checkpoint_path(out_dir: Path, step: int) -> Path:
    return out_dir / f"checkpoint_{step}.mdl"


def find_checkpoints(out_dir: Path) -> dict[int, Path]:
    """Returns what has the name of a checkpoint in a folder by step, oldest first, complete or
    not."""
    found = {step_of(path): path for path in out_dir.glob("checkpoint_*.mdl")}
    found.pop(None, None)
    return dict(sorted(found.items()))


def newest(name: str, out_dir: Path) -> Path | None:
    """Returns the checkpoint with this path, the newest of the run in this folder, or for `latest`
    the newest in out_dir; None where that has none."""
    found = find_checkpoints(out_dir if name == "latest" else Path(name))
    if found:
        return found[max(found)]
    return None if name == "latest" else Path(name)


def step_of(path: Path) -> int | None:
    """Returns the step in a checkpoint's name, or None."""
    match = re.fullmatch(r"checkpoint_(\d{1,18})\.mdl", path.name)
    return int(match[1]) if match else None


@contextmanager
def lock_out_dir(out_dir: Path, group) -> Iterator[None]:
    """Creates the folder if needed, locks it against other runs, and removes what a killed run left
    unfinished. It must be the same folder for every process."""
    path = out_dir / LOCK
    with ExitStack() as stack:
        if group.rank == 0:
            out_dir.mkdir(parents=True, exist_ok=True)
            path.touch()
            try:
                stack.enter_context(locked(path))
            except BlockingIOError:
                owner = path.read_text().partition(" ")[0]
                raise UserError(
                    f"{out_dir} is in use by process {owner}; use another --out_dir"
                ) from None
            path.write_text(f"{os.getpid()} {uuid.uuid4()}")
            sync(path)  # for the other processes
            for suffix in UNFINISHED:
                for unfinished in out_dir.glob(f"checkpoint_*.mdl{suffix}"):
                    shutil.rmtree(unfinished)
        group.barrier()
        owners = group.gather(path.read_text() if path.is_file() else None)
        for rank, owner in enumerate(owners):
            if owner != owners[0]:  # each says so: none is to wait for the others
                raise UserError(
                    f"out_dir: {out_dir} of rank {rank} is not the folder that rank 0 has by this "
                    f"name; use one that all share"
                )
        yield


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
    of the last steps, to detect spikes), train_digest (of train.bin), eos_token and config.
    tokenizer: the content of tokenizer.json, if there is one. What has its name already is renamed.
    Raises UserError when it can't be written; then no folder has its name.
    """
    path = checkpoint_path(out_dir, manifest["step"])
    writing = path.with_name(path.name + UNFINISHED[0])
    first = group.rank == 0
    if first:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    group.barrier()
    try:
        written = dict(_write(writing, name, tensors) for name, tensors in state)
        files = {name: entry for rank in group.gather(written) for name, entry in rank.items()}
        if first:
            manifest = {"format": FORMAT, "model_code": MODEL_CODE, **manifest}
            _finish(path, writing, manifest | {"files": files}, tokenizer)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from None
    finally:
        if first:
            shutil.rmtree(writing, ignore_errors=True)  # gone if all went well
    if first:
        prune(out_dir, keep)
    group.barrier()
    return path


def write_error(path: Path, reason: object) -> UserError:
    return UserError(
        f"{path} could not be written ({reason}); free some space and run again with "
        f"--checkpoint_path latest, which resumes from the newest checkpoint, if there is one"
    )


def _write(folder: Path, name: str, tensors: dict[str, Tensor]) -> tuple[str, dict]:
    """Writes a file; returns its name, and its size and digest."""
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    path.chmod(folder.stat().st_mode & 0o666)  # as other new files, where safetensors gives 0600
    tensors.clear()  # frees them before the next are made
    sync(path)
    return path.name, _describe(path)


def _finish(path: Path, writing: Path, manifest: dict, tokenizer: bytes | None) -> None:
    """Writes the manifest beside the files, and gives the folder its name."""
    if tokenizer is not None:
        (writing / TOKENIZER).write_bytes(tokenizer)
        sync(writing / TOKENIZER)
        manifest["files"][TOKENIZER] = _describe(writing / TOKENIZER)
    write_sealed(writing / MANIFEST, manifest)
    sync(writing / MANIFEST)
    sync(writing)
    if os.path.lexists(path):  # it came while the run went on, and somebody may need it
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
        path.rename(aside)
        warn(f"{path} was there already, and is now {aside.name}")
    writing.rename(path)
    sync(path.parent)


def _describe(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def prune(out_dir: Path, keep: int | None) -> None:
    """Deletes all but the newest `keep` of the complete checkpoints; None keeps all."""
    if keep is None:
        return
    complete = [path for path in find_checkpoints(out_dir).values() if is_complete(path)]
    for path in complete[:-keep]:
        if path.is_symlink():  # what was moved to another disk stays there
            path.unlink()
        else:
            deleting = path.with_name(path.name + UNFINISHED[1])
            shutil.rmtree(path.rename(deleting))


def is_complete(path: Path) -> bool:
    """Returns whether a checkpoint has all of its files, of the right sizes, and no others."""
    try:
        files = Checkpoint(path).files
    except UserError:
        return False
    return {MANIFEST, *files} == {file.name for file in path.iterdir()}


class Checkpoint:
    """A complete checkpoint, read by tensor. Raises UserError where it is missing, not a
    checkpoint, incomplete or changed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path}: there is no such checkpoint or run")
        if not (self.path / MANIFEST).is_file():
            if step_of(self.path) is not None:
                raise self._damaged(f"{MANIFEST} is missing")
            raise UserError(f"{self.path} is not a checkpoint, nor the out_dir of a run with one")
        try:
            with self._reading(MANIFEST):
                self._read_manifest(read_sealed(self.path / MANIFEST))
        except ODD as error:
            raise self._damaged(f"{MANIFEST}: {one_line(error)}") from None
        if step_of(self.path) not in (None, self.step):
            raise self._damaged(f"it is from step {self.step}, and was renamed")
        self._verified: set[str] = set()
        if TOKENIZER in self.files:  # small, and not every command reads it
            self._verify(TOKENIZER)

    def _read_manifest(self, manifest: dict) -> None:
        if manifest["format"] != FORMAT:
            found = short(manifest["format"])
            raise UserError(f"{self.path} has format {found}; this program reads {FORMAT}")
        self.step = checked_count(manifest["step"])
        self.tokens = checked_count(manifest["tokens"])
        self.optimizer_steps = checked_count(manifest["optimizer_steps"])
        self.recent = [(float(loss), float(norm)) for loss, norm in manifest["recent"]]
        self.train_digest = manifest["train_digest"]
        self.model_code = manifest["model_code"]
        try:
            self.config = make_configuration(manifest["config"])
        except UserError as error:
            raise self._damaged(f"{MANIFEST}: {error}") from None
        self.files = {}
        for name, entry in manifest["files"].items():
            self._check_file(name, checked_count(entry["bytes"]))
            self.files[name] = {"bytes": entry["bytes"], "sha256": entry["sha256"]}

    def verify(self, rank: int, size: int) -> None:
        """Checks every size-th file from the rank-th on, so that all processes together check all
        of them."""
        for name in list(self.files)[rank::size]:
            self._verify(name)
        self._verified = set(self.files)

    def _damaged(self, what: str) -> UserError:
        if not self.path.exists():
            return UserError(
                f"{self.path} was deleted while it was read, maybe by a run with keep_checkpoints; "
                f"use --checkpoint_path latest"
            )
        cure = "copy it again, or move it away to use the one before"
        # names are as long as who wrote the manifest wants
        return UserError(f"{self.path} is damaged: {what[:500]}; {cure}")

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        """Turns errors in a file into UserErrors. What can't be read may still be undamaged."""
        try:
            yield
        except FileNotFoundError:
            raise self._damaged(f"{file} is missing") from None
        except OSError as error:
            path = error.filename or self.path / file
            reason = error.strerror or error
            raise UserError(f"{path} can't be read ({reason}); try again") from None
        except SafetensorError as error:
            raise self._damaged(f"{file}: {error}") from None

    def _check_file(self, name: str, size: int) -> None:
        file = self.path / name
        if Path(name).name != name or name == ".." or file.is_symlink():
            raise self._damaged(f"file name {short(name)} is not in the folder")
        if not file.is_file():
            raise self._damaged(f"{name} is missing")
        if file.stat().st_size != size:
            raise self._damaged(f"{name} has {file.stat().st_size:,} bytes, not {size:,}")

    def _verify(self, name: str) -> None:
        """Compares a file with its checksum, once."""
        if name in self._verified:
            return
        with self._reading(name):
            found = _describe(self.path / name)["sha256"]
        if found != self.files[name]["sha256"]:
            raise self._damaged(f"{name} was changed (its checksum differs)")
        self._verified.add(name)

    @cached_property
    def tensors(self) -> dict[str, dict]:
        """Returns the shape of each tensor, and its parts: files in the order of their rows, with
        how many rows each has."""
        tensors = {}
        for file in self.files:
            if file == TOKENIZER:
                continue
            with self._reading(file), safe_open(self.path / file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    shape = part.get_shape()
                    entry = tensors.setdefault(name, {"shape": [0, *shape[1:]], "parts": []})
                    if part.get_dtype() != "F32" or not shape or shape[1:] != entry["shape"][1:]:
                        raise self._damaged(f"{name} is {part.get_dtype()} of {shape} in {file}")
                    entry["shape"][0] += shape[0]
                    entry["parts"].append((file, shape[0]))
        return tensors

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Returns a tensor on the CPU, or some of its rows."""
        if name not in self.tensors:
            raise UserError(f"{self.path} has no {name}: it belongs to another model")
        rows = rows or slice(0, sys.maxsize)
        pieces = []
        first = 0
        for file, count in self.tensors[name]["parts"]:
            low = max(rows.start - first, 0)
            high = min(rows.stop - first, count)
            if low < high:
                self._verify(file)
                with self._reading(file), safe_open(self.path / file, "pt") as opened:
                    pieces.append(opened.get_slice(name)[low:high])
            first += count
        if not pieces:
            return torch.empty(0, *self.tensors[name]["shape"][1:])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @property
    def tokenizer(self) -> Path | None:
        """Returns the file of its tokenizer, unless the model was trained without one."""
        return self.path / TOKENIZER if TOKENIZER in self.files else None

    @property
    def weights(self) -> list[str]:
        """Returns the names of the weights."""
        return [name for name in self.tensors if not name.startswith(KINDS[1:])]

    def check_model(self) -> GPTConfig:
        """Returns the shape of the model, which every tensor must match. Logs if the code of the
        model has changed since the checkpoint was saved."""
        if self.model_code != MODEL_CODE:
            warn(f"model.py, loss.py or ops.py has changed since {self.path} was saved")
        config = GPTConfig(**{key: getattr(self.config, key) for key in MODEL_KEYS})
        if config.depth > len(self.tensors):  # building it would take long
            raise UserError(f"{self.path}: its model is smaller than its configuration says")
        with torch.device("meta"):
            model = GPT(config)
        for weight, parameter in model.named_parameters():
            shape = list(parameter.shape)
            for name in (kind + weight for kind in KINDS):
                if name not in self.tensors:
                    raise UserError(f"{self.path} lacks {name}, which model.py has")
                found = self.tensors[name]["shape"]
                if found != shape:
                    raise UserError(
                        f"{self.path}: {name} has shape {found}, the model in model.py {shape}"
                    )
        return config


def open_newest(name: str, out_dir: Path = Path("model_dir")) -> Checkpoint:
    """Returns the checkpoint of this name (see `newest`). Raises UserError where there is none."""
    return Checkpoint(newest(name, out_dir) or out_dir)


def verify(folder: Path) -> int:
    """Check every byte of a checkpoint, or of all in a folder; status 1 if one is damaged.

    Args:
        folder: a checkpoint, or the out_dir of a run
    """
    status = 0
    for path in find_checkpoints(folder).values() or [folder]:
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
