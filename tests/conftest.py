"""What the tests share: a small dataset, a small configuration, and the commands run in-process."""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from common.console import command
from common.tokens import write_meta

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "weights", "engines", "planner", "runtime", "data")
PATTERNS = ("*.py", *(f"{folder}/**/*.py" for folder in FOLDERS))
PROGRAM = [path for pattern in PATTERNS for path in ROOT.glob(pattern)]
VOCABULARY = 27  # the letters, space and newline of `text`, an odd number

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # measured rates are for the tests alone
torch.set_num_threads(1)  # small models are faster so, and sums the same everywhere
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core; threads would wait for others'
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--cerebras", help="the Python of Cerebras's environment")
    parser.addoption("--transformers4", help="the Python of an environment with transformers 4")
    parser.addoption("--shapes", type=int, default=60, help="of models, whose memory is measured")
    parser.addoption("--kills", type=int, default=1, help="of workers, in the test of restarts")
    parser.addoption(
        "--faults", type=int, default=2, help="of each kind and engine; 0: all there are"
    )
    parser.addoption("--seed", type=int, default=time.time_ns() % 2**32, help="of the faults")
    parser.addoption("--table", type=Path, help="the file to write the table of faults into")


def cloned(folder: Path) -> Path:
    """The program, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    for path in PROGRAM:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.relative_to(ROOT))
    return folder


def worked(done: CompletedProcess) -> str:
    """What a command that was typed said."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(seen: CompletedProcess | SimpleNamespace, message: str) -> None:
    """Check that a command said why in one line, the last. Before it come warnings alone, or of a
    command that was typed the log lines of a library."""
    if isinstance(seen, CompletedProcess):
        seen = SimpleNamespace(status=seen.returncode, err=seen.stderr, libraries=True)
    assert seen.status == 1
    assert "Traceback" not in seen.err
    *before, line = seen.err.splitlines()
    assert line.startswith("error: ") and message in line
    assert hasattr(seen, "libraries") or all(other.startswith("warning: ") for other in before)


def text(seed: int, words: int) -> str:
    """Something a small model learns in a few steps: words of a small vocabulary, in lines."""
    source = random.Random(seed)
    vocabulary = ["".join(source.choices("abcdefghijklmnopqrstuvwxy", k=5)) for _ in range(50)]
    return "\n".join(" ".join(source.choices(vocabulary, k=8)) for _ in range(words // 8))


def write_dataset(folder: Path, train: str, val: str) -> Path:
    """A dataset of characters, in the form that data/prepare.py writes, which needs packages that a
    machine with a GPU may lack."""
    import hashlib

    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted({*train, *"abcdefghijklmnopqrstuvwxy \n"})
    tokenizer = Tokenizer(models.WordLevel({c: token for token, c in enumerate(characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    meta = {
        "tokenizer": "char",
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "vocab_size": tokenizer.get_vocab_size(),
        "dtype": "uint16",
        "bytes": {},
    }
    for split, content in (("train", train), ("val", val)):
        np.array(tokenizer.encode(content).ids, np.uint16).tofile(folder / f"{split}.bin")
        meta["bytes"][split] = len(content)
    write_meta(folder, meta)
    return folder


def pytest_generate_tests(metafunc):
    if "shape_number" in metafunc.fixturenames:
        metafunc.parametrize("shape_number", range(metafunc.config.getoption("--shapes")))


@pytest.fixture(scope="session")
def tally(request):
    """tally(fault, engine, tries, note): a row of the table of faults (docs/reliability.md)."""
    rows, began = [], time.time()
    yield lambda *row: rows.append(row)
    if table := request.config.getoption("--table"):
        seed, day = request.config.getoption("--seed"), time.strftime("%Y-%m-%d")
        lines = [
            f"{day}, seed {seed}, {(time.time() - began) / 60:.0f} minutes: "
            f"{sum(row[2] for row in rows):,} faults.\n",
            "| fault | where | tries | what came of it |",
            "| --- | --- | ---: | --- |",
            *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        ]
        table.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "words", text(1, 4000), text(1, 301))


@pytest.fixture
def config(dataset, tmp_path) -> SimpleNamespace:
    return small_config(tmp_path, dataset)


def small_config(folder: Path, dataset: Path, **changes: object) -> SimpleNamespace:
    """A configuration file of a small model (path), its values, and its out_dir."""
    values = {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "out_dir": str(folder / "out"),
        "dataset": str(dataset),
        "batch_size": 4,
        "sequence_length": 32,
        "num_steps": 6,
        "checkpoint_steps": 3,
        "eval_steps": 6,
        "log_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "backend": "CPU",
    } | changes
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return SimpleNamespace(path=str(path), values=values, out=folder / "out")


@pytest.fixture
def run(monkeypatch, capfd):
    """run("train", *arguments) -> status, out, err of `python train.py *arguments`."""

    def run(name: str, *arguments: object) -> SimpleNamespace:
        module = __import__(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(module.main)
        out, err = capfd.readouterr()
        return SimpleNamespace(status=stop.value.code or 0, out=out, err=err)

    return run


@pytest.fixture
def stopped(run, config) -> Path:
    """The folder of a run that ended at step 3."""
    assert run("train", config.path, "--num_steps", 3).status == 0
    return config.out


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """To draw a loss curve takes longer than to train a small model: where a test does not ask for
    `pictures`, files are made that show none."""
    if "pictures" not in request.fixturenames and find_spec("matplotlib"):
        path = "matplotlib.figure.Figure.savefig"
        monkeypatch.setattr(path, lambda figure, file, **more: file.touch())


@pytest.fixture
def pictures():
    """Loss curves are drawn, as for a user."""


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts commands in forks of a process that has everything imported (tests/faults.py)."""
    from faults import Forks

    return Forks(tmp_path_factory.mktemp("forks"), ROOT)


def figures(out: Path) -> list[dict]:
    """What the steps and evaluations gave, without what depends on the clock."""
    timed = {"tokens_per_second", "mfu", "seconds", "memory"}
    return [{k: v for k, v in line.items() if k not in timed} for line in records(out, "step")]


def records(out: Path, key: str = "loss") -> list[dict]:
    """The records of out/metrics.jsonl that have `key`."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]
