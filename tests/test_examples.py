"""The scripts of examples/ run as they are, on CPUs, in the environment that their launchers give
them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, cloned, records, worked

from runtime.arguments import parse_configuration

pytestmark = pytest.mark.long


@pytest.fixture
def clone(tmp_path) -> Path:
    """The program, with what `make install` would put into .venv."""
    clone = cloned(tmp_path / "clone")
    (clone / ".venv/bin").mkdir(parents=True)
    write_script(clone / ".venv/bin/python", f'exec {sys.executable} "$@"')
    return clone


def write_script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


def run(script: list[str], folder: Path, **environment: object) -> str:
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    kept = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return worked(subprocess.run(script, timeout=300, **kept))


def test_slurm(clone, config, tmp_path):
    """With one node; srun and scontrol are replaced by what they do there."""
    write_script(tmp_path / "srun", 'exec "$@"')
    write_script(tmp_path / "scontrol", "echo localhost")
    values = {"SLURM_NNODES": 1, "SLURM_CPUS_ON_NODE": 2, "SLURM_JOB_NODELIST": "localhost"}
    values |= {"SLURM_JOB_ID": 7, "SYSTEMS_PER_NODE": 2, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "examples/slurm.sh"), config.path]
    assert "2 processes" in run([*script, "--num_steps", "3"], clone, **values)
    assert "resumed from" in run(script, clone, **values)  # sent again
    assert [r["step"] for r in records(config.out)] == [1, 2, 3, 4, 5, 6]


def test_skypilot(clone, config):
    task = yaml.safe_load((ROOT / "examples/skypilot.yaml").read_text())
    script = task["run"].replace("/checkpoints", str(config.out))
    values = {"SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_NUM_NODES": 1, "CONFIG": config.path}
    values |= {"SKYPILOT_NUM_GPUS_PER_NODE": 2, "SKYPILOT_TASK_ID": "sky-1"}
    assert "2 processes" in run(["bash", "-euc", script], clone, **values)
    assert [r["step"] for r in records(config.out)] == [1, 2, 3, 4, 5, 6]


def test_kubernetes(clone, config):
    """The container's command, with what the operator sets in the only pod of such a job."""
    job = yaml.safe_load((ROOT / "examples/kubernetes.yaml").read_text())["spec"]
    (container,) = job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    program, *words = container["command"]
    less = [f"--dataset={config.values['dataset']}", f"--out_dir={config.out}", "--num_systems=2"]
    words = [config.path if word.endswith(".yaml") else word for word in words]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    values |= {"PET_NNODES": "1:1", "PET_NPROC_PER_NODE": 2, "PET_RDZV_BACKEND": "c10d"}
    values |= {"PET_RDZV_ENDPOINT": "localhost:29511", "PET_MAX_RESTARTS": 3}
    assert program == "torchrun"
    out = run([sys.executable, "-m", "torch.distributed.run", *words, *less], clone, **values)
    assert "2 processes" in out and "step 6/6" in out


@pytest.mark.parametrize("path", sorted((ROOT / "examples").iterdir()), ids=lambda path: path.name)
def test_the_configurations_exist(path, monkeypatch):
    for name in re.findall(r"configs/\w+\.yaml", path.read_text()):
        monkeypatch.setattr(sys, "argv", ["train.py", str(ROOT / name), *shlex.split("--seed 1")])
        assert parse_configuration("")[0].seed == 1
