"""A preparation that is stopped at any moment goes on, to the same bytes as an undisturbed one."""

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from tokenizers import Tokenizer

from common.tokens import Tokens
from data import pieces, prepare, sources

# The command with shards so small that a short text has many
PREPARE = """
from data import pieces, prepare
from common.console import command
pieces.SHARD, pieces.GROWTH = 2**15, 0
command(prepare.main)
"""


def start(*args: object, num_proc: int = 2) -> subprocess.Popen:
    words = [sys.executable, "-c", PREPARE, "--num_proc", *map(str, (num_proc, *args))]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=ROOT, text=True, **streams)


def succeed(*args: object, **more: int) -> str:
    process = start(*args, **more)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def assert_fails(process: subprocess.Popen, *parts: str) -> None:
    err = process.communicate()[1]
    assert process.returncode == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in parts), err


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder: Path) -> int:
    return len(list(folder.glob("unfinished/shard-*.json")))


def write_texts(path: Path, count: int) -> Path:
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghij ", k=5)) for _ in range(500)]
    texts = [" ".join(source.choices(words, k=source.randrange(1, 600))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *texts]))
    return path


def kill_when(process: subprocess.Popen, folder: Path, number: int) -> None:
    """Kill it once so many shards are complete."""
    wait_for_shards(process, folder, number)
    process.kill()
    process.communicate()


def wait_for_shards(process: subprocess.Popen, folder: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while shards(folder) < number and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The arguments that prepare a dataset of 27 shards, and its content, made by one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_texts(folder / "a.jsonl", 500)
    args = [path, "--tokenizer", "bpe:300"]
    succeed(*args, "--out", folder / "one", num_proc=1)
    return args, content(folder / "one")


def test_killed_three_times(undisturbed, tmp_path):
    """With another number of processes each time. The shards that are complete are not made again,
    no process is left that makes any, and of the text there is nothing on the disk."""
    args, expected = undisturbed
    out, kept = tmp_path / "out", 0
    for num_proc in (2, 1, 3):
        kill_when(start(*args, "--out", out, num_proc=num_proc), out, kept + 3)
        assert shards(out) >= kept + 3
        kept = shards(out)
        made = {path: path.stat().st_mtime_ns for path in out.glob("unfinished/shard-*.json")}
        assert not list(out.glob("*.*"))
    files = [path for path in out.rglob("*") if path.is_file()]
    kinds = {path.name.split("-")[0] for path in files}
    assert kinds == {"job.json", "vocabulary.json", "shard", "train", "val"}
    assert sum(path.stat().st_size for path in files) < 1.2 * args[0].stat().st_size
    done = succeed(*args, "--out", out)
    assert f"resuming: {kept:,} shards are complete" in done
    assert content(out) == expected
    assert len(made) == kept < len(list(out.glob("train-*.bin")))


@pytest.mark.long
def test_killed_twenty_times(undisturbed, tmp_path, tally):
    """At random moments: from the start on, as the tokenizer is trained, and between shards."""
    args, expected = undisturbed
    source, kills, datasets = random.Random(0), 0, 0
    began = time.monotonic()
    succeed(*args, "--out", tmp_path / "two")
    seconds = time.monotonic() - began
    assert content(tmp_path / "two") == expected
    while kills < 20:
        out = tmp_path / str(datasets)
        while not (out / "meta.json").exists():
            process = start(*args, "--out", out, num_proc=source.randrange(1, 4))
            wait_for_shards(process, out, shards(out) + source.randrange(3))
            time.sleep(source.uniform(0, 0.1 * seconds))
            if process.poll() is None and kills < 20:
                process.kill()
                kills += 1
            _, err = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), err
        datasets += 1
        if (out / "unfinished").exists():  # killed after the last file was put in place
            assert_fails(start(*args, "--out", out), "has a dataset")
        assert content(out) == expected
    tally("SIGKILL at a random moment", "prepare.py", kills, f"{datasets} datasets of equal bytes")


def test_interrupted_as_the_files_are_put_in_place(tmp_path, monkeypatch):
    """Before each of them: what is left to do is done by the next run."""
    path = write_texts(tmp_path / "a.jsonl", 45)
    monkeypatch.setattr(pieces, "SHARD", 2**15)
    monkeypatch.setattr(pieces, "GROWTH", 0)
    replace, moved = os.replace, []

    def interrupted(before, after):
        if Path(after).parent == out:
            if len(moved) == number:
                raise KeyboardInterrupt
            moved.append(after)
        replace(before, after)

    def run():
        options = ["--tokenizer", "char", "--out", str(out), "--num_proc", "1"]
        monkeypatch.setattr(sys, "argv", ["prepare.py", *options, str(path)])
        prepare.main()

    out = tmp_path / "undisturbed"
    run()
    expected = content(out)
    assert len(expected) > 8
    for number in range(len(expected)):
        out, moved = tmp_path / str(number), []
        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
        assert len(moved) == number and not (out / "meta.json").exists()
        monkeypatch.setattr(os, "replace", replace)
        run()
        assert content(out) == expected


def test_shards_are_one_text(undisturbed):
    """All documents are there once and in order, and a hundredth of them is val."""
    args, _ = undisturbed
    folder = args[0].parent / "one"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in args[0].read_text().splitlines()[1:]]
    opened = {split: Tokens(str(folder), split, 300) for split in ("train", "val")}
    found = {}
    for split, tokens in opened.items():
        ids = tokens.read(0, tokens.count)
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        found[split] = text.split("<|endoftext|>")[-2::-1]  # the first is the last
    assert 20 < len(opened["train"].shards) < 60 and len(opened["val"].shards) == 1
    cut = 0
    for text in texts:
        whole = [split for split in found if found[split][-1:] == [text]]
        if whole:
            found[whole[0]].pop()
        else:  # its end is val
            assert found["train"].pop() + found["val"].pop() == text
            cut += 1
    assert cut < 10 and found == {"train": [], "val": []}
    total = sum(tokens.count for tokens in opened.values())
    assert 0.0075 < opened["val"].count / total < 0.0125


@pytest.mark.parametrize("unlike", [0, 1, 3])
def test_the_share_of_val(unlike):
    """Near a hundredth of a text, and from shard to shard of what was read: whole documents
    wherever there are many, of one size or of sizes that differ much."""
    source = np.random.default_rng(0)

    def drawn(state: pieces.State, documents: int, number: int) -> float:
        sizes = np.maximum(1, source.lognormal(7, unlike, documents)).astype(int)
        whole, cut, share = pieces.draw(state, sizes, number)
        assert not share or cut not in whole
        state.text += int(sizes.sum())
        state.val += int(sizes[whole].sum() + share * sizes[cut])
        assert 0.0074 < state.val / state.text < 0.0126
        return share

    for documents in (1, 2, 3, 10, 99, 100, 150, 1000, 100_000):
        share = drawn(pieces.State(), documents, 0)
    assert share == 0
    state = pieces.State()
    for number in range(200):
        drawn(state, source.integers(1, 300), number)


def test_what_is_refused_while_it_is_not_complete(undisturbed, tmp_path):
    """Another command, and a second process."""
    args, _ = undisturbed
    out = tmp_path / "out"
    running = start(*args, "--out", out, num_proc=1)
    wait_for_shards(running, out, 1)
    os.kill(running.pid, signal.SIGSTOP)
    try:
        assert_fails(start(*args, "--out", out), "out is being prepared by another process")
    finally:
        os.kill(running.pid, signal.SIGCONT)
        kill_when(running, out, 2)
    other = [args[0], "--tokenizer", "char", "--out", out]
    message = "out/unfinished was begun by another command (other tokenizer): run that one again"
    assert_fails(start(*other), message, "or delete the folder")
    os.utime(args[0], (1, 1))
    assert_fails(start(*args, "--out", out), "was begun by another command (other files)")


def test_a_process_that_is_killed(undisturbed, tmp_path):
    """As the kernel does when the memory is full: one line, and the shards are kept."""
    args, _ = undisturbed
    process = start(*args, "--out", tmp_path / "out")
    wait_for_shards(process, tmp_path / "out", 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert_fails(process, "a process was killed", "run the same command again", "--num_proc")
    assert shards(tmp_path / "out")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_shards_of_every_kind_of_file(tmp_path, monkeypatch, kind):
    """Each is read from its own place, also by a process that has every second or third."""
    monkeypatch.setattr(pieces, "SHARD", 1000)
    monkeypatch.setattr(pieces, "GROWTH", 0)
    texts = [f"document {i} " + "word " * (i % 50) for i in range(200)]
    records = [{"text": text} for text in texts]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=30)
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
    elif kind == "json":
        path.write_text(json.dumps(records))
    else:
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    planned = [piece for _, piece in pieces.pieces([str(path)], "text", pieces.draw)]
    assert len(planned) > 20
    for every in (1, 2, 3):
        found = {}
        for first in range(every):  # each process has its own order
            for number in range(first, len(planned), every):
                found[number] = "".join(text for _, text in planned[number].texts())
        assert "".join(found[number] for number in sorted(found)) == "".join(texts)


def test_texts_of_the_hub_are_copied_once(tmp_path, monkeypatch):
    """A copy that is stopped goes on after its last file, from the state that is kept in it."""
    monkeypatch.setattr(sources, "COPY", 300)
    texts = [f"document {i} " + "word " * (i % 50) for i in range(100)]
    (tmp_path / "hub").mkdir()
    (tmp_path / "copy").mkdir()
    for part in (0, 1):
        lines = "".join(json.dumps({"body": t}) + "\n" for t in texts[part * 60 : part * 40 + 60])
        (tmp_path / f"hub/{part}.jsonl").write_text(lines)
    where = (str(tmp_path / "hub"), None, "train", "body")
    first = sources.HubCopy(tmp_path / "copy", *where)
    assert [Path(first[i]).name for i in range(4)] == [f"text-0000{i}.parquet" for i in range(4)]
    monkeypatch.setattr(first, "texts", None)
    files = list(sources.HubCopy(tmp_path / "copy", *where))
    assert len(files) > 5
    assert [t for file in files for _, t in sources.read_file(file, "text")] == texts
    monkeypatch.setattr(sources, "hub_texts", None)  # complete: the hub is not asked
    assert list(sources.HubCopy(tmp_path / "copy", *where)) == files
