"""What others make of a run, with their real packages, offline: trackers, transformers 4 and
Kubeflow. They need an environment of their own: make test-tools."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, records, worked
from helpers import typed
from tokenizers import Tokenizer

pytestmark = pytest.mark.tools
FLAGS = ["--eval_steps", "3", "--eval_batches", "1", "--sample_prompts", "[abc, the]"]


def train(config, *more: str, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "train.py", config.path, *FLAGS, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    kept = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(words, cwd=ROOT, env=environment, timeout=300, **kept)


def wandb_records(path: Path) -> list:
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log format, whose blocks of
    32 KiB hold pieces of (checksum, length, kind); kinds 1 and 4 end a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, body, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        body += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(body))
            body = b""
    return found


def test_trackio_has_a_run_and_what_it_was_resumed_with(config, tmp_path):
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_PROJECT": "words"}
    worked(train(config, "--tracker", "trackio", "--num_steps", "3", **environment))
    resume = ["--checkpoint_path", "latest"]
    worked(train(config, "--tracker", "trackio", *resume, **environment))
    base = sqlite3.connect(tmp_path / "trackio/words.db")
    ((settings,),) = base.execute("SELECT config FROM configs").fetchall()
    assert (json.loads(settings)["width"], json.loads(settings)["engine"]) == (32, "resident")
    runs = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    (name,) = {name for name, _, _ in runs}
    assert name.startswith("out-")
    for key in ("loss", "val_loss", "learning_rate", "tokens_per_second", "samples"):
        seen = {step: json.loads(m)[key] for _, step, m in runs if key in json.loads(m)}
        if key == "samples":
            seen = {step: [row["text"] for row in table["_value"]] for step, table in seen.items()}
        assert seen == {r["step"]: r[key] for r in records(config.out, key)}
    assert sorted(seen) == [3, 6]


def test_wandb_offline_has_the_run(config):
    worked(train(config, "--tracker", "wandb", WANDB_MODE="offline", WANDB_PROJECT="words"))
    (path,) = config.out.glob("wandb/offline-run-*/*.wandb")
    found = wandb_records(path)
    (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.display_name) == ("words", "out")
    assert (settings["width"], settings["engine"]) == (32, "resident")
    history = [r.history for r in found if r.WhichOneof("record_type") == "history"]
    rows = [{"/".join(i.nested_key): json.loads(i.value_json) for i in h.item} for h in history]
    for key in ("loss", "val_loss", "learning_rate", "tokens_per_second"):
        seen = {row["_step"]: row[key] for row in rows if key in row}
        assert seen == pytest.approx({r["step"]: r[key] for r in records(config.out, key)})
    tables = [row["samples/path"] for row in rows if "samples/path" in row]
    texts = [json.loads((path.parent / "files" / table).read_text())["data"] for table in tables]
    assert texts == [[[r["step"], s] for s in r["samples"]] for r in records(config.out, "samples")]


def test_wandb_without_a_key_does_not_end_the_training(config, tmp_path):
    seen = train(config, "--tracker", "wandb", HOME=str(tmp_path), WANDB_API_KEY="")
    assert "step 6/6" in worked(seen)
    assert seen.stderr.count("warning: Weights & Biases failed (") == 1
    assert "Traceback" not in seen.stderr


OPEN = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("the ship sails")["input_ids"]
ends = [tokenizer.bos_token, tokenizer.eos_token]
torch.save((ids, model(torch.arange(20)[None]).logits.detach(), ends), sys.argv[2])
"""


LLAMA = ["--norm", "rmsnorm", "--positions", "rotary", "--activation", "swiglu"]
LLAMA += ["--rope_theta", "500000.0"]
WIDE = ["--bias", "false", "--head_width", "24"]
KINDS = {
    "gpt2": [],
    "llama": [*LLAMA, *WIDE, "--rope_scaling", "8"],
    "qwen2": [*LLAMA, "--bias", "qkv"],
    "qwen3": [*LLAMA, *WIDE, "--qk_norm", "true"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_4_opens_an_export(config, tmp_path, pytestconfig, kind):
    """With equal logits, ids, begin and end, also where rope_theta is not its default."""
    python = pytestconfig.getoption("--transformers4")
    if python is None:
        pytest.skip("--transformers4 names a Python with transformers 4")
    worked(train(config, *KINDS[kind], "--sample_prompts", "null"))
    exported = tmp_path / "exported"
    typed("export.py", "--checkpoint_path", str(config.out), "--out", str(exported))
    seen = []
    for number, interpreter in enumerate((sys.executable, python)):
        result = tmp_path / f"{number}.pt"
        words = [interpreter, "-c", OPEN, str(exported), str(result)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        worked(subprocess.run(words, env=environment, text=True, capture_output=True))
        seen.append(torch.load(result))
    (_, logits, _), (their_ids, their_logits, their_ends) = seen
    # transformers 5 gives every Qwen2 the words of Qwen's own tokenizer, whatever the folder has
    plain = Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert their_ids == plain.encode("the ship sails").ids
    named = json.loads((exported / "tokenizer_config.json").read_text())
    assert their_ends == [named.get("bos_token"), named.get("eos_token")]
    assert (logits - their_logits).abs().max() < 1e-4


def test_the_training_operator_knows_every_field_of_our_job():
    """Kubeflow's client, whose models drop what is not theirs."""
    from kubeflow.training import models
    from kubernetes import client

    for name, model in vars(models).items():
        if isinstance(model, type):
            setattr(client.models, name, model)
    job = yaml.safe_load((ROOT / "examples/kubernetes.yaml").read_text())
    sent = SimpleNamespace(data=json.dumps(job))
    understood = client.ApiClient().deserialize(sent, "KubeflowOrgV1PyTorchJob")
    assert client.ApiClient().sanitize_for_serialization(understood) == job
