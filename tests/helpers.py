"""What several test modules use."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, VOCABULARY, cloned, records, small_config, worked
from safetensors.torch import load_file
from torch import nn

from configuration import Configuration
from dataset import EvalData, TrainData
from engines import open_engine
from engines.optimizer import learning_rate
from model import GPT, GPTConfig
from weights.checkpoint import Checkpoint

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
TASK = {
    "task": "text",
    "dataset_path": "json",
    "validation_split": "validation",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
LLAMA = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False}
LLAMA |= {"kv_heads": 2, "heads": 4, "mlp_width": 88, "tied_head": False}
QWEN = LLAMA | {"bias": "qkv", "qk_norm": True, "head_width": 24}
SMALL = {  # of a model that is trained without a command
    **{"width": 32, "depth": 2, "heads": 2, "vocab_size": VOCABULARY},
    **{"max_position_embeddings": 32, "sequence_length": 32, "num_steps": 20},
    **{"batch_size": 4, "micro_batch_size": 4, "warmup_steps": 3, "learning_rate": 1e-2},
    **{"backend": "CPU", "engine": "resident", "precision": "fp32", "max_gradient_norm": 0.1},
}
STREAMED = {
    **{"engine": "streaming", "stream_to": "ram", "stream_batch_size": 4},
    **{"activation_checkpointing": True, "activation_location": "device"},
}
# How a model is streamed on a GPU
GPU_CASES = [
    {},
    {"stream_to": "disk", "micro_batch_size": 1},
    {"activation_checkpointing": False, "dropout": 0.0},
    {"micro_batch_size": 1, "activation_location": "host"},
    {"stream_to": "disk", "micro_batch_size": 1, "stream_batch_size": 2},
    {
        **{"activation_checkpointing": False, "micro_batch_size": 1, "stream_batch_size": 2},
        **{"blocks_on_device": 2},
    },
]

BF16 = {"precision": "bf16", "compile": True, "micro_batch_size": 3}  # the last one has 1
COMPILED = {
    "resident": {},
    "streaming, recomputing": {"engine": "streaming", "activation_checkpointing": True},
    "streaming, kept": {"engine": "streaming", "activation_checkpointing": False},
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


# Training without a command


def engine_config(**changes: object) -> Configuration:
    return Configuration(**SMALL | changes)


def streaming_config(out: Path, **changes: object) -> Configuration:
    return engine_config(**STREAMED | {"out_dir": str(out)} | changes)


def quiet(fraction: float) -> None:
    assert 0 < fraction <= 1


def batches_of(config: Configuration, dataset: Path) -> TrainData:
    data = (dataset, config.vocab_size, config.sequence_length, config.batch_size, config.seed)
    return train_data(*data)


def train(config: Configuration, dataset: Path, steps: int = 20, blocks_on_device: int = 0):
    """Return (stats of every step, engine)."""
    engine = open_engine(config, blocks_on_device=blocks_on_device)
    engine.initialize()
    batches = batches_of(config, dataset)
    return list(engine.run(batches, 0, steps, quiet)), engine


def graphs(dataset: Path, out: Path, backend: str, case: dict) -> dict[tuple[int, int], int]:
    """Return how many graphs are compiled, by blocks and steps; none has a graph break."""
    found = {}
    for depth, steps in ((2, 1), (6, 1), (2, 5)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        keys = {"stream_to": "ram", "stream_batch_size": 6, "activation_location": "device"}
        keys |= {"depth": depth, "out_dir": str(out), "backend": backend, **BF16, **case}
        _, engine = train(engine_config(**keys), dataset, steps)
        engine.close()
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"], dict(counters["graph_break"])
        found[depth, steps] = counters["stats"]["unique_graphs"]
    return found


def reference(
    config: Configuration, model: nn.Module, logits: Callable, batches: TrainData
) -> Iterator[tuple[float, float]]:
    """Yield the loss and the gradient norm of each step of the plainest loop there is."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    for step in range(config.num_steps):
        batch = batches.get(step)
        ids, targets = (torch.from_numpy(part).long() for part in (batch.ids, batch.targets))
        loss = F.cross_entropy(logits(ids).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step + 1)
        optimizer.step()
        yield loss.item(), norm.item()


def our_logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits that model.py gives with the weights of a checkpoint."""
    model = GPT(checkpoint.config).eval()
    model.load_state_dict({name: checkpoint.read(name) for name in model.state_dict()})
    with torch.no_grad():
        return model(ids)


# Commands


def flags_of(keys: dict) -> list[str]:
    """Return --key=value of each key."""
    flags = []
    for key, value in keys.items():
        flags.append(f"--{key}={str(value).lower() if isinstance(value, bool) else value}")
    return flags


def begin(name: str, *arguments: object, root: Path = ROOT, **environment: object):
    """Start `python NAME.py ARGUMENTS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, f"{name}.py", *map(str, arguments)],
        cwd=root,
        env=ENVIRONMENT | {key: str(value) for key, value in environment.items()},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end(process: subprocess.Popen) -> SimpleNamespace:
    out, err = process.communicate(timeout=120)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def command(*arguments: object, **more: object) -> SimpleNamespace:
    """Run a command that must work in a process of its own."""
    seen = end(begin(*arguments, **more))
    assert seen.status == 0, seen.err
    return seen


def free_port() -> int:
    """Return a port below those that the kernel gives out, which another process could have by
    the time it is used."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def begin_systems(
    forks: object, each: list[list], spoiled: dict | None = None, **environment: object
) -> list:
    """Start train.py on as many systems as there are lists of flags, in forks: as a launcher
    does, with an environment for each."""
    from faults import Fault

    shared = {"WORLD_SIZE": len(each), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"GLOO_SOCKET_IFNAME": "lo"} | environment
    started = []
    for rank, words in enumerate(each):
        place = shared | {"RANK": rank, "LOCAL_RANK": rank} if len(each) > 1 else environment
        started.append(begin_fork(forks, *words, fault=Fault(spoiled=spoiled or {}), **place))
    return started


def begin_fork(forks: object, *flags: object, fault: object = None, **environment: object):
    """Start train.py in a fork."""
    environment = {key: str(value) for key, value in environment.items()}
    return forks.start("train", *flags, fault=fault, **environment)


def fork(forks: object, *flags: object, **more: object) -> SimpleNamespace:
    """Run train.py in a fork."""
    return forks.end(begin_fork(forks, *flags, **more))


def await_text(process: object, words: str, seconds: float = 60) -> None:
    """Wait until a fork has printed some words."""
    deadline = time.monotonic() + seconds
    while words not in Path(process.files[0]).read_text():
        assert process.is_alive() and time.monotonic() < deadline, process.files
        time.sleep(0.01)


# What runs left


def close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * abs(b)


def equal_runs(expected: Iterable, got: Iterable, of_loss=1e-5, of_norm=1e-5) -> None:
    """Compare the stats of each step."""
    for a, b in zip(expected, got, strict=True):
        assert close(b.loss, a.loss, of_loss), a.step
        assert close(b.grad_norm, a.grad_norm, of_norm), a.step
        assert b.learning_rate == a.learning_rate


def equal_records(
    expected: Path, got: Path, of: float = 1e-5, of_norm: float = 1e-5, evaluations: bool = True
) -> None:
    """Compare the losses, norms and evaluations in the folders of two runs."""
    tolerances = {"loss": of, "grad_norm": of_norm} | ({"val_loss": of} if evaluations else {})
    for key, tolerance in tolerances.items():
        a, b = records(expected, key), records(got, key)
        assert [r["step"] for r in a] == [r["step"] for r in b] and a
        for x, y in zip(a, b, strict=True):
            assert close(y[key], x[key], tolerance), (key, x["step"])
            assert y.get("learning_rate") == x.get("learning_rate")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}


# A program that a reader changed


def changed(folder: Path, *changes: dict[str, str]) -> Path:
    """Return a clone of the program, whose model.py has these changes."""
    clone = cloned(folder)
    source = (clone / "model.py").read_text()
    for change in changes:
        for before, after in change.items():
            assert source.count(before) == 1, before
            source = source.replace(before, after)
    (clone / "model.py").write_text(source)
    return clone


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
