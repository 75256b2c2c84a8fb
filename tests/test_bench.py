"""The benchmarks run: what they measure is not looked at, but for what a side must not do."""

import gzip
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT

from common.console import UserError

SMALL = {"width": 64, "depth": 2, "vocab_size": 257, "sequence_length": 64}
SMALL |= {"rounds": 1, "steps": 1, "name": "it"}


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """compare(**keys): what the sides of bench/compare.py found, on a small model."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    from compare import main

    def compare(**keys: object) -> dict[str, dict]:
        main(**SMALL | {"tokens": 64, "out": str(tmp_path / "results.jsonl"), "sides": []} | keys)
        return found(tmp_path)

    return compare


def found(out: Path) -> dict[str, dict]:
    """The sides of the last result."""
    return json.loads((out / "results.jsonl").read_text().splitlines()[-1])["sides"]


def begin(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def children(parent: int) -> int:
    """How many processes a process has started that run now."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            found += path.read_text().rsplit(")", 1)[1].split()[1] == str(parent)
    return found


@pytest.mark.long
def test_sides_train_the_same_shape(tmp_path):
    """Eight sequences of random tokens in two steps: the loss is near that of a guess. One side
    has ended when the next begins."""
    keys = SMALL | {"tokens": 512, "micro_batch_size": 2, "out": tmp_path / "results.jsonl"}
    keys["sides"] = "[streaming-disk,transformers,fsdp-offload]"
    process = begin("bench/compare.py", *(f"--{key}={value}" for key, value in keys.items()))
    together = 0
    while process.poll() is None:
        together = max(together, children(process.pid))
        time.sleep(0.1)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert together == 1
    assert "with one process FSDP2 copies weights in the stream that computes" in out
    assert json.loads((tmp_path / "results.jsonl").read_text())["roof"] > 1e9
    sides = found(tmp_path)
    assert set(sides) == {"resident", "streaming-disk", "transformers", "fsdp-offload"}
    for name, side in sides.items():
        assert abs(side["loss"] - 5.55) < 0.5, name
        assert side["tokens_per_second"] > 0 and side["peak_bytes"] > 1e8, name
        assert side["loader"] < 0.5, name
        assert name == "resident" or side["lowest"] <= side["ratio"] <= side["highest"], name
    assert sides["resident"]["planned"]["seconds"] > 0


@pytest.mark.long
def test_a_side_that_fails_says_why(compare, tmp_path, capsys):
    """Its last lines are kept, and what the others did."""
    (tmp_path / "train.py").touch()
    (tmp_path / "model.py").write_text("class GPTConfig:\n    pass\n")
    sides = compare(nanogpt=str(tmp_path), sides=["nanogpt-bf16"])
    seen = capsys.readouterr().out
    assert "nanogpt-bf16            failed: TypeError: GPTConfig() takes no arguments" in seen
    assert sides["nanogpt-bf16"]["error"].startswith("Traceback (most recent call last):")
    assert sides["resident"]["tokens_per_second"] > 0


@pytest.mark.long
@pytest.mark.parametrize("key", ["memory_limit", "host_memory"])
def test_memory_is_limited_as_in_training(compare, tmp_path, key):
    message = "^resident: common.console.UserError: this model does not fit: "
    with pytest.raises(UserError, match=message):
        compare(**{key: "1MB"})
    assert len(found(tmp_path)["resident"]["error"].splitlines()) > 5


@pytest.mark.long
def test_recomputing_is_chosen_as_in_training(compare):
    flops = []
    for checkpointing in (True, False):
        sides = compare(base="streaming-ram", activation_checkpointing=checkpointing)
        side = sides["streaming-ram"]
        flops.append(side["hardware_flops"] / side["tokens_per_second"])
    assert flops[0] > 1.1 * flops[1]


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("torchtitan", "sides: torchtitan is not known; known are resident, "),
        ("litgpt-compiled", "sides: litgpt-compiled needs --peers_python"),
        ("nanogpt-bf16", "sides: nanogpt-bf16 needs --nanogpt and a folder"),
    ],
)
def test_sides_that_cannot_be(compare, side, message):
    with pytest.raises(UserError, match=message):
        compare(sides=[side])


OTHER_STAGES = """
import gpu
for name in ("resident-2p7b", "fsdp-2p7b", "resident-6p7b"):  # as others but for their numbers
    del gpu.STAGES["c"][name]
for parts in gpu.STAGES.values():
    for part, (seconds, words) in parts.items():
        parts[part] = (4 * seconds, words)  # CPUs are slow, and may be busy
for stage in "bcd":
    gpu.run(stage, out="there", toy=True)
"""


@pytest.mark.long
def test_the_gpu_script_on_tiny_models(tmp_path):
    """From another folder, with packages that PYTHONPATH names from there: every process finds
    them."""
    (tmp_path / "site").mkdir()
    script = f"import sys; open({str(tmp_path / 'seen')!r}, 'a').write(f'{{sys.orig_argv}}')"
    (tmp_path / "site" / "sitecustomize.py").write_text(script)
    script = ROOT / "bench/gpu.py"
    typed = [script, "run", "--toy", "true", "--out", "there", "--stage", "a"]
    path = os.pathsep.join(["site", str(ROOT / "bench")])
    for words in (typed, ["-c", OTHER_STAGES]):
        process = begin(*words, cwd=tmp_path, PYTHONPATH=path)
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    out = tmp_path / "there"
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    named = {line["name"]: line for line in lines}
    sides = [side for line in lines for side in line.get("sides", {}).values()]
    assert len(sides) == 7 and not [side for side in sides if "error" in side]
    assert {"device", "products", "copies", "head", "disk", "begin", "overlap"} <= set(named)
    assert named["pinning"]["works"] and len(named["pinning"]["totals"]) == 4
    steps = [line for line in lines if line["name"] == "sweep"]
    assert [line["tokens"] for line in steps] == [256, 128, 64]
    assert all(line["flops"] > 0 and len(line["seconds"]) == 3 for line in steps)
    assert b"traceEvents" in gzip.decompress((out / "trace.json.gz").read_bytes())
    assert len(list(out.iterdir())) == 3
    for script in ("pytest", "bench/gpu.py", "bench/compare.py", "bench/worker.py"):
        assert script in (tmp_path / "seen").read_text()
    matrices, last, attention = 12 * 64**2, 4 * 64**2, 64 * 64  # of one of 2 blocks, 2 FLOPs each
    held = named["held-block"]["sides"]["held-block"]
    flops = held["hardware_flops"] * 256 / held["tokens_per_second"]
    assert flops == pytest.approx(256 * 2 * 2 * (4 * (matrices + attention) - last))


@pytest.fixture
def gpu(monkeypatch):
    """The module bench/gpu.py."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu

    return gpu


def test_a_stage_ends_a_minute_before_a_call_of_ten(gpu):
    for parts in gpu.STAGES.values():
        assert sum(limit for limit, _ in parts.values()) <= 540


def test_a_part_ends_at_its_limit(tmp_path, gpu):
    """With the processes that it started."""
    words = ["sh", "-c", "sleep 1000 & echo $!; wait"]
    assert gpu.limited(words, 1, tmp_path / "log") == "stopped at its limit of 1 s"
    assert gone(int((tmp_path / "log").read_text().split()[-1]))
    assert gpu.limited(["false"], 10, tmp_path / "log") == "status 1"


def test_a_part_ends_with_its_parent(tmp_path):
    """Which is killed at a limit of its own."""
    log = tmp_path / "log"
    words = ["sh", "-c", "echo $$; exec sleep 1000"]
    script = f"import gpu, pathlib; gpu.limited({words}, 99, pathlib.Path({str(log)!r}))"
    parent = begin("-c", script, cwd=ROOT / "bench")
    while not (log.exists() and log.read_text().split()[-1].isdigit()):
        time.sleep(0.1)
    parent.kill()
    parent.communicate()
    assert gone(int(log.read_text().split()[-1]))


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(100):
        with suppress(ProcessLookupError, FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False
