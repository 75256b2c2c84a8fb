"""What compiling makes, takes and interrupts. That compiled blocks equal eager ones: CASES of
test_engines.py."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, figures, refused
from helpers import COMPILED, command, equal_records, graphs

import loss
from configuration import Configuration
from planner import resolve


@pytest.fixture(autouse=True)
def loss_in_chunks(monkeypatch):
    """As models of a real size have it."""
    monkeypatch.setattr(loss, "CHUNK", {"cpu": 16})


@pytest.mark.long
@pytest.mark.parametrize("case", COMPILED)
def test_graphs_in_bf16(dataset, tmp_path, case):
    """As many graphs with 2 blocks as with 6, after step 1 as after step 5."""
    found = graphs(dataset, tmp_path, "CPU", COMPILED[case])
    print(f"{case}: {found} graphs by depth and steps")
    assert len(set(found.values())) == 1 and min(found.values()) > 0, found


COUNTERS = """
import json, runpy, sys, torch
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
counters = torch._dynamo.utils.counters
print(json.dumps([counters["graph_break"], counters["stats"]["unique_graphs"]]))
"""


@pytest.mark.long
@pytest.mark.parametrize("recomputing", ["true", "false"])
def test_graphs_of_shards_in_bf16(config, tmp_path, recomputing):
    """As test_graphs_in_bf16; each run in a process of its own."""
    found = {}
    flags = ["--engine", "sharded", "--precision", "bf16", "--compile", "true"]
    flags += ["--micro_batch_size", "3", "--activation_checkpointing", recomputing]
    for depth, steps in ((2, 1), (6, 1), (2, 5)):
        run = [*flags, "--depth", str(depth), "--num_steps", str(steps)]
        words = [sys.executable, "-c", COUNTERS, ROOT / "train.py", config.path, *run]
        words += ["--out_dir", tmp_path / f"{depth}-{steps}"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        breaks, graphs = json.loads(done.stdout.splitlines()[-1])
        assert not breaks
        found[depth, steps] = graphs
    print(f"recomputing {recomputing}: {found} graphs by depth and steps")
    assert len(set(found.values())) == 1 and min(found.values()) > 0, found


@pytest.mark.long
def test_compiled_shards(config, tmp_path):
    """Of several systems, which draw other masks of dropout than one."""
    flags = [
        config.path,
        "--num_systems",
        2,
        "--dropout",
        0.2,
        "--activation_checkpointing",
        "true",
    ]
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        command("train", *flags, "--out_dir", tmp_path / name, "--compile", compiled)
    equal_records(tmp_path / "eager", tmp_path / "compiled", of_norm=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_compiles(config, tmp_path, monkeypatch, number, tally):
    """The step is waited for and saved; Ctrl-C reaches what compiles, too."""
    words = [sys.executable, ROOT / "train.py", config.path, "--compile", "true", "--engine"]
    words += ["resident", "--checkpoint_path", "latest", "--out_dir"]
    subprocess.run([*words, tmp_path / "whole"], check=True, capture_output=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # compile again
    out = tmp_path / "stopped"
    run = subprocess.Popen(
        [*words, out],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `make test &` ignores it
    )
    while not run.stdout.readline().startswith("starting from random weights"):
        pass
    time.sleep(2)
    (os.kill if number == signal.SIGTERM else os.killpg)(run.pid, number)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert "stopped at step 1;" in said and "Traceback" not in errors
    subprocess.run([*words, out], check=True, capture_output=True)
    assert figures(out) == figures(tmp_path / "whole")
    tally(f"{number.name} while it compiles", "resident", 1, "saved, status 0; equal losses")


def test_compiling_takes_a_compiler(run, config, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    refused(run("train", config.path, "--compile", "true"), "needs a C++ compiler, and there is no")


def test_what_compiling_on_a_gpu_takes(monkeypatch, capsys):
    """C for Triton; where something is missing a run goes on, and says that it is slower."""
    gpu = Configuration(backend="GPU")
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(resolve, "find_spec", lambda name: object())
    for capability, compiled in (((9, 0), True), ((6, 1), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert resolve.resolve_compile(gpu, None) == compiled
    assert "that needs a GPU of compute capability 7.0 or higher" in capsys.readouterr().err
    monkeypatch.setattr(resolve, "find_spec", lambda name: None)
    assert not resolve.resolve_compile(gpu, None)
    assert "not compiled, which is slower: that needs Triton" in capsys.readouterr().err
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not resolve.resolve_compile(gpu, None)
    assert "that needs a C compiler, and there is no gcc" in capsys.readouterr().err
