"""The benchmarks run: what they measure is not looked at, but for what a side must not do."""

import gzip
import json
import subprocess
import sys

import pytest
from conftest import ROOT, refused, worked


def bench(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def results(out) -> dict[str, dict]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


@pytest.mark.long
def test_sides_train_the_same_shape(tmp_path):
    """Eight sequences of random tokens in two steps: the loss is near that of a guess."""
    shape = ["--width", 64, "--depth", 2, "--vocab_size", 257, "--sequence_length", 64]
    sides = ["--sides", "[streaming-disk,transformers,fsdp-offload]", "--name", "it"]
    run = ["--tokens", 512, "--rounds", 1, "--out", tmp_path / "results.jsonl"]
    worked(bench("bench/compare.py", *shape, *run, *sides))
    line = results(tmp_path)["it"]
    assert line["roof"] > 1e9
    assert set(line["sides"]) == {"resident", "streaming-disk", "transformers", "fsdp-offload"}
    for name, side in line["sides"].items():
        assert abs(side["loss"] - 5.55) < 0.5, name
        assert side["tokens_per_second"] > 0 and side["peak_bytes"] > 1e8, name
        assert side["loader"] < 0.5, name
        assert name == "resident" or side["lowest"] <= side["ratio"] * 1.01, name


@pytest.mark.long
def test_a_side_that_fails_says_why(tmp_path):
    shape = ["--width", 64, "--depth", 1, "--vocab_size", 257, "--sequence_length", 64]
    (tmp_path / "train.py").touch()
    seen = worked(
        bench(
            *("bench/compare.py", *shape, "--tokens", 64, "--rounds", 1),
            *("--nanogpt", tmp_path, "--sides", "[nanogpt-bf16]"),
        )
    )
    assert "nanogpt-bf16            failed: TypeError: GPTConfig.__init__() got an unexp" in seen


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sides", "[torchtitan]"], "sides: torchtitan is not known; known are resident, "),
        (["--sides", "[litgpt-compiled]"], "sides: litgpt-compiled needs --peers_python"),
        (["--sides", "[nanogpt-bf16]"], "sides: nanogpt-bf16 needs --nanogpt and a folder"),
    ],
)
def test_sides_that_cannot_be(flags, message):
    refused(bench("bench/compare.py", *flags), message)


@pytest.mark.long
def test_the_gpu_script_on_tiny_models(tmp_path):
    worked(bench("bench/gpu.py", "run", "--toy", "true", "--out", tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    named = {line["name"]: line for line in lines}
    sides = [side for line in lines for side in line.get("sides", {}).values()]
    assert len(sides) == 10 and not [side for side in sides if "error" in side]
    assert {"device", "products", "copies", "head", "disk", "begin", "overlap"} <= set(named)
    steps = [line for line in lines if line["name"] == "sweep"]
    assert [line["tokens"] for line in steps] == [256, 128, 64]
    assert all(line["flops"] > 0 and len(line["seconds"]) == 3 for line in steps)
    assert b"traceEvents" in gzip.decompress((tmp_path / "trace.json.gz").read_bytes())
    matrices, last, attention = 12 * 64**2, 4 * 64**2, 64 * 64  # of one of 2 blocks, 2 FLOPs each
    held = named["held-block"]["sides"]["held-block"]
    flops = held["hardware_flops"] * 256 / held["tokens_per_second"]
    assert flops == pytest.approx(256 * 2 * 2 * (4 * (matrices + attention) - last))


def test_a_part_ends_at_its_limit(tmp_path, monkeypatch):
    """With the processes that it started."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    from gpu import limited

    words = ["sh", "-c", "sleep 1000 & echo begun; wait"]
    assert limited(words, 1, tmp_path / "log") == "stopped at its limit of 1 s"
    assert "begun" in (tmp_path / "log").read_text()
    assert limited(["false"], 10, tmp_path / "log") == "status 1"
