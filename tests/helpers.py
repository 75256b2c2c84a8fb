"""What several test modules use."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, small_config, worked

from configuration import Configuration
from dataset import EvalData, TrainData
from model import GPT, GPTConfig

TASK = {
    "task": "text",
    "dataset_path": "json",
    "validation_split": "validation",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


def build(config: GPTConfig, seed: int = 0) -> GPT:
    """Return a model on the CPU with the initial weights of a seed."""
    model = GPT(config)
    for name, layer in model.layers().items():
        layer.load_state_dict(model.build_layer(name, seed).state_dict())
    return model


def data_config(
    dataset: str | Path | dict, vocab_size: int, length: int, batch_size: int, seed: int = 0, **more
) -> Configuration:
    return Configuration(
        dataset=dataset if isinstance(dataset, dict) else str(dataset),
        vocab_size=vocab_size,
        sequence_length=length,
        batch_size=batch_size,
        seed=seed,
        **more,
    )


def train_data(*keys: object, **more: object) -> TrainData:
    """train_data(dataset, vocab_size, sequence_length, batch_size, seed=0)."""
    return TrainData(data_config(*keys, **more))


def eval_data(dataset: str | Path, *keys: object, **more: object) -> EvalData:
    return EvalData(data_config(dataset, *keys, **more), str(dataset))


def train_once(folder: Path, dataset: Path, **changes: object) -> SimpleNamespace:
    """Train a small model for tests that only read the run; return its configuration: path, values
    and out."""
    import train

    config = small_config(folder, dataset, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", config.path])
        train.main()
    return config


def typed(*words: object) -> str:
    """Type a command of Python, offline; return what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *map(str, words)]
    return worked(subprocess.run(line, cwd=ROOT, env=environment, text=True, capture_output=True))


@contextmanager
def peak_memory_of() -> Iterator[SimpleNamespace]:
    """Measure by how many bytes (`grown`) the block raises the memory of this process."""

    def memory(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = memory("VmRSS")
    peak = SimpleNamespace()
    yield peak
    peak.grown = memory("VmHWM") - before


def bits_in_lm_eval(model: Path, text: str, folder: Path, *more: str) -> float:
    """Return the bits a byte that lm-eval finds for a text, with `more` arguments of the model; its
    files go into a new folder."""
    folder.mkdir()
    (folder / "text.jsonl").write_text(json.dumps({"text": text}))
    files = {"data_files": {"validation": str(folder / "text.jsonl")}}
    (folder / "text.yaml").write_text(yaml.safe_dump(TASK | {"dataset_kwargs": files}))
    words = ["--model", "hf", "--device", "cpu", "--tasks", "text", "--include_path", folder]
    words += ["--model_args", ",".join([f"pretrained={model}", *more])]
    typed("-m", "lm_eval", *words, "--output_path", folder / "results")
    (results,) = (folder / "results").rglob("results_*.json")
    return json.loads(results.read_text())["results"]["text"]["bits_per_byte,none"]
