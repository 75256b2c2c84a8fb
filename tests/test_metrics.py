"""What a run records and tells: metrics.jsonl, trackers, sample texts, traces, loss.png and the
time left."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import figures, records
from helpers import train_once
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configuration import Configuration
from engines.base import StepStats
from model import GPT
from runtime import metrics
from weights.checkpoint import Checkpoint
from weights.huggingface import load_tokenizer

DAMAGED = [
    b"\xff\xfe{}",  # not UTF-8
    b'{"step": 1, "lo',
    b"[" * 100_000,
    b"[1]",
    b"1",
    b'{"loss": 1.0}',
    b'{"step": "1", "loss": 1.0}',
    b'{"step": 1.5, "loss": 1.0}',
    b'{"step": -1, "loss": 1.0}',
    b'{"step": 1%b, "loss": 1.0}' % (b"0" * 5000),
]
CUT = b'{"step": 4, "lo'  # as a killed run leaves it


def stop_at_3(run, config) -> list[bytes]:
    """The lines of a run whose checkpoint of step 3 is the last."""
    assert run("train", config.path, "--num_steps", 3).status == 0
    return (config.out / "metrics.jsonl").read_bytes().splitlines()


def test_damaged_lines_are_left_out_and_the_others_kept(run, config):
    """A last line that was cut off is not worth a note."""
    lines = stop_at_3(run, config)
    for middle, note in (
        (DAMAGED, f"metrics.jsonl: {len(DAMAGED)} damaged lines were dropped\n"),
        ([], ""),
    ):
        content = b"\n".join([lines[0], *middle, *lines[1:], CUT])
        (config.out / "metrics.jsonl").write_bytes(content)
        (config.out / "loss.png").unlink()
        seen = run("train", config.path, "--checkpoint_path", config.out / "checkpoint_3.mdl")
        assert seen.status == 0, seen.err
        assert note in seen.err and ("were dropped" in seen.err) == bool(note)
        assert "failed" not in seen.out + seen.err
        assert "Traceback" not in seen.err
        assert [record["step"] for record in records(config.out)] == [1, 2, 3, 4, 5, 6]
        assert (config.out / "metrics.jsonl").read_bytes().splitlines()[:3] == lines[:3]
        assert (config.out / "loss.png").is_file()
        shutil.rmtree(config.out / "checkpoint_6.mdl")


def test_a_damaged_file_has_no_evaluation(run, config):
    """The evaluation of the last step is done if no line of metrics.jsonl has it."""
    lines = stop_at_3(run, config)
    flags = ["--num_steps", 3, "--checkpoint_path", "latest"]
    assert "nothing is left to train" in run("train", config.path, *flags).err
    (config.out / "metrics.jsonl").write_bytes(b"\n".join([*DAMAGED, *lines[:-1], b""]))
    assert run("train", config.path, *flags).status == 0
    assert [record["step"] for record in records(config.out, "val_loss")] == [3]


@pytest.mark.parametrize("name", [r"o$\frac$", "$", "a_b^{", "50% $x$"])
def test_the_title_of_the_picture_is_plain_text(tmp_path, clock, capsys, pictures, name):
    (tmp_path / name).mkdir()
    told = ten_steps(tmp_path / name)
    step(told, clock, 1)
    told.draw()
    told.close()
    assert "failed" not in "".join(capsys.readouterr())
    assert (tmp_path / name / "loss.png").is_file()


def test_a_step_records_its_tokens_seconds_and_memory(run, config):
    stop_at_3(run, config)
    assert run("train", config.path, "--checkpoint_path", "latest").status == 0
    steps = records(config.out)
    assert [record["tokens"] for record in steps] == [4 * 32 * step for step in range(1, 7)]
    for record in steps:
        assert record["seconds"] == pytest.approx(4 * 32 / record["tokens_per_second"])
        assert 2**20 < record["memory"] < 2**40
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    assert {"tokens", "seconds", "memory"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("tokens")] == [r["tokens"] for r in steps]


def test_the_picture_says_what_ran_and_how_it_ended(tmp_path):
    (tmp_path / "words").mkdir()
    told = ten_steps(tmp_path / "words")
    told.done = 3
    lines = told._title([{"step": 2, "loss": 3.5}, {"step": 3, "loss": 2.5}]).split("\n")
    told.close()
    assert lines[0].startswith(f"{tmp_path}/words: 125,226,240 parameters, ")
    assert lines[1] == "step 3 of 10, loss 2.5000"


def test_a_log_has_a_line_every_so_many_steps(run, config):
    """Of the first and the last step too; metrics.jsonl has all, also without a tracker."""
    flags = ["--log_steps", 4, "--eval_steps", 9, "--tracker", "null"]
    seen = run("train", config.path, *flags)
    assert not (config.out / "tensorboard").exists()
    shown = [line.split(" | ")[0] for line in seen.out.splitlines() if "grad_norm" in line]
    assert shown == ["step 1/6", "step 4/6", "step 6/6"]
    assert len(records(config.out)) == 6
    assert f"python sample.py --checkpoint_path {config.out}\n" in seen.out


def test_the_picture_is_smoothed_without_a_bias():
    assert metrics._smoothed([2.0] * 200) == pytest.approx([2.0] * 200)
    assert metrics._smoothed([4.0, 2.0]) == [4.0, 2.0]
    ends = metrics._smoothed([4.0] * 100 + [2.0] * 100)[99::100]
    assert ends == pytest.approx([4.0, 2.0], abs=1e-6)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_does_not_end_the_training(run, config, name):
    seen = run("train", config.path, "--tracker", name)
    assert seen.status == 0 and "step 6/6" in seen.out
    assert seen.err.count(f"failed ({name} is not installed: pip install {name}); ") == 1


PROMPTS = {"sample_prompts": ["abc", "the ship"], "eval_steps": 3}


@pytest.fixture(scope="module")
def sampled(dataset, tmp_path_factory) -> SimpleNamespace:
    """A run of the resident engine (path, out), and its samples after steps 3 and 6."""
    config = train_once(tmp_path_factory.mktemp("sampled"), dataset, **PROMPTS)
    config.samples = records(config.out, "samples")
    return config


@pytest.mark.parametrize(
    "flags",
    [
        ("--engine", "streaming", "--stream_to", "ram"),
        ("--engine", "streaming", "--stream_to", "disk"),
        pytest.param(("--num_systems", 2), marks=pytest.mark.long),
    ],
)
def test_every_engine_writes_the_same_samples(run, config, sampled, flags):
    prompts = ["--sample_prompts", "[abc, the ship]", "--eval_steps", 3]
    seen = run("train", config.path, *prompts, *flags)
    assert seen.status == 0, seen.err
    assert records(config.out, "samples") == sampled.samples
    assert [record["step"] for record in sampled.samples] == [3, 6]
    for record in sampled.samples:
        for text, prompt in zip(record["samples"], ("abc", "the ship"), strict=True):
            assert text.startswith(prompt) and len(text) == len(prompt) + 64
            line = f"step {record['step']}/6 | after {json.dumps(prompt)} | {text[len(prompt) :]}\n"
            assert line in seen.out


def test_tensorboard_has_the_configuration_and_the_samples(sampled):
    events = EventAccumulator(str(sampled.out / "tensorboard"))
    events.Reload()
    texts = {
        tag: [e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")]
        for tag in ("configuration", "sample_0", "sample_1")
    }
    assert "    engine: resident\n" in texts["configuration"][0]
    assert [texts["sample_0"], texts["sample_1"]] == [
        [record["samples"][number] for record in sampled.samples] for number in range(2)
    ]


def test_samples_change_no_figure(run, config, sampled):
    run("train", config.path, "--eval_steps", 3)
    without = [record for record in figures(sampled.out) if "samples" not in record]
    assert figures(config.out) == without


def test_samples_follow_the_model(sampled):
    """They are drawn from the logits that the checkpoint's model gives to what comes before."""
    checkpoint = Checkpoint(sampled.out / "checkpoint_6.mdl")
    model = GPT(checkpoint.config)
    model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.weights})
    first = sampled.samples[1]["samples"][0]
    (ids,) = load_tokenizer(checkpoint)(first, return_tensors="pt")["input_ids"]
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for end in range(3, 40):  # beyond the 32 positions of the model
            logits = model(ids[None, max(0, end - 32) : end])[0, -1]
            top, tokens = logits.topk(len(logits))
            both = torch.stack([top, top]) / 0.8  # two prompts are drawn at once
            drawn = both.softmax(1).multinomial(1, generator=draws)[0]
            assert tokens[drawn] == ids[end]


def test_a_prompt_that_can_not_be_encoded_is_refused_before_the_training(run, config):
    seen = run("train", config.path, "--sample_prompts", "[abc, Z9]")
    assert seen.status == 1 and not (config.out / "metrics.jsonl").exists()
    assert seen.err.startswith("error: the prompt 'Z9' has a character that the vocabulary lacks")


@pytest.mark.parametrize("flags", [(), pytest.param(("--num_systems", 2), marks=pytest.mark.long)])
def test_a_trace_of_some_steps(run, config, flags):
    seen = run("train", config.path, "--profile", "2:4", *flags)
    assert seen.status == 0, seen.err
    traces = sorted(config.out.glob("trace_*"))
    names = [f"trace_2-4_rank{rank}.json" for rank in range(2 if flags else 1)]
    assert [trace.name for trace in traces] == names
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert sum(e.get("name") == "Optimizer.step#AdamW.step" for e in events) == 3


PROFILES = ["4:9", "0:2", "3:2", "3", "a:b", "1:2:3"]
RANGE = "is not START:STOP, two steps from 1 to num_steps 6"
CEREBRAS = ["--engine", "cerebras"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *((["--profile", value], f"profile: '{value}' {RANGE}") for value in PROFILES),
        ([*CEREBRAS, "--profile", "1:2"], "profile: the cerebras engine has none; remove it"),
        (
            [*CEREBRAS, "--sample_prompts", "[a]"],
            "sample_prompts: the cerebras engine has none; remove it",
        ),
    ],
)
def test_what_a_run_cannot_record(run, config, flags, message):
    seen = run("train", config.path, *flags)
    assert (seen.status, seen.out, seen.err) == (1, "", f"error: {message}\n")


def test_a_profile_of_steps_that_are_done(run, config):
    stop_at_3(run, config)
    seen = run("train", config.path, "--checkpoint_path", "latest", "--profile", "2:5")
    assert seen.status == 0 and not list(config.out.glob("trace*"))
    assert "profile: 2:5 begins with a step that is done; nothing is traced" in seen.err


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The time that metrics.py sees."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def ten_steps(out: Path) -> metrics.Metrics:
    keys = {"sequence_length": 32, "num_steps": 10, "batch_size": 4, "log_steps": 1}
    config, machine = Configuration(out_dir=str(out), **keys), SimpleNamespace(matmul=1e12)
    return metrics.Metrics(SimpleNamespace(config=config, machine=machine), 0)


def step(told: metrics.Metrics, clock: SimpleNamespace, number: int, seconds: float = 2.0) -> None:
    clock.now += seconds
    told.log_step(StepStats(number, 1.0, 1.0, 1e-3, seconds, 128 * number, [], True))


def test_the_eta_follows_the_pace(tmp_path, clock, capsys):
    """So far, within the first step too: an evaluation that took 10 s is part of it."""
    told = ten_steps(tmp_path)
    step(told, clock, 1)
    assert capsys.readouterr().out.endswith(" | ETA 0:00:18\n")
    clock.now += 10
    step(told, clock, 2)
    assert capsys.readouterr().out.endswith(" | ETA 0:00:56\n")
    told.close()
    told = ten_steps(tmp_path)
    clock.now += 100
    told.report_progress(0.5)
    assert capsys.readouterr().out == "step 1/10 | 50% | ETA 0:31:40\n"
    told.close()
