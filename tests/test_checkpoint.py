import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from common.console import UserError
from common.files import read_sealed, write_sealed
from configuration import Configuration
from runtime.distributed import Group
from weights import checkpoint
from weights.checkpoint import Checkpoint, checkpoint_path, find_checkpoints, prune, save, verify


def state():
    yield "embedding", {"embedding.weight": torch.arange(12.0).view(4, 3)}
    yield "norm", {"norm.weight": torch.ones(3), "norm.bias": torch.zeros(3)}


PROGRESS = {"step": 5, "optimizer_steps": 4, "tokens": 9, "train_digest": "", "recent": []}


def change(path, change):
    """Changes the manifest as somebody would who knows the format."""
    manifest = read_sealed(path / "manifest.json")
    change(manifest)
    write_sealed(path / "manifest.json", manifest)


def manifest(step: int = 5) -> dict:
    return PROGRESS | {"step": step, "config": asdict(Configuration(width=3, heads=1))}


def write(out, state):
    return save(out, state, manifest(1), None, Group())


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "out", state(), manifest(), None, Group(), b"{}")


def test_round_trip(saved):
    opened = Checkpoint(saved)
    assert (opened.step, opened.optimizer_steps, opened.config.width) == (5, 4, 3)
    for _, members in state():
        for name, tensor in members.items():
            assert torch.equal(opened.read(name), tensor)
    assert opened.tokenizer.read_text() == "{}"


IN_THE_WAY = {
    "a checkpoint": lambda path: None,
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half of it": lambda path: (path / "norm.safetensors").unlink(),
    "an empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
    "a file": lambda path: (shutil.rmtree(path), path.write_text("notes")),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_what_has_its_name_is_renamed(saved, what, capsys):
    """It came while the run went on: it is not deleted, and the run's own state is saved."""
    IN_THE_WAY[what](saved)
    before = content(saved)
    other = iter([("other", {"x": torch.ones(1)})])
    assert save(saved.parent, other, manifest(), 1, Group()) == saved
    assert list(Checkpoint(saved).tensors) == ["x"]
    (aside,) = saved.parent.glob("checkpoint_5.mdl.*")
    assert content(aside) == before
    assert f"{saved} was there already, and is now {aside.name}\n" in capsys.readouterr().err


def content(path) -> dict:
    files = [path] if path.is_file() else path.iterdir()
    return {file.name.partition(".mdl")[0]: file.read_bytes() for file in files}


def test_a_tensor_in_parts(tmp_path):
    """As several systems write one: rows of a tensor in files of their own, some with none."""
    whole = torch.arange(12.0).view(4, 3)
    pieces = {"b": whole[:1], "a": whole[1:], "c": whole[:0]}
    opened = Checkpoint(write(tmp_path, ((k, {"x": v}) for k, v in pieces.items())))
    assert opened.tensors["x"]["shape"] == [4, 3]
    assert torch.equal(opened.read("x"), whole)
    for begin in range(5):
        for end in range(begin, 5):
            assert torch.equal(opened.read("x", slice(begin, end)), whole[begin:end])


@pytest.mark.parametrize("other", [torch.ones(3, 4), torch.ones(3, 3).half(), torch.ones(())])
def test_parts_that_do_not_belong_together(tmp_path, other):
    pieces = {"a": torch.ones(1, 3), "b": other}
    path = write(tmp_path, ((k, {"x": v}) for k, v in pieces.items()))
    with pytest.raises(UserError, match=r"is damaged: x is F(16|32) of \[.*\] in b.safetensors"):
        Checkpoint(path).read("x")


@pytest.mark.parametrize("file", ["embedding.safetensors", "norm.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["delete", "truncate", "append"])
def test_damage_is_found_before_anything_is_read(saved, file, damage):
    path = saved / file
    content = path.read_bytes()
    path.unlink()
    if damage != "delete":
        path.write_bytes(content[:-1] if damage == "truncate" else content + b"x")
    with pytest.raises(UserError, match=rf"is damaged: {file} .*; copy it again, or move"):
        Checkpoint(saved)


def test_a_flipped_bit_is_found(saved):
    content = bytearray((saved / "norm.safetensors").read_bytes())
    content[-2] ^= 1
    (saved / "norm.safetensors").write_bytes(content)
    opened = Checkpoint(saved)
    opened.read("embedding.weight")
    with pytest.raises(UserError, match=r"norm.safetensors was changed \(its checksum differs\)"):
        opened.read("norm.weight")


def test_a_flipped_bit_of_the_tokenizer_is_found(saved):
    """By every command, also those that have no use for it."""
    (saved / "tokenizer.json").write_text("{]")
    with pytest.raises(UserError, match=r"tokenizer.json was changed \(its checksum differs\)"):
        Checkpoint(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 2}', "\0" * 200])
def test_damaged_manifest(saved, content):
    (saved / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"is damaged: manifest.json: it was changed"):
        Checkpoint(saved)


def put(key, value):
    return lambda manifest: manifest.update({key: value})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (put("step", 6), "it is from step 6, and was renamed"),
        (put("step", -5), "-5 is not a count"),
        (put("optimizer_steps", True), "True is not a count"),
        (put("optimizer_steps", 1e300), "is not a count"),
        (put("files", None), "manifest.json: "),
        (put("config", {"width": "wide"}), "manifest.json: .*width"),
        (put("recent", [[1, 2, 3]]), "manifest.json: "),
    ],
)
def test_manifests_that_lie(saved, how, message):
    change(saved, how)
    with pytest.raises(UserError, match=rf"is damaged: .*{message}"):
        Checkpoint(saved)


def test_another_format(saved):
    change(saved, put("format", 1))
    with pytest.raises(UserError, match="has format 1; this program reads 6"):
        Checkpoint(saved)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", "..", "link"])
def test_files_stay_inside(saved, name):
    (saved / "link").symlink_to(saved.parents[1] / "data" / "tokenizer.json")
    change(saved, lambda manifest: manifest["files"].update({name: {"bytes": 2, "sha256": ""}}))
    with pytest.raises(UserError, match=r"is damaged: file name .* is not in the folder"):
        Checkpoint(saved)


def test_a_renamed_checkpoint(saved):
    """`latest` would take it for a later one; of another kind of name it is nobody's business."""
    assert Checkpoint(saved.rename(saved.parent / "best")).step == 5
    later = (saved.parent / "best").rename(saved.parent / "checkpoint_9.mdl")
    with pytest.raises(UserError, match="is damaged: it is from step 5, and was renamed"):
        Checkpoint(later)


def test_missing_tensor(saved):
    with pytest.raises(UserError, match=r"has no decoder.0.weight: it belongs to another model"):
        Checkpoint(saved).read("decoder.0.weight")


def test_an_error_while_saving_leaves_nothing(tmp_path):
    def fails():
        yield "norm", {"norm.weight": torch.ones(3)}
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"could not be written .*No space.*free some space"):
        write(tmp_path, fails())
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_written_last_and_the_name_given_after_it(tmp_path, monkeypatch):
    path, synced = checkpoint_path(tmp_path, 1), []
    sync = checkpoint.sync

    def watch(path):
        synced.append(path.name)
        return sync(path)

    def watched_state():
        for group in state():
            assert not list(tmp_path.rglob("manifest.json"))
            assert not path.exists()
            yield group

    monkeypatch.setattr(checkpoint, "sync", watch)
    assert write(tmp_path, watched_state()) == path
    files = ["embedding.safetensors", "norm.safetensors", "manifest.json"]
    assert synced == [*files, "checkpoint_1.mdl.writing", tmp_path.name]


def test_the_command_that_verifies(saved, capsys):
    """Every byte of one, or of all in a folder, going on after one that is damaged."""
    words = [sys.executable, "-m", "weights.checkpoint", "verify", saved]
    done = subprocess.run(words, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, f"{saved} is complete: 3 files, 0.000 GB\n")
    save(saved.parent, state(), manifest(7), None, Group())
    with open(saved / "tokenizer.json", "w") as file:
        file.write("[]")
    assert verify(saved.parent) == 1
    told = capsys.readouterr()
    assert told.out == f"{saved.parent}/checkpoint_7.mdl is complete: 2 files, 0.000 GB\n"
    assert told.err == (
        f"error: {saved} is damaged: tokenizer.json was changed (its checksum differs); copy "
        f"it again, or move it away to use the one before\n"
    )
    (saved / "manifest.json").unlink()
    assert verify(saved.parent) == 1
    assert f"{saved} is damaged: manifest.json is missing" in capsys.readouterr().err
    assert verify(saved.parents[1]) == 1
    assert capsys.readouterr().err.endswith(
        "is not a checkpoint, nor the out_dir of a run with one\n"
    )


def test_what_cannot_be_read_is_not_damaged(saved, monkeypatch):
    """Nobody is told to delete a checkpoint for a hiccup of a network disk."""

    def unreadable(file, kind):
        raise OSError(5, "Input/output error", file.name)

    opened = Checkpoint(saved)
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", unreadable)
    message = f"{saved}/norm.safetensors can't be read (Input/output error); try again"
    with pytest.raises(UserError, match=re.escape(message)):
        opened.read("norm.weight")


def test_files_follow_the_umask(saved):
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o644}


def test_prune_keeps_the_newest(saved):
    for step in (10, 9, 100):
        save(saved.parent, state(), manifest(step), None, Group())
    prune(saved.parent, None)
    assert len(find_checkpoints(saved.parent)) == 4
    prune(saved.parent, 2)
    found = [path.name for path in find_checkpoints(saved.parent).values()]
    assert found == ["checkpoint_10.mdl", "checkpoint_100.mdl"]


@pytest.mark.parametrize("what", [*IN_THE_WAY][1:])
def test_prune_deletes_complete_checkpoints_only(saved, what):
    """What is not complete may be all that is left of something, and does not count either."""
    for step in (6, 7):
        save(saved.parent, state(), manifest(step), None, Group())
    (saved.parent / "checkpoint_6.mdl" / "notes.txt").write_text("the best so far")
    IN_THE_WAY[what](saved)
    before = content(saved)
    save(saved.parent, state(), manifest(8), 1, Group())
    found = [path.name for path in find_checkpoints(saved.parent).values()]
    assert found == ["checkpoint_5.mdl", "checkpoint_6.mdl", "checkpoint_8.mdl"]
    assert content(saved) == before
