"""What a run records and tells: metrics.jsonl, loss.png and the time left."""

from pathlib import Path
from types import SimpleNamespace

import pytest
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
    b'{"step": 1, "loss": "low"}',
    b'{"step": 1, "loss": ""}',
    b'{"step": 1, "val_loss": [1.0]}',
    b'{"step": 1, "loss": 1%b}' % (b"0" * 400),
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
def test_the_title_of_the_picture_is_plain_text(run, config, tmp_path, name):
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


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The time that metrics.py sees."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def ten_steps(out: Path, eval_seconds: float, save_seconds: float) -> metrics.Metrics:
    """Evaluations are due at 4, 8 and 10, saves at 5 and 10."""
    keys = {"num_steps": 10, "eval_steps": 4, "checkpoint_steps": 5, "batch_size": 4}
    plan = SimpleNamespace(
        config=Configuration(out_dir=str(out), sequence_length=32, **keys),
        machine=SimpleNamespace(matmul=1e12),
        eval_seconds=eval_seconds,
        save_seconds=save_seconds,
    )
    return metrics.Metrics(plan, 0)


def step(told: metrics.Metrics, clock: SimpleNamespace, number: int, seconds: float = 2.0) -> None:
    clock.now += seconds
    told.log_step(StepStats(number, 1.0, 1.0, 1e-3, seconds, 128 * number, [], True))


def test_the_eta_has_the_evaluations_and_saves_to_come(tmp_path, clock, capsys):
    told = ten_steps(tmp_path, eval_seconds=50, save_seconds=300)

    def left() -> str:
        return capsys.readouterr().out.splitlines()[-1].split(" | ")[-1]

    step(told, clock, 1)
    assert left() == "ETA 0:12:48"  # 9 steps of 2 s, 3 evaluations, 2 saves
    for number in (2, 3, 4):
        step(told, clock, number)
    assert left() == "ETA 0:12:42"
    with told.timed("evaluation"):
        clock.now += 10
    step(told, clock, 5)
    assert left() == "ETA 0:10:30"  # 5 steps, 2 evaluations of 10 s, 2 saves
    with pytest.raises(OSError), told.timed("save"):
        raise OSError
    step(told, clock, 6)
    assert left() == "ETA 0:05:28"  # one save as long as was forecast
    for number in (7, 8, 9, 10):
        step(told, clock, number)
    assert left() == "ETA 0:05:10"  # the last evaluation and save
    told.close()


def test_the_eta_within_the_first_step(tmp_path, clock, capsys):
    told = ten_steps(tmp_path, eval_seconds=float("nan"), save_seconds=30)
    clock.now += 100
    told.progress(0.5)
    assert capsys.readouterr().out == "step 1/10 | 50% | ETA 0:32:40\n"  # 9.5 steps, 2 saves
    told.close()


def test_other_ranks_record_nothing(tmp_path):
    keys = {"machine": SimpleNamespace(matmul=1e12), "eval_seconds": 0, "save_seconds": 0}
    plan = SimpleNamespace(config=Configuration(out_dir=str(tmp_path)), **keys)
    told = metrics.Metrics(plan, 0, enabled=False)
    told.log_step(StepStats(1, 1.0, 1.0, 1e-3, 1.0, 128, [], True))
    with told.timed("evaluation"):
        told.log_evaluation(1, 1.0)
    told.progress(0.5)
    told.draw()
    told.close()
    assert not list(tmp_path.iterdir())
