"""What a run records and tells: metrics.jsonl, trackers, sample texts, traces, loss.png and the
time left."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configuration import Configuration
from engines.base import StepStats
from runtime import metrics

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
    lines = stop_at_3(run, config)
    content = b"\n".join([lines[0], *DAMAGED, *lines[1:], CUT])
    (config.out / "metrics.jsonl").write_bytes(content)
    (config.out / "loss.png").unlink()
    seen = run("train", config.path, "--checkpoint_path", "latest")
    assert seen.status == 0, seen.err
    assert f"metrics.jsonl: {len(DAMAGED)} damaged lines were dropped\n" in seen.err
    assert "failed" not in seen.out + seen.err
    assert "Traceback" not in seen.err
    assert [record["step"] for record in records(config.out)] == [1, 2, 3, 4, 5, 6]
    assert (config.out / "metrics.jsonl").read_bytes().splitlines()[:3] == lines[:3]
    assert (config.out / "loss.png").is_file()


def test_a_last_line_that_was_cut_off_is_not_worth_a_note(run, config):
    lines = stop_at_3(run, config)
    (config.out / "metrics.jsonl").write_bytes(b"\n".join([*lines, CUT]))
    seen = run("train", config.path, "--checkpoint_path", "latest")
    assert seen.status == 0, seen.err
    assert "damaged" not in seen.out + seen.err
    assert [record["step"] for record in records(config.out)] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_file_has_no_evaluation(run, config):
    """The evaluation of the last step is done if no line of metrics.jsonl has it."""
    lines = stop_at_3(run, config)
    flags = ["--num_steps", 3, "--checkpoint_path", "latest"]
    assert "nothing is left to train" in run("train", config.path, *flags).err
    (config.out / "metrics.jsonl").write_bytes(b"\n".join([*DAMAGED, *lines[:-1], b""]))
    assert run("train", config.path, *flags).status == 0
    assert [record["step"] for record in records(config.out, "val_loss")] == [3]


@pytest.mark.parametrize("name", [r"o$\frac$", "$", "a_b^{", "50% $x$"])
def test_the_title_of_the_picture_is_plain_text(run, config, pictures, tmp_path, name):
    out = tmp_path / name
    seen = run("train", config.path, "--num_steps", 1, "--out_dir", out)
    assert seen.status == 0, seen.err
    assert "failed" not in seen.out
    assert (out / "loss.png").is_file()


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
    """Of the first and the last step too; metrics.jsonl has all."""
    seen = run("train", config.path, "--log_steps", 4, "--eval_steps", 9)
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


def test_no_tracker(run, config):
    assert run("train", config.path, "--tracker", "null").status == 0
    assert len(records(config.out)) == 6
    assert not (config.out / "tensorboard").exists()


PROMPTS = ["--sample_prompts", "[abc, the ship]", "--eval_steps", 3]


@pytest.fixture
def samples(run, config) -> list[dict]:
    """What the resident engine writes after steps 3 and 6."""
    seen = run("train", config.path, *PROMPTS, "--out_dir", config.out / "first")
    assert seen.status == 0, seen.err
    found = records(config.out / "first", "samples")
    for record in found:
        for text, prompt in zip(record["samples"], ("abc", "the ship"), strict=True):
            assert text.startswith(prompt) and len(text) == len(prompt) + 64
            line = f"step {record['step']}/6 | after {json.dumps(prompt)} | {text[len(prompt) :]}\n"
            assert line in seen.out
    return found


@pytest.mark.parametrize(
    "flags",
    [
        ("--engine", "streaming", "--stream_to", "ram"),
        ("--engine", "streaming", "--stream_to", "disk"),
        pytest.param(("--num_systems", 2), marks=pytest.mark.long),
    ],
)
def test_every_engine_writes_the_same_samples(run, config, samples, flags):
    seen = run("train", config.path, *PROMPTS, *flags)
    assert seen.status == 0, seen.err
    assert [r["step"] for r in samples] == [3, 6]
    assert records(config.out, "samples") == samples


def test_tensorboard_has_the_configuration_and_the_samples(config, samples):
    events = EventAccumulator(str(config.out / "first/tensorboard"))
    events.Reload()
    texts = {
        tag: [e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")]
        for tag in ("configuration", "sample_0", "sample_1")
    }
    assert "    engine: resident\n" in texts["configuration"][0]
    assert [texts["sample_0"], texts["sample_1"]] == [
        [record["samples"][number] for record in samples] for number in range(2)
    ]


def test_samples_change_no_figure(run, config, samples):
    run("train", config.path, "--eval_steps", 3)
    for key in ("loss", "val_loss"):
        first = [r[key] for r in records(config.out / "first", key)]
        assert [r[key] for r in records(config.out, key)] == first


def test_samples_follow_the_model(config, samples):
    """They are drawn from the logits that the checkpoint's model gives to what comes before."""
    from model import GPT
    from weights.checkpoint import Checkpoint
    from weights.huggingface import load_tokenizer

    checkpoint = Checkpoint(config.out / "first/checkpoint_6.mdl")
    model = GPT(checkpoint.config)
    model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.weights})
    (ids,) = load_tokenizer(checkpoint)(samples[1]["samples"][0], return_tensors="pt")["input_ids"]
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
    assert [t.name for t in traces] == [
        f"trace_2-4_rank{rank}.json" for rank in range(2 if flags else 1)
    ]
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert sum(e.get("name") == "Optimizer.step#AdamW.step" for e in events) == 3


@pytest.mark.parametrize("value", ["4:9", "0:2", "3:2", "3", "a:b", "1:2:3"])
def test_a_profile_beyond_the_run_is_refused(run, config, value):
    seen = run("train", config.path, "--profile", value)
    assert (seen.status, seen.out) == (1, "")
    message = "is not START:STOP, two steps from 1 to num_steps 6"
    assert seen.err == f"error: profile: '{value}' {message}\n"


@pytest.mark.parametrize("key, value", [("sample_prompts", "[a]"), ("profile", "1:2")])
def test_what_the_cerebras_engine_has_not(run, config, key, value):
    seen = run("train", config.path, "--engine", "cerebras", f"--{key}", value)
    assert (seen.status, seen.out) == (1, "")
    assert seen.err == f"error: {key}: the cerebras engine has none; remove it\n"


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
    plan = SimpleNamespace(
        config=Configuration(out_dir=str(out), **keys), machine=SimpleNamespace(matmul=1e12)
    )
    return metrics.Metrics(plan, 0)


def step(told: metrics.Metrics, clock: SimpleNamespace, number: int, seconds: float = 2.0) -> None:
    clock.now += seconds
    told.log_step(StepStats(number, 1.0, 1.0, 1e-3, seconds, 128 * number, [], True))


def test_the_eta_follows_the_pace(tmp_path, clock, capsys):
    """So far: an evaluation that took 10 s is part of it."""
    told = ten_steps(tmp_path)

    def left() -> str:
        return capsys.readouterr().out.splitlines()[-1].split(" | ")[-1]

    step(told, clock, 1)
    assert left() == "ETA 0:00:18"
    clock.now += 10
    step(told, clock, 2)
    assert left() == "ETA 0:00:56"
    told.close()


def test_the_eta_within_the_first_step(tmp_path, clock, capsys):
    told = ten_steps(tmp_path)
    clock.now += 100
    told.report_progress(0.5)
    assert capsys.readouterr().out == "step 1/10 | 50% | ETA 0:31:40\n"
    told.close()
