"""Training through the command and, where a step must be disturbed, through the engine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, VOCABULARY, figures, records, refused, text, write_dataset
from helpers import (
    ENVIRONMENT,
    batches_of,
    build,
    close,
    command,
    engine_config,
    eval_data,
    quiet,
    reference,
    train,
    weights,
)

import ops
from common.files import read_sealed
from common.tokens import write_meta
from configuration import Configuration
from engines import open_engine
from engines.optimizer import learning_rate, square_sum
from planner.machine import program_bytes
from weights.checkpoint import Checkpoint


@pytest.mark.parametrize("micro_batch_size", [4, 3])
def test_equals_a_plain_loop(dataset, micro_batch_size):
    """20 steps, clipping active in each, against the plainest PyTorch there is."""
    config = engine_config(micro_batch_size=micro_batch_size, dropout=0.0)
    stats, engine = train(config, dataset)

    model = build(config, config.seed)
    expected = reference(config, model, model, batches_of(config, dataset))
    for got, (loss, norm) in zip(stats, expected, strict=True):
        assert norm > 0.1
        assert close(got.loss, loss, 1e-6), got.step
        # clipping within AdamW rounds differently, and Adam passes that on; one step of these
        # twenty is ill-conditioned: 1e-5, and the others below 2e-6
        assert close(got.grad_norm, norm, 2e-5), got.step
    assert stats[-1].loss < stats[0].loss - 0.2
    assert engine.optimizer_steps == 20


def test_a_norm_is_exact():
    """In one piece a CPU's fp32 sum over an embedding of 50257 × 768 is off by 0.3%."""
    numbers = torch.randn(50257 * 768 + 7, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = numbers.double().square().sum().item()
    assert square_sum([numbers]).item() == pytest.approx(exact, rel=1e-6)


def first_gradients(config: Configuration, dataset: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the first step, and its gradients as the optimizer gets them."""
    engine, gradients = open_engine(config), {}
    engine.initialize()
    named = dict(zip(engine.weights, engine.model.parameters(), strict=True))

    def keep(*arguments: object) -> None:
        gradients.update({name: parameter.grad.clone() for name, parameter in named.items()})

    engine.optimizer.register_step_pre_hook(keep)
    (stats,) = engine.run(batches_of(config, dataset), 0, 1, quiet)
    return stats.loss, gradients


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_many_micro_batches_equal_one(dataset, precision, tolerance):
    """The sum of 256 gradients loses nothing, in bf16 neither."""
    grads = []
    for micro_batch_size in (256, 1):
        sizes = {"batch_size": 256, "micro_batch_size": micro_batch_size}
        config = engine_config(**sizes, precision=precision, max_gradient_norm=1e9)
        loss, named = first_gradients(config, dataset)
        grads.append(torch.cat([gradient.flatten() for gradient in named.values()]))
        assert grads[-1].dtype == torch.float32
    assert (grads[1] - grads[0]).norm() <= tolerance * grads[0].norm()
    assert loss == pytest.approx(np.log(VOCABULARY), rel=0.05)


def test_gradients_in_bf16_are_summed_in_fp32(dataset):
    """On a CPU PyTorch sums the gradients of an embedding and of a LayerNorm in bf16, where those
    of frequent tokens stop growing: 512 × 32 positions of 27 characters would show it."""
    grads = {}
    for precision in ("fp32", "bf16"):
        sizes = {"batch_size": 512, "micro_batch_size": 512, "max_gradient_norm": 1e9}
        _, grads[precision] = first_gradients(engine_config(**sizes, precision=precision), dataset)
    for name, exact in grads["fp32"].items():
        exact, rounded = exact.flatten(), grads["bf16"][name].flatten()
        if name.endswith("qkv.bias"):  # the keys' true gradient is zero
            exact, rounded = exact[64:], rounded[64:]
        assert (rounded - exact).norm() <= 0.03 * exact.norm(), name


def test_clips_in_every_step(dataset):
    """The original clipped in the first step alone: with a tiny norm Adam's steps must not change,
    but its second moments stay as tiny as the clipped gradients."""
    _, engine = train(engine_config(max_gradient_norm=1e-3), dataset)
    total = sum(state["exp_avg_sq"].sum() for state in engine.optimizer.state.values())
    assert 0 < total <= 1.001e-6


def test_seed_seeds_the_weights_and_the_data(dataset):
    first = [train(engine_config(seed=seed), dataset, 1)[0][0].loss for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_decay_is_for_matrices_only(dataset):
    engines = [train(engine_config(weight_decay=w), dataset, 1)[1] for w in (0.0, 0.5)]
    first = open_engine(engine_config())
    first.initialize()
    rate = learning_rate(engine_config(), 1)
    for weight, decayed, before in zip(
        *(engine.weights.values() for engine in (*engines, first)), strict=True
    ):
        lost = weight - decayed
        expected = rate * 0.5 * before if before.dim() == 2 else torch.zeros_like(before)
        assert torch.allclose(lost, expected, rtol=0, atol=1e-7)
        assert before.dim() == 1 or lost.abs().max() > 1e-6


@pytest.mark.parametrize("rate", ["1e30", "1e5", "1e3"])
def test_weights_that_diverged_are_not_named_as_good(run, config, rate):
    """The checkpoint holds what a much too high learning rate made of them; with 1e3 the loss is
    finite for one more step."""
    flags = ["--checkpoint_steps", 1, "--keep_checkpoints", 1, "--num_steps", 40]
    seen = run("train", config.path, *flags, "--learning_rate", rate)
    refused(seen, "is not finite; start again in another --out_dir, with a lower learning_rate")
    assert list(config.out.glob("checkpoint_?.mdl"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_counts_every_token_with_dropout_off(dataset, precision):
    """The original left dropout on, dropped the last tokens and summed the losses in bf16."""
    config = engine_config(dropout=0.5, micro_batch_size=3, precision=precision)
    _, engine = train(config, dataset, 2)
    data = eval_data(dataset, VOCABULARY, 32, 4)
    loss, count = engine.evaluate(data, 4)
    assert (loss, count) == engine.evaluate(data, 4)
    meta = json.loads((dataset / "meta.json").read_text())
    assert count == meta["tokens"]["val"] - 1
    model, ids = engine.model.eval(), torch.from_numpy(np.fromfile(dataset / "val.bin", np.uint16))
    expected = 0.0
    for first in range(0, len(ids) - 1, 32):
        window = ids[first : first + 33].long()[None]
        logits = model(window[:, :-1]).double().squeeze(0)
        expected += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    assert loss == pytest.approx(expected, rel=1e-6)


def test_a_run_leaves_what_it_should(run, config, pictures):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = run("train", config.path)
    assert seen.status == 0, seen.err
    assert sorted(path.name for path in config.out.iterdir()) == [
        *("checkpoint_3.mdl", "checkpoint_6.mdl", "config.yaml"),
        *("lock", "loss.png", "metrics.jsonl", "tensorboard"),
    ]
    steps = records(config.out)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == {
        *("step", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "memory"),
        *("tokens_per_second", "mfu"),
    }
    assert [set(r) for r in records(config.out, "val_loss")] == [{"step", "val_loss"}]
    assert (config.out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    (line,) = [line for line in seen.out.splitlines() if line.startswith("step 3/6 | loss ")]
    for word in ("lr", "grad_norm", "tokens/s", "MFU", "GB", "ETA"):
        assert word in line
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    got = [e.value for e in events.Scalars("loss")]
    assert got == pytest.approx([record["loss"] for record in steps], rel=1e-6)
    assert len(events.Scalars("val_loss")) == 1


def test_resume_drops_the_records_beyond_its_checkpoint(run, config):
    run("train", config.path)
    before = figures(config.out)
    shutil.rmtree(config.out / "checkpoint_6.mdl")
    with open(config.out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')  # as a killed run leaves it
    assert run("train", config.path, "--checkpoint_path", "latest").status == 0
    assert figures(config.out) == before


def test_what_auto_chose_is_kept_on_resume(run, config):
    run("train", config.path, "--num_steps", 3, "--precision", "bf16", "--micro_batch_size", 2)
    assert Checkpoint(config.out / "checkpoint_3.mdl").config.precision == "bf16"
    seen = run("train", config.path, "--checkpoint_path", "latest")
    assert "bf16" in seen.out
    assert "2 micro-batches of 2 × 32" in seen.out
    flags = ["--checkpoint_path", "latest", "--num_steps", 9, "--precision", "fp32"]
    seen = run("train", config.path, *flags)
    assert "precision" not in seen.err


def test_the_configuration_of_a_run_is_one_again(run, config, stopped, tmp_path):
    content = (config.out / "config.yaml").read_text()
    assert "# chosen here: engine: resident\n" in content
    assert "# chosen here: precision: fp32\n" in content
    again = tmp_path / "again"
    assert run("train", config.out / "config.yaml", "--out_dir", again).status == 0
    assert [r["loss"] for r in records(again)] == [r["loss"] for r in records(config.out)]
    for systems in (2, 3):  # nothing that was chosen for one system stands in the way
        seen = run("plan", config.out / "config.yaml", "--num_systems", systems)
        assert seen.status == 0 and f"{systems} processes, {systems} share a copy" in seen.out


def test_a_dataset_that_is_prepared_anew_while_a_run_goes_on(run, config, monkeypatch, tmp_path):
    """The run keeps what it opened: batches, evaluations and the tokenizer of its checkpoints."""
    import train as program

    flags = ["--num_steps", 6, "--eval_steps", 2, "--checkpoint_steps", 2]
    folder = Path(config.values["dataset"])
    mine = shutil.copytree(folder, tmp_path / "mine")
    flags += ["--dataset", mine]
    assert run("train", config.path, *flags).status == 0
    expected = figures(config.out)
    other = write_dataset(tmp_path / "other", "ABC" * 9000, "ABC" * 500)
    save = program.save
    out = tmp_path / "b"

    def save_and_replace(*arguments) -> Path:
        path = save(*arguments)
        if path.name == "checkpoint_2.mdl":
            for file in other.iterdir():
                os.replace(file, mine / file.name)
        return path

    monkeypatch.setattr(program, "save", save_and_replace)
    assert run("train", config.path, *flags, "--out_dir", out).status == 0
    assert figures(out) == expected
    tokenizer = (folder / "tokenizer.json").read_bytes()
    assert Checkpoint(out / "checkpoint_6.mdl").tokenizer.read_bytes() == tokenizer
    flags[-1] = folder
    flags += ["--out_dir", out, "--num_steps", 7, "--checkpoint_path", out]
    seen = run("train", config.path, *flags)
    assert seen.status == 0 and "data order" not in seen.err


def test_other_data_of_the_same_size_are_told(run, config, stopped, tmp_path):
    other = write_dataset(tmp_path / "other", text(7, 4000), text(7, 301))
    sizes = {Path(f, "train.bin").stat().st_size for f in (other, config.values["dataset"])}
    assert len(sizes) == 1
    seen = run("train", config.path, "--checkpoint_path", "latest", "--dataset", other)
    assert seen.status == 0
    checkpoint = config.out / "checkpoint_3.mdl"
    assert f"{other}/train.bin is not what {checkpoint} was trained on; data" in seen.err


def test_a_checkpoint_that_was_moved_to_another_disk(run, config, stopped, tmp_path):
    """A link stands in its place: the run goes on from it, and deletes no more than the link."""
    moved = (config.out / "checkpoint_3.mdl").rename(tmp_path / "moved")
    (config.out / "checkpoint_3.mdl").symlink_to(moved)
    flags = ["--checkpoint_path", "latest", "--keep_checkpoints", 1]
    seen = run("train", config.path, *flags)
    assert seen.status == 0, seen.err
    assert [path.name for path in config.out.glob("*.mdl*")] == ["checkpoint_6.mdl"]
    assert Checkpoint(moved).step == 3


def test_a_checkpoint_that_is_pruned_while_it_is_evaluated(run, config, stopped, monkeypatch):
    check = Checkpoint.check_model

    def prune_first(checkpoint: Checkpoint):
        shutil.rmtree(checkpoint.path)
        return check(checkpoint)

    monkeypatch.setattr(Checkpoint, "check_model", prune_first)
    seen = run("eval", config.path, "--checkpoint_path", "latest")
    refused(seen, "checkpoint_3.mdl was deleted while it was read, maybe by a run with keep_ch")


def test_from_another_folder(run, config, monkeypatch, tmp_path):
    """Datasets are looked for where one is, and then in the repository."""
    from common import tokens

    repository, here = tmp_path / "repository", tmp_path / "here"
    shutil.copytree(config.values["dataset"], repository / "data" / "words")
    here.mkdir()
    monkeypatch.setattr(tokens, "ROOT", repository)
    monkeypatch.chdir(here)
    flags = ["--dataset", "data/words"]
    assert run("train", config.path, *flags).status == 0
    assert run("eval", config.path, *flags, "--checkpoint_path", config.out).status == 0
    again = ["--checkpoint_path", "latest", "--out_dir", config.out, "--num_steps", 7]
    seen = run("train", config.path, *flags, *again)
    assert seen.status == 0 and "dataset is" not in seen.err
    flags = ["--out_dir", "out", "--dataset"]
    seen = run("train", config.path, *flags, "data/other")
    refused(seen, f"{here}/data/other/meta.json is missing: prepare the dataset; run: python ../")
    shutil.copyfile(repository / "data/words/train.bin", here / "train.bin")
    seen = run("train", config.path, *flags, here)
    refused(seen, f"GPT-2's, run: python ../repository/data/prepare.py --adopt {here}")


def test_no_home(run, config, monkeypatch):
    """As in a container whose user has no entry in /etc/passwd."""
    import pwd

    def unknown(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    seen = run("train", config.path)
    assert seen.status == 0, seen.err


@pytest.mark.long
def test_a_console_that_is_closed_or_narrow(config):
    """Started by a program that closes all files, or where nothing but ASCII can be printed."""
    train = f"{sys.executable} train.py {config.path} --num_steps 2"
    closed = ["sh", "-c", f"{train} <&- >&- 2>&-"]
    assert subprocess.run(closed, cwd=ROOT).returncode == 0
    assert Checkpoint(config.out / "checkpoint_2.mdl").step == 2
    assert len(records(config.out)) == 2
    narrow = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [*train.split(), "--out_dir", f"{config.out}-ä×"]
    done = subprocess.run(command, cwd=ROOT, env=narrow, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"4 \\xd7 32" in done.stdout


def test_an_unfinished_checkpoint_is_not_picked_up(run, config, stopped):
    for name in ("checkpoint_9.mdl.writing", "checkpoint_8.mdl.deleting"):
        (config.out / name).mkdir()
    seen = run("train", config.path, "--checkpoint_path", "latest")
    assert "resumed from" in seen.out and "checkpoint_3.mdl" in seen.out
    assert not list(config.out.glob("*.writing")) + list(config.out.glob("*.deleting"))
    Checkpoint(config.out / "checkpoint_6.mdl").read("head.norm.weight")


LOSSES = {  # of a part of a checkpoint, and what is said of it
    "manifest.json": (Path.unlink, "manifest.json is missing"),
    "head.safetensors": (Path.unlink, "head.safetensors is missing"),
    "tokenizer.json": (lambda path: os.truncate(path, 9), "tokenizer.json has 9 bytes, not "),
}


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", LOSSES)
def test_a_checkpoint_that_lost_a_part_is_refused_by_name(run, config, name, tmp_path):
    """By every command, whether it is named, newest, or in the way; nothing is deleted, neither the
    records nor what is left of it; moved away, it is out of the way."""
    run("train", config.path)
    broken = config.out / "checkpoint_6.mdl"
    lose, loss = LOSSES[name]
    lose(broken / name)
    message = f"{broken} is damaged: {loss}"
    before = contents(config.out)
    for path in ("latest", config.out, broken):
        flags = ["--checkpoint_path", path]
        refused(run("train", config.path, *flags), message)
        refused(run("train", config.path, *flags, "--num_steps", 9), message)
        refused(seen := run("eval", config.path, *flags), message)
        assert "copy it again, or move it away to use the one before" in seen.err
        refused(run("sample", *flags, "--prompt", "a", "--out_dir", config.out), message)
    for path in (config.out, broken):
        refused(run("export", "--checkpoint_path", path, "--out", tmp_path / "hf"), message)
    in_the_way = f"{config.out} already has checkpoint_6.mdl; "
    refused(run("train", config.path), in_the_way)
    older = ["--checkpoint_path", config.out / "checkpoint_3.mdl"]
    refused(run("train", config.path, *older), in_the_way)
    assert contents(config.out) == before
    broken.rename(tmp_path / "away")
    assert run("train", config.path, "--checkpoint_path", "latest").status == 0
    assert [record["step"] for record in records(config.out)] == [1, 2, 3, 4, 5, 6]
    assert Checkpoint(broken).step == 6


def test_the_only_checkpoint_without_its_manifest(run, config, stopped):
    """No run begins anew where the weights of another may still be rescued."""
    (config.out / "checkpoint_3.mdl" / "manifest.json").unlink()
    before = contents(config.out)
    seen = run("train", config.path, "--checkpoint_path", "latest")
    refused(seen, "checkpoint_3.mdl is damaged: manifest.json is missing; copy it again, or move")
    assert contents(config.out) == before


def test_the_records_of_a_run_without_checkpoints_are_kept(run, config, tmp_path):
    """Its checkpoints were moved away, and another run begins in its folder."""
    run("train", config.path)
    before = (config.out / "metrics.jsonl").read_text()
    for path in config.out.glob("*.mdl"):
        path.rename(tmp_path / path.name)
    seen = run("train", config.path, "--checkpoint_path", "latest", "--seed", 1)
    assert "starting from random weights" in seen.out
    assert (config.out / "metrics.dropped.jsonl").read_text() == before
    assert [record["step"] for record in records(config.out)] == [1, 2, 3, 4, 5, 6]


def test_eval_refuses_another_model(run, config, stopped, tmp_path):
    """As train.py does; keys that are not the model's may differ, as may those of its training."""
    latest = ["--checkpoint_path", "latest"]
    for flags, message in (
        (["--width", 64, "--depth", 7], "its width is 32, this configuration's 64"),
        (["--depth", 7], "its depth is 2, this configuration's 7"),
        (["--vocab_size", 500], "its vocab_size is 27, this configuration's 500"),
        (["--activation", "gelu_new"], "its activation is gelu, this configuration's gelu_new"),
    ):
        for name in ("eval", "train"):
            seen = run(name, config.path, *latest, *flags)
            refused(seen, f"{config.out}/checkpoint_3.mdl is of another model: {message}")
    expected = run("eval", config.path, *latest).out
    others = ["--dropout", 0.5, "--init_std", 1.0, "--seed", 7, "--learning_rate", 1]
    assert run("eval", config.path, *latest, *others).out == expected
    large = write_dataset(tmp_path / "large", text(1, 300) + "ABC", "abc" * 20)
    for name in ("eval", "train"):
        seen = run(name, config.path, *latest, "--dataset", large)
        refused(seen, "use another dataset, or for a new model --vocab_size 30")


def test_eval_takes_the_model_of_a_checkpoint_with_init_from(run, config, stopped, tmp_path):
    """Such a configuration has no keys of the model."""
    run("export", "--checkpoint_path", config.out, "--out", tmp_path / "hf")
    keys = ("out_dir", "dataset", "batch_size", "sequence_length", "backend")
    values = {key: config.values[key] for key in keys} | {"init_from": str(tmp_path / "hf")}
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(values))
    expected = run("eval", config.path, "--checkpoint_path", "latest").out
    seen = run("eval", tmp_path / "finetune.yaml", "--checkpoint_path", "latest")
    assert (seen.status, seen.out) == (0, expected)


def test_eval_where_there_is_no_checkpoint(run, config):
    flags = ["eval", config.path, "--checkpoint_path"]
    refused(run(*flags, "latest"), f"{config.out}: there is no such checkpoint or run")
    config.out.mkdir()
    refused(run(*flags, "latest"), f"{config.out} is not a checkpoint, nor the out_dir")
    refused(run(*flags[:2]), "--checkpoint_path is required: the path of a checkpoint, the folder")


def test_going_back_does_not_mix_with_later_checkpoints(run, config):
    run("train", config.path)
    back = config.out / "checkpoint_3.mdl"
    refused(run("train", config.path), "already has checkpoint_6.mdl; add --checkpoint_path latest")
    refused(run("train", config.path, "--checkpoint_path", back), "already has checkpoint_6.mdl")
    fork = run("train", config.path, "--checkpoint_path", back, "--out_dir", config.out / "fork")
    assert fork.status == 0
    a, b = (weights(out / "checkpoint_6.mdl") for out in (config.out, config.out / "fork"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_num_steps_already_reached(run, config, stopped):
    seen = run("train", config.path, "--num_steps", 3, "--checkpoint_path", "latest")
    refused(seen, "is at step 3 and num_steps is 3: nothing is left to train; raise --num_steps")


def test_changed_data_order_is_said(run, config, stopped):
    seen = run("train", config.path, "--checkpoint_path", "latest", "--batch_size", 8)
    assert "warning: batch_size is 8; it was 4 in" in seen.err
    assert "; data order will differ" in seen.err
    assert "warning: num_steps is 6; it was 3 in" in seen.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "CSX"], "engine: cerebras needs the package cerebras_pytorch, in an"),
        (["--engine", "cerebras"], "venv cs && cs/bin/pip install -r requirements-cerebras.txt"),
        (["--backend", "CSX", "--num_systems", "5"], "batch_size: 4 is smaller than num_systems 5"),
        (["--backend", "CSX", "--engine", "resident"], "backend: CSX is not for engine resident"),
        (["--backend", "GPU", "--engine", "cerebras"], "backend: GPU is not for engine cerebras"),
        (["--engine", "cerebras", "--precision", "bf16"], "bf16 is not for engine cerebras on CPU"),
        (["--backend", "CSX", "--precision", "fp32"], "fp32 is not for engine cerebras on CSX"),
        (["--engine", "cerebras", "--micro_batch_size", "2"], "runs the batch in one piece"),
        (["--engine", "cerebras", "--num_systems", "2"], "but the cerebras engine on a CPU is one"),
        (["--memory_limit", "0.1MB"], "this model does not fit"),
        (["--vocab_size", "20"], "27 token ids, the model's vocab_size is 20"),
        (["--batch_size", "1000000000"], "'1000000000' should be less than or equal to"),
        (["--batch_size", f"{2**63 - 1}", "--micro_batch_size", "4"], "should be less than or eq"),
        (["--num_systems", "2", "--step_timeout", f"{2**63 - 1}"], "step_timeout: '922337203685"),
        (["--adam_epsilon", "1e-320"], "adam_epsilon: '1e-320' should be greater than or equal"),
        (["--dataset", "data/nowhere"], "run: python data/prepare.py --name nowhere FILES"),
        (["--checkpoint_path", "nowhere.mdl"], "nowhere.mdl: there is no such checkpoint or run"),
        (["--checkpoint_path", "tests"], "tests is not a checkpoint"),
        (["--init_from", "tests"], "init_from: tests"),
    ],
)
def test_refusals(run, config, flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    refused(run("train", config.path, *flags), message)
    assert not config.out.exists()


def test_the_wrong_torch_for_cerebras(run, config, tmp_path, monkeypatch):
    """As where its package was installed without what it depends on."""
    described = tmp_path / "installed" / "cerebras_pytorch-2.10.0.dist-info"
    described.mkdir(parents=True)
    content = "Metadata-Version: 2.1\nName: cerebras-pytorch\nVersion: 2.10.0\n"
    (described / "METADATA").write_text(content + "Requires-Dist: torch (==2.4.0)\n")
    monkeypatch.syspath_prepend(described.parent)
    seen = run("train", config.path, "--backend", "CSX")
    refused(seen, f"engine: cerebras needs torch 2.4.0, this is {torch.__version__}; make an")


def test_a_cluster_is_not_planned_here(run, config):
    for flags in (["--backend", "CSX"], ["--engine", "cerebras", "--device", "h100"]):
        seen = run("plan", config.path, *flags)
        refused(seen, "a run on Cerebras systems is planned by their cluster; python train.py CON")


def test_warm_up_stable_decay():
    """Linear up, the peak, and over the last decay_steps a line to a tenth of it."""
    keys = {"schedule": "wsd", "num_steps": 20, "warmup_steps": 4, "decay_steps": 10}
    config = engine_config(**keys | {"learning_rate": 1.0})
    rates = [learning_rate(config, step) for step in range(1, 22)]
    assert rates[:10] == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert rates[10:] == pytest.approx([*[1 - 0.09 * i for i in range(1, 11)], 0.1])
    config = engine_config(**keys | {"learning_rate": 1.0, "decay_steps": None})
    assert [learning_rate(config, step) for step in (18, 19, 20)] == pytest.approx([1, 0.55, 0.1])


def test_a_stable_phase_is_extended(run, config, tmp_path):
    """A checkpoint in it goes on as if num_steps had been higher from the start, bit for bit."""
    flags = ["--schedule", "wsd", "--decay_steps", 2, "--eval_steps", 20]
    whole, more = tmp_path / "whole", ["--num_steps", 9]
    assert run("train", config.path, *flags, *more, "--out_dir", whole).status == 0
    assert run("train", config.path, *flags, "--num_steps", 6).status == 0
    source, longer = config.out / "checkpoint_3.mdl", tmp_path / "longer"
    flags += ["--checkpoint_path", source, "--out_dir", longer]
    seen = run("train", config.path, *flags, *more)
    assert seen.status == 0, seen.err
    assert "num_steps is 9; it was 6" in seen.err
    assert records(longer)[-1]["learning_rate"] == pytest.approx(1e-3)
    assert figures(longer) == [record for record in figures(whole) if record["step"] > 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run, config):
    refused(run("train", config.path, "--backend", "GPU"), "backend: GPU, and there is none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_whose_driver_is_too_old(run, config, monkeypatch):
    """CUDA says so in a warning."""

    def no_gpu() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system\nis too old", stacklevel=2
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", no_gpu)
    ops.find_gpu.cache_clear()
    seen = run("train", config.path, "--num_steps", 3, "--backend", "auto")
    assert seen.status == 0
    reason = "CUDA initialization: The NVIDIA driver on your system is too old"
    assert f"warning: the GPU is not used: {reason}" in seen.err
    seen = run("train", config.path, "--backend", "GPU", "--checkpoint_path", "latest")
    refused(seen, f"backend: GPU, and {reason}; use --backend CPU")
    ops.find_gpu.cache_clear()


def test_a_micro_batch_beyond_memory(run, config):
    """On a resume too."""
    assert run("train", config.path, "--num_steps", 3).status == 0
    limit = f"{program_bytes(gpu=False) // 10**6 + 200}MB"
    flags = ["--memory_limit", limit, "--checkpoint_path", "latest", "--engine", "resident"]
    flags += ["--batch_size", 4096, "--micro_batch_size"]
    refused(run("train", config.path, *flags, 4096), "4096 sequences do not fit in memory, ")
    assert run("train", config.path, *flags, 64, "--num_steps", 4).status == 0


def test_data_of_another_tokenizer(run, config, stopped, tmp_path):
    other = write_dataset(tmp_path / "other", "ABC" * 300, "ABC" * 10)
    flags = ["--checkpoint_path", "latest", "--dataset", other, "--vocab_size", 27]
    write_meta(other, read_sealed(other / "meta.json") | {"vocab_size": 27})
    refused(run("train", config.path, *flags), "was made with another tokenizer (char) than")


IMPATIENT = """
import sys, tqdm
real = tqdm.tqdm.__init__
tqdm.tqdm.__init__ = lambda *a, **k: real(*a, **k | {"delay": 0, "mininterval": 0, "miniters": 1})
import train
from common.console import command
command(train.main)
"""


def test_a_reader_that_is_gone_ends_neither_the_run_nor_its_save(config):
    """Ctrl-C ends the `tee` of `train.py 2>&1 | tee log` as well, and with it the reader of the
    line that tells how far a long save has come."""
    flags = ["--num_steps", "100000", "--checkpoint_steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, config.path, *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not process.stdout.readline().startswith("step 3/"):
        pass
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert len(list(config.out.glob("checkpoint_*.mdl"))) == 1


def test_a_stop_cuts_an_evaluation_short(run, config, monkeypatch):
    import train as program

    def signal_then_watch(items, what, *more, **keys):
        for item in items:
            if what == "evaluating":
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    monkeypatch.setattr(program, "track", signal_then_watch)
    seen = run("train", config.path, "--eval_steps", 2)
    assert seen.status == 0
    assert "stopped at step 2" in seen.out
    assert [Checkpoint(p).step for p in config.out.glob("*.mdl")] == [2]
    assert not records(config.out, "val_loss")


@pytest.mark.long
def test_peak_memory_does_not_grow_with_the_batch(config):
    """The original had no gradient accumulation: its batch_size was one forward pass."""
    flags = ["--width", 256, "--depth", 4, "--micro_batch_size", 4, "--num_steps", 1]
    peaks = []
    for batch_size in (4, 80):
        out = ["--batch_size", batch_size, "--out_dir", config.out / str(batch_size)]
        told = command("train", config.path, *flags, *out).out
        peaks.append(float(re.findall(r"peak ([\d.]+) GB \|", told)[-1]))
    assert peaks[1] <= 1.2 * peaks[0]  # all 80 sequences at once take 1.4 times as much


def test_help_lists_the_keys(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    seen = run("train", "--help")
    assert seen.status == 0
    for key in ("--width", "--micro_batch_size", "--checkpoint_path", "as many as fit in memory"):
        assert key in seen.out
