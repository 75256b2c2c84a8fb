"""Every command of the README, in a copy of the project, as a user types it."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, cloned, refused, worked

from common.files import read_sealed, write_sealed

SMALL = ["--depth", "2", "--batch_size", "2", "--sequence_length", "64", "--eval_batches", "1"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    clone = cloned(tmp_path_factory.mktemp("clone"))
    shutil.copytree(ROOT / "configs", clone / "configs")
    shutil.copy(ROOT / "README.md", clone)
    return clone


@pytest.fixture(scope="module")
def shakespeare(clone) -> str:
    """The folder of this dataset in the clone."""
    worked(type_in(clone, "python data/shakespeare/prepare.py"))
    return "data/shakespeare"


def type_in(clone: Path, line: str, *more: str) -> subprocess.CompletedProcess:
    """Runs a command line that stands in the README, with `more` to keep it small."""
    assert line in (clone / "README.md").read_text(), f"the README does not say: {line}"
    program, *words = shlex.split(line)
    assert program == "python"
    return subprocess.run(
        [sys.executable, *words, *more], cwd=clone, text=True, capture_output=True, timeout=300
    )


@pytest.mark.long
def test_in_the_order_of_the_readme(clone, tmp_path):
    known = ["the", "a", "of", "to", "sea", "ship", "king"]
    words = random.Random(1).choices(known, k=200)
    hub = tmp_path / "hub" / "plain_text"
    hub.mkdir(parents=True)
    with open(hub / "train.jsonl", "w") as file:
        for i in range(40):
            file.write(json.dumps({"text": f"{i} " + " ".join(words)}) + "\n")
    worked(type_in(clone, "python data/openwebtext/prepare.py", "--source", str(tmp_path / "hub")))

    train = "python train.py configs/111m.yaml"
    out = worked(type_in(clone, train, "--num_steps", "2", *SMALL))
    assert "saved model_dir/checkpoint_2.mdl" in out

    again = "python train.py configs/111m.yaml --checkpoint_path latest"
    out = worked(type_in(clone, again, "--num_steps", "3", *SMALL))
    assert "resumed from model_dir/checkpoint_2.mdl at step 2" in out
    # the README's names the 9,037th step
    there = (clone / "model_dir/checkpoint_3.mdl").rename(clone / "model_dir/checkpoint_9037.mdl")
    manifest = read_sealed(there / "manifest.json") | {"step": 9037}
    write_sealed(there / "manifest.json", manifest)

    evaluate = "python eval.py configs/111m.yaml --checkpoint_path model_dir/checkpoint_9037.mdl"
    result = json.loads(worked(type_in(clone, evaluate, "--json", *SMALL)))
    assert 5 < result["loss"] < 11

    sample = "python sample.py --checkpoint_path model_dir/checkpoint_9037.mdl"
    few = ["--max_new_tokens", "4"]
    out = worked(type_in(clone, sample, "--prompt", "The ship", *few))
    assert out.startswith("The ship")

    again = (
        "python sample.py --checkpoint_path model_dir/checkpoint_9037.mdl"
        ' --prompt "The ship" --top_k 50'
    )
    out = worked(type_in(clone, again, *few))
    assert out.startswith("The ship")

    export = "python export.py --checkpoint_path model_dir/checkpoint_9037.mdl --out exported"
    worked(type_in(clone, export))
    assert (clone / "exported/tokenizer.json").is_file()

    tune = "python train.py configs/111m.yaml --init_from exported --out_dir tuned"
    out = worked(type_in(clone, tune, "--num_steps", "1", *SMALL))
    assert "starting from the weights of exported" in out


@pytest.mark.long
def test_another_dataset(clone, shakespeare):
    line = (
        "python train.py configs/111m.yaml --dataset data/shakespeare --batch_size 8 --num_steps 3"
        " --out_dir trial"
    )
    small = ["--depth", "1", "--sequence_length", "64", "--eval_batches", "1", "--out_dir", "other"]
    assert "step 3/3" in worked(type_in(clone, line, *small))


@pytest.mark.long
def test_models_larger_than_the_memory(clone, shakespeare):
    line = (
        "python train.py configs/1p3b.yaml --dataset data/shakespeare --batch_size 8"
        " --micro_batch_size 1 --sequence_length 512 --num_steps 5 --memory_limit 6GB"
        " --out_dir large"
    )
    small = ["--width", "64", "--depth", "2", "--eval_batches", "1", "--out_dir", "streamed"]
    small += ["--engine", "streaming", "--stream_to", "disk", "--num_steps", "1"]
    assert "step 1/1" in worked(type_in(clone, line, *small))
    assert "1,315,723,264 parameters" in worked(type_in(clone, "python plan.py configs/1p3b.yaml"))
    for line in (
        "python plan.py configs/70b.yaml --device h100 --host_memory 2TB",
        "python plan.py configs/175b.yaml --device h100 --host_memory 2TB --disk 8TB --json",
    ):
        assert "streaming" in worked(type_in(clone, line))


@pytest.mark.long
def test_many_systems(clone, shakespeare):
    line = "python train.py configs/111m.yaml --num_systems 2"
    small = ["--dataset", shakespeare, "--width", "96", "--depth", "1", "--batch_size", "2"]
    small += ["--sequence_length", "64", "--num_steps", "1", "--eval_batches", "1"]
    out = worked(type_in(clone, line, *small, "--backend", "CPU", "--out_dir", "sharded"))
    assert "2 processes, 2 share a copy" in out and "step 1/1" in out
    line = "python plan.py configs/70b.yaml --device h100 --host_memory 2TB --num_systems 128"
    assert "without streaming or offloading: 24" in worked(type_in(clone, line))


NO_CEREBRAS = "engine: cerebras needs the package cerebras_pytorch"  # test_cerebras.py has it
NO_ROOM = "this model does not fit"
REFUSED = {
    "cs/bin/python train.py configs/70b.yaml --backend CSX --num_systems 16": NO_CEREBRAS,
    "cs/bin/python train.py configs/175b.yaml --dataset data/shakespeare --backend CSX "
    "--cluster.validate_only true": NO_CEREBRAS,
    "python train.py configs/13b.yaml": NO_ROOM,
    "python train.py configs/70b.yaml": NO_ROOM,
    "python train.py configs/175b.yaml": NO_ROOM,
    "python train.py configs/70b.yaml --num_systems 16": f"{NO_ROOM}: with the sharded",
    "python eval.py configs/70b.yaml --checkpoint_path /path/to/checkpoint.mdl": "is no such check",
}


@pytest.mark.parametrize("line", REFUSED)
def test_commands_that_this_machine_refuses(clone, run, monkeypatch, line):
    assert re.search(rf"(?m)^{re.escape(line)}( |$)", (clone / "README.md").read_text())
    monkeypatch.chdir(clone)
    name, *words = shlex.split(line)[1:]
    seen = run(name.removesuffix(".py"), *words, "--memory_limit", "2GB", "--out_dir", "fresh")
    refused(seen, REFUSED[line])
