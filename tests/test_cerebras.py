"""The cerebras engine, in an environment of its own: make test-cerebras.

Its CPU backend against the resident engine of the usual environment, and its CSX backend as far as
it goes without a cluster: to the graph that it would send to be compiled.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, VOCABULARY, records, refused, worked
from helpers import build, eval_data, train_data
from safetensors.torch import load_file

from common.files import read_sealed
from common.tokens import write_meta
from configuration import Cluster
from model import GPT, GPTConfig
from weights.checkpoint import Checkpoint

pytestmark = pytest.mark.cerebras
FIGURES = ("loss", "grad_norm", "learning_rate", "val_loss")
WORKERS = ROOT / "tests/cerebras/workers.py"
NOWHERE = ["--cluster.mgmt_address", "localhost:9"]  # port 9 discards, where anything listens


@pytest.fixture(scope="module")
def python(request) -> str:
    path = request.config.getoption("--cerebras")
    if path is None:
        pytest.skip("needs --cerebras PYTHON: make test-cerebras")
    return path


@pytest.fixture(scope="module")
def there(python):
    """there("train.py", ...) runs it in Cerebras's environment."""

    def there(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
        return typed(python, script, *arguments, **options)

    return there


def here(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs it in the usual environment."""
    return typed(sys.executable, script, *arguments)


def typed(*words: object, cwd: object = ROOT, **more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    command = [str(word) for word in words]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True)


CPU = ["--engine", "cerebras", "--backend", "CPU"]
VALID = ["--backend", "CSX", "--cluster.validate_only", "true"]
LLAMA = [
    *("--norm", "rmsnorm", "--positions", "rotary", "--activation", "swiglu", "--bias", "false"),
    *("--heads", "4", "--kv_heads", "2", "--mlp_width", "88", "--tied_head", "false"),
]
# At ten times the rate norms differ by more than 1e-4, as the package's AdamW adds epsilon to the
# root of a moment that is not corrected for its bias; without epsilon they do not.
TINY_EPSILON = ["--adam_epsilon", 1e-16, "--learning_rate", 1e-2, "--checkpoint_steps", 20]
# name: flags, tolerance
RUNS = {
    "clipped": ([], 1e-4),
    "llama": ([*LLAMA, "--schedule", "wsd", "--decay_steps", 6], 1e-4),
    "tiny epsilon": (TINY_EPSILON, 1e-5),
    "dropout": (["--dropout", 0.2, "--num_steps", 6], 1e-4),
    "no warmup": (["--warmup_steps", 0, "--num_steps", 4], 1e-4),
}


@pytest.fixture(scope="module")
def small(dataset, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("cerebras")
    values = {
        **{"width": 32, "depth": 2, "heads": 2, "vocab_size": VOCABULARY},
        **{"max_position_embeddings": 32, "sequence_length": 32, "batch_size": 4},
        **{"num_steps": 20, "checkpoint_steps": 5, "eval_steps": 10, "warmup_steps": 5},
        **{"learning_rate": 1e-3, "max_gradient_norm": 0.5, "dataset": str(dataset)},
        **{"log_steps": 1},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return SimpleNamespace(path=path, values=values, folder=folder)


@pytest.fixture(scope="module")
def runs(small, there) -> Callable[[str], Path]:
    """runs(name): the out_dir of steps of the engine on the package's CPU backend."""

    def runs(name: str) -> Path:
        out = small.folder / name
        if not out.exists():
            done = worked(there("train.py", small.path, *RUNS[name][0], *CPU, "--out_dir", out))
            assert "cerebras engine on CPU, fp32" in done
        return out

    return runs


@pytest.fixture(scope="module")
def oracles(small, there) -> Callable[[str], Path]:
    """oracles(name): that of the same steps of the resident engine."""

    def oracles(name: str) -> Path:
        out = small.folder / f"{name} resident"
        if not out.exists():
            train = there if name == "dropout" else here  # another torch draws other masks
            flags = [*RUNS[name][0], "--engine", "resident", "--out_dir", out]
            worked(train("train.py", small.path, *flags))
        return out

    return oracles


@pytest.fixture(scope="module")
def trained(runs) -> Path:
    return runs("clipped")


def figures(out: Path) -> dict:
    return {
        (record["step"], key): record[key]
        for record in records(out, "step")
        for key in FIGURES
        if key in record
    }


def equal(got: Path, expected: Path, tolerance: float = 1e-4, after: int = 0) -> None:
    """Every loss, norm, rate and evaluation after a step."""
    got, expected = ({k: v for k, v in figures(o).items() if k[0] > after} for o in (got, expected))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=tolerance), key


@pytest.mark.parametrize("name", RUNS)
def test_equals_resident(runs, oracles, name):
    if name == "clipped":
        assert len(records(runs(name))) == 20
        assert all(record["grad_norm"] > 0.5 for record in records(oracles(name)))
    equal(runs(name), oracles(name), RUNS[name][1])


def resume(train, source: Path, step: int, out: Path, *flags: object) -> Path:
    """Goes on in `out` from a copy of a checkpoint and the records of a run up to it."""
    out.mkdir()
    shutil.copytree(source / f"checkpoint_{step}.mdl", out / f"checkpoint_{step}.mdl")
    shutil.copyfile(source / "metrics.jsonl", out / "metrics.jsonl")
    again = ["--out_dir", out, "--checkpoint_path", "latest"]
    assert f"at step {step}" in worked(train("train.py", *flags, *again))
    return out


@pytest.mark.parametrize(("name", "step"), [("clipped", 5), ("clipped", 10), ("llama", 10)])
def test_resume_is_exact(small, there, runs, name, step):
    """Bit for bit, from a checkpoint within an execution, from one at its end, and from one in the
    stable part of a schedule."""
    flags = [small.path, *RUNS[name][0], *CPU]
    out = resume(there, runs(name), step, small.folder / f"{name} from {step}", *flags)
    assert figures(out) == figures(runs(name))
    for path in sorted((runs(name) / "checkpoint_20.mdl").glob("*.safetensors")):
        assert path.read_bytes() == (out / "checkpoint_20.mdl" / path.name).read_bytes()


@pytest.mark.parametrize("engine", ["resident", "streaming", "sharded", "cerebras"])
def test_checkpoints_cross_engines(small, there, trained, oracles, engine):
    """To other engines, and from one."""
    flags = [small.path, "--backend", "CPU", "--engine", engine]
    flags += {"streaming": ["--stream_to", "disk"], "sharded": ["--num_systems", 2]}.get(engine, [])
    train, source = (there, oracles("clipped")) if engine == "cerebras" else (here, trained)
    equal(resume(train, source, 10, small.folder / f"in_{engine}", *flags), trained)


def test_checkpoints_are_those_of_every_engine(trained, oracles):
    """Same files, tensors and shapes, and nothing of the package's own format stays."""
    a, b = (Checkpoint(out / "checkpoint_20.mdl") for out in (trained, oracles("clipped")))
    assert a.files.keys() == b.files.keys()
    for key in ("tensors", "step", "optimizer_steps", "train_digest"):
        assert getattr(a, key) == getattr(b, key)
    left = [p.suffix for p in trained.glob("cerebras/**/*") if p.is_file()]
    assert set(left) <= {".json"}


def test_evaluated_sampled_and_exported(small, there, trained, tmp_path):
    checkpoint = ["--checkpoint_path", trained / "checkpoint_20.mdl"]
    runs = ((there, CPU), (there, ["--engine", "resident"]), (here, []))
    results = [
        json.loads(worked(run("eval.py", small.path, *checkpoint, "--json", *engine)))
        for run, engine in runs
    ]
    for result in results[:-1]:
        assert result == pytest.approx(results[-1], rel=1e-5)
    prompt = ["--prompt", "a", "--max_new_tokens", 8, "--temperature", 0]
    texts = [worked(run("sample.py", *checkpoint, *prompt)) for run in (there, here)]
    assert texts[0] == texts[1]
    for name, run in (("there", there), ("here", here)):
        worked(run("export.py", *checkpoint, "--out", tmp_path / name))
    a, b = (read_folder(tmp_path / name) for name in ("there", "here"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    start = ["--init_from", tmp_path / "here", "--num_steps", 1, "--out_dir", tmp_path / "tuned"]
    worked(there("train.py", small.path, *start, *CPU))


def test_steps_that_are_not_finite_change_nothing(small, there, tmp_path):
    flags = [*CPU, "--init_std", 1e30, "--out_dir", tmp_path]
    done = there("train.py", small.path, *flags)
    refused(done, "stopped at step 10: 10 steps in a row had a loss or gradient that is not finite")
    assert "not finite: update skipped" in done.stdout
    assert "start again in another --out_dir" in done.stderr
    assert not list(tmp_path.glob("*.mdl"))
    worked(there("train.py", small.path, *flags, "--num_steps", 5))  # the end is saved all the same
    saved = Checkpoint(tmp_path / "checkpoint_5.mdl")
    assert (saved.step, saved.optimizer_steps) == (5, 0)
    model = build(shape_of({**small.values, "init_std": 1e30}))
    assert all(torch.equal(saved.read(name), p) for name, p in model.named_parameters())


def shape_of(values: dict) -> GPTConfig:
    known = {field.name for field in fields(GPTConfig)}
    return GPTConfig(**{key: value for key, value in values.items() if key in known})


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_at_the_next_checkpoint(small, there, tmp_path, name):
    """The weights can't be had in between, where the SIGTERM arrives; at the SIGINT, while it is
    saved, the package would cancel what it writes."""
    flags = ["--num_steps", 10000, "--eval_steps", 10000, "--checkpoint_steps", 20]
    script = ["tests/cerebras/interrupted.py", name, small.path, *CPU, *flags]
    done = there(*script, "--out_dir", tmp_path)
    said = worked(done)
    assert f"{name}: will save and stop after this step" in done.stderr
    assert "stopped at step 20" in said and f"saved {tmp_path}/checkpoint_20.mdl" in said
    Checkpoint(tmp_path / "checkpoint_20.mdl").verify(0, 1)


@pytest.mark.parametrize("limit", [20_000, 120_000])
def test_no_space(small, there, python, trained, tmp_path, limit):
    """For what the package is given, and for what it saves."""
    train = ["train.py", small.path, *CPU, "--out_dir", tmp_path, "--checkpoint_path", "latest"]
    shutil.copytree(trained / "checkpoint_5.mdl", tmp_path / "checkpoint_5.mdl")
    done = typed("prlimit", f"--fsize={limit}", python, *train)
    refused(done, "File too large")
    assert "could not be written (" in done.stderr and "free some space" in done.stderr
    Checkpoint(tmp_path / "checkpoint_5.mdl").verify(0, 1)
    worked(there(*train))
    equal(tmp_path, trained, after=10)


def test_an_evaluation_leaves_the_files_of_a_training_alone(small, there, trained, tmp_path):
    folder = tmp_path / "cerebras"
    folder.mkdir()
    kept = [folder / "step_7.h5", folder / "head.safetensors"]
    for path in kept:
        path.touch()
    checkpoint = ["--checkpoint_path", trained / "checkpoint_20.mdl", "--out_dir", tmp_path]
    worked(there("eval.py", small.path, *CPU, *checkpoint))
    assert sorted(folder.iterdir()) == sorted(kept)


# What is lowered for the wafer


class Graph:
    """A lowered step: CIRH, an operation a line."""

    def __init__(self, path: Path):
        text = path.read_text()
        header, *lines = text[text.index("func @graph") :].splitlines()
        scopes = dict(re.findall(r'^#(loc\d+) = loc\("([^"]*)"', text, re.MULTILINE))
        self.arguments, self.operations, self.producer = {}, [], {}
        for name, attributes in re.findall(r"%(arg\d+): tensor<[^>]*> \{([^}]*)\}", header):
            keys = dict(re.findall(r'(tf\.\w+) = "?([^",}]*?)(?: : i64)?"?(?=,|$)', attributes))
            self.arguments[name] = keys
        self.types = dict(re.findall(r"%(arg\d+): tensor<([^>]*)>", header))
        for line in lines:
            line = line.strip()
            if line.startswith("return"):
                self.returned = re.findall(r"%(\w+)", line.partition(" : ")[0])
                break
            results, _, rest = line.partition(" = ")
            kind, _, rest = rest.partition(" ")
            operation = SimpleNamespace(
                kind=kind,
                operands=re.findall(r"%(\w+)", rest),
                types=re.findall(r"tensor<(?:[0-9x]+x)?(\w+)>", rest.rpartition("->")[2] or rest),
                scope=scopes.get(rest.rpartition("loc(#")[2].rstrip(")"), ""),
            )
            self.operations.append(operation)
            for result in re.findall(r"%(\w+)", results):
                self.producer[result] = operation

    def of(self, *kinds: str) -> list[SimpleNamespace]:
        return [o for o in self.operations if o.kind.removeprefix("cirh.") in kinds]

    def argument(self, name: str) -> str:
        """The one that holds a tensor of the state."""
        full = f"state.{name}"
        (found,) = (a for a, keys in self.arguments.items() if keys.get("tf.resource_name") == full)
        return found

    def updated(self, argument: str) -> str:
        """The value that an argument has after the step."""
        return self.returned[int(self.arguments[argument]["tf.aliasing_output"])]

    def needs(self, value: str) -> tuple[set[int], set[str]]:
        """The operations, by id, and the arguments that a value is computed from."""
        operations, arguments, open_values = set(), set(), [value]
        while open_values:
            value = open_values.pop()
            operation = self.producer.get(value)
            if operation is None:
                arguments.add(value)
            elif id(operation) not in operations:
                operations.add(id(operation))
                open_values += operation.operands
        return operations, arguments


def lower(there, config: object, out: Path, *flags: object) -> Graph:
    worked(there("train.py", config, *VALID, "--out_dir", out, *flags))
    return Graph(out / "cerebras/executors/000001/cirh.mlir")


def check_graph(graph: Graph, shape: GPTConfig) -> None:
    with torch.device("meta"):
        model = GPT(shape)
    parameters = [name for name, _ in model.named_parameters()]
    arguments = {name: graph.argument(f"model.{name}") for name in parameters}

    # No operation is left to the host
    assert all(operation.kind.startswith("cirh.") for operation in graph.operations)

    # One softmax and two norms a block, with their gradients
    for i in range(shape.depth):
        assert [o.scope for o in graph.of("Softmax") if f"decoder.{i}." in o.scope] == [
            f"decoder.{i}.attn.fwd/aten::_softmax"
        ]
    norms = [name for name in parameters if re.search(r"(ln_\d|norm)\.weight$", name)]
    assert len(norms) == 2 * shape.depth + 1
    for name in norms:
        for kind in ("LayerNorm", "LayerNormGrad"):
            assert len([o for o in graph.of(kind) if arguments[name] in o.operands]) == 1
    assert len(graph.of("Softmax")) == shape.depth
    assert len(graph.of("LayerNorm", "LayerNormGrad")) == 2 * len(norms)

    # Products and softmax in bf16; weights, norms and losses in fp32
    for operation in graph.of("MatMul", "DotGeneral", "Softmax", "Gelu", "GeluGrad"):
        assert set(operation.types) == {"bf16"}, operation
    for operation in graph.of("LayerNorm", "LayerNormGrad", "L2Norm"):
        assert set(operation.types) == {"f32"}, operation
    (loss,) = graph.of("SparseSoftmaxCrossEntropyWithLogits")
    assert set(loss.types) == {"f32"}
    assert all(re.fullmatch(r"([0-9x]+x)?f32", graph.types[a]) for a in arguments.values())

    # Every parameter is updated, from its two moments, by a gradient that was clipped with the norm
    # of all, at a rate of the schedule; or it stays what it was, where the norm is not finite
    squares = {id(o) for o in graph.of("L2Norm")}
    assert len(squares) == len(parameters) + 1
    clamps = {id(o) for o in graph.of("Clamp")}
    last_epoch = graph.argument("schedulers.0.last_epoch")
    moments = {
        a: keys["tf.resource_name"]
        for a, keys in graph.arguments.items()
        if ".exp_avg" in keys.get("tf.resource_name", "")
    }
    assert len(moments) == 2 * len(parameters)
    used = []
    for name, argument in arguments.items():
        operations, needed = graph.needs(graph.updated(argument))
        choice = graph.producer[graph.updated(argument)]
        assert choice.kind == "cirh.Select" and choice.operands[2] == argument, name
        assert squares <= operations and id(loss) in operations and last_epoch in needed, name
        assert clamps & operations, name
        mine = sorted(moments[a] for a in needed if a in moments)
        assert len(mine) == 2 and mine[0] + "_sq" == mine[1], name
        used += mine
        for moment in mine:
            choice = graph.producer[graph.updated(graph.argument(moment.removeprefix("state.")))]
            assert choice.kind == "cirh.Select", moment
    assert sorted(used) == sorted(moments.values())


@pytest.mark.parametrize("name", ["111m", "13b", "70b", "175b"])
def test_a_step_lowers(name, there, dataset, tmp_path):
    """111m as it is, of the others the shape of two layers; their batches and sequences."""
    path = ROOT / f"configs/{name}.yaml"
    shape = yaml.safe_load(path.read_text())
    if name != "111m":
        shape["depth"] = 2
    flags = ["--dataset", text_of(dataset, tmp_path), "--depth", shape["depth"]]
    graph = lower(there, path, tmp_path / "out", *flags)
    check_graph(graph, shape_of(shape))
    rows = f"{shape['batch_size']}x{shape['sequence_length']}xi32"
    assert list(graph.types.values()).count(rows) == 2  # ids and targets


def text_of(dataset: Path, folder: Path) -> Path:
    """The words of the dataset, long enough for a sequence of 2,048."""
    copy = shutil.copytree(dataset, folder / "data")
    ids = np.fromfile(copy / "train.bin", np.uint16)
    np.resize(ids, 20000).tofile(copy / "train.bin")
    write_meta(copy, read_sealed(copy / "meta.json"))
    return copy


def test_the_largest_model_lowers_at_its_depth(there, dataset, tmp_path):
    """And this machine holds none of it."""
    flags = ["--dataset", text_of(dataset, tmp_path), "--num_systems", 16]
    graph = lower(there, ROOT / "configs/175b.yaml", tmp_path / "out", *flags)
    assert len(graph.of("Softmax")) == 96
    assert len(graph.of("LayerNorm")) == len(graph.of("LayerNormGrad")) == 193


QWEN3 = ["--qk_norm", "true", "--head_width", 64, "--bias", "attention"]


@pytest.mark.parametrize("more", [[], ["--bias", "qkv"], QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_a_step_of_llama_lowers(there, dataset, tmp_path, more):
    """The shape of Llama 3.1 8B, two layers of it, and with the parts of others."""
    flags = ["--dataset", text_of(dataset, tmp_path), "--depth", 2, "--sequence_length", 2048]
    flags += ["--batch_size", 16, *more]
    graph = lower(there, ROOT / "configs/llama3p1_8b.yaml", tmp_path / "out", *flags)
    assert len(graph.of("Softmax")) == 2
    assert all(operation.kind.startswith("cirh.") for operation in graph.operations)


def test_dropout_lowers(small, there, trained, tmp_path):
    """To one graph, whatever the step, which is so compiled once."""
    graph = lower(there, small.path, tmp_path / "first", "--dropout", 0.1)
    assert len(graph.of("RandomUniform")) == 1 + 3 * 2  # embedding; attention and both branches
    later = ["--dropout", 0.1, "--checkpoint_path", trained / "checkpoint_10.mdl"]
    lower(there, small.path, tmp_path / "later", *later)
    graphs = {lowered(tmp_path / out) for out in ("first", "later")}
    assert len(graphs) == 1 and "global_seed" in graphs.pop()


def lowered(out: Path, execution: int = 1) -> str:
    """A graph without where its operations come from."""
    path = out / f"cerebras/executors/{execution:06}/cirh.mlir"
    return re.sub(r"loc\([^\n]*", "", path.read_text())


def test_training_evaluating_and_training_again_lower(small, there, tmp_path):
    """In one process, each an execution; the second has no gradients and changes nothing."""
    told = worked(there("tests/cerebras/executions.py", small.path, *VALID, "--out_dir", tmp_path))
    counters = json.loads(told.splitlines()[-1])
    assert "lazy::_softmax" in counters
    assert all(name.startswith("lazy::") for name in counters)  # else it fell back to the CPU
    train, evaluate, again = (
        Graph(tmp_path / f"cerebras/executors/{number:06}/cirh.mlir") for number in (1, 2, 3)
    )
    assert [o.kind for o in train.operations] == [o.kind for o in again.operations]
    assert len(evaluate.of("Softmax")) == 2
    assert not evaluate.of("LayerNormGrad", "GeluGrad", "L2Norm")
    assert all(evaluate.updated(a) == a for a, k in evaluate.arguments.items() if k)


def test_weights_do_not_change_the_graph(small, there, tmp_path):
    """A run that would be executed gets as far as its first request to a cluster, with the graph
    that validating gives, from drawn weights and from a checkpoint."""
    lower(there, small.path, tmp_path / "valid")
    done = there(
        "train.py", small.path, "--backend", "CSX", *NOWHERE, "--out_dir", tmp_path / "out"
    )
    refused(done, "cluster: failed to connect to all addresses")
    assert lowered(tmp_path / "valid") == lowered(tmp_path / "out")
    assert not list(tmp_path.glob("out/cerebras/*.safetensors"))


def test_what_an_appliance_would_be_sent(small, there, trained, tmp_path):
    """Read back from a file that the package's CSX backend saved: the drawn weights, or those of a
    checkpoint, and the counts that go with them."""

    def send(name: str, *flags: object) -> tuple[dict, dict]:
        (tmp_path / name).mkdir()
        words = [small.path, "--backend", "CSX", *NOWHERE, *flags, "--out_dir", tmp_path / "out"]
        out = worked(there("tests/cerebras/loaded.py", tmp_path / name, *words))
        return json.loads(out.splitlines()[-1]), read_folder(tmp_path / name / "first")

    counts, sent = send("drawn")
    powers = np.float32([0.9, 0.95]).tolist()
    assert counts == {"powers": [powers], "steps": [1, 1, 0]}
    for name, parameter in build(shape_of(small.values)).named_parameters():
        assert torch.equal(sent[name], parameter)
        assert not sent[f"exp_avg.{name}"].any() and not sent[f"exp_avg_sq.{name}"].any()

    counts, sent = send("loaded", "--checkpoint_path", trained / "checkpoint_10.mdl")
    assert counts["steps"] == [11, 11, 6]  # of which 5 to warm up
    assert counts["powers"][0] == pytest.approx([0.9**11, 0.95**11], rel=1e-6)
    saved = Checkpoint(trained / "checkpoint_10.mdl")
    assert sent.keys() == saved.tensors.keys()
    assert all(torch.equal(tensor, saved.read(name)) for name, tensor in sent.items())


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


@pytest.fixture(scope="module")
def sent(there, small) -> dict[str, Path]:
    """What the engine would send to the input workers of a dataset with a relative name."""
    files = {split: small.folder / f"{split}.json" for split in ("train", "val")}
    data = Path(small.values["dataset"])
    for split, file in files.items():
        flags = ["--dataset", data.name, *VALID]
        worked(there(WORKERS, "send", file, split, small.path, *flags, cwd=data.parent))
    return files


@pytest.mark.parametrize("split", ["train", "val"])
def test_input_workers_stream_the_batches(sent, there, small, split):
    """Through the package's own pipeline: every row of every step once, in its system's order. A
    worker runs in another folder, and finds this program where the cluster was told."""
    cases = [  # systems, workers, sizes
        (1, 1, [[4]]),
        (1, 4, [[2, 2]]),
        (2, 1, [[3], [1]]),
        (2, 2, [[2], [1, 1]]),
        (3, 2, [[2], [1], [1]]),
    ]
    (path,) = json.loads(sent[split].read_text())["paths"]
    words = ["stream", sent[split], json.dumps(cases)]
    done = there(WORKERS, *words, cwd="/", PYTHONPATH=path)
    told = json.loads(worked(done).splitlines()[-1])
    batches = batches_of(small.values, split)
    for (_, workers, sizes), streamed in zip(cases, told, strict=True):
        check_streamed(streamed, workers, sizes, batches)


def batches_of(values: dict, split: str) -> list:
    data = (values["dataset"], VOCABULARY, values["sequence_length"], values["batch_size"])
    if split == "val":
        source, size = eval_data(*data), values["batch_size"]
        return [source.get(first, size) for first in range(0, len(source), size)]
    return [train_data(*data, 0).get(step) for step in range(3, 9)]


def check_streamed(streamed: list, workers: int, sizes: list[list[int]], batches: list) -> None:
    for place, batch in enumerate(batches):
        rows = [[], []]
        for system, parts in enumerate(sizes):
            worker = system * workers + place % workers
            for part, size in enumerate(parts):
                block = streamed[worker][place // workers * len(parts) + part]
                for kind in range(2):
                    rows[kind] += block[kind][:size]  # a block is filled up to the largest
        for got, expected in zip(rows, (batch.ids, batch.targets), strict=True):
            assert got[: len(expected)] == expected.tolist()
            assert len(got) == sum(map(sum, sizes))
            assert all(set(row) in ({0}, {-100}) for row in got[len(expected) :])


def test_the_clusters_keys_are_the_packages(there):
    code = (
        "import json; from dataclasses import fields; import cerebras.pytorch as c; "
        "print(json.dumps([f.name for f in fields(c.distributed.ClusterConfig)]))"
    )
    keys = set(json.loads(worked(there("-c", code)).splitlines()[-1]))
    ours = {field.name for field in fields(Cluster)}
    backend = {"compile_dir", "validate_only", "compile_only"}
    assert ours - keys == backend | {"compile_crd_memory_gi", "execute_crd_memory_gi"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "cluster.mgmt_address: config error: mgmt_address has no default value; name"),
        (["--cluster.mgmt_address", "nowhere"], "should be in the form of '<name>:<port>'"),
        (["--cluster.mount_dirs", "[/nowhere]", *NOWHERE], "/nowhere does not exist"),
        (["--cluster.job_priority", "p9", *NOWHERE], "Invalid job priority value: p9"),
        (["--cluster.mgmt_address", "nowhere.invalid:9000"], "cluster: Exception: Failed to ping"),
        (["--cluster.compile_crd_memory_gi", 10**14, *NOWHERE], "cluster: Value out of range"),
        (["--micro_batch_size", 3, "--num_systems", 2], "more than the 2 sequences of the batch"),
        (["--num_systems", 5], "batch_size: 4 is smaller than num_systems 5"),
    ],
)
def test_refusals(small, there, flags, message, tmp_path):
    refused(
        there("train.py", small.path, "--backend", "CSX", *flags, "--out_dir", tmp_path), message
    )


def test_nothing_is_evaluated_without_a_cluster(small, there, trained):
    checkpoint = ["--checkpoint_path", trained / "checkpoint_20.mdl"]
    done = there("eval.py", small.path, *VALID, *checkpoint)
    refused(done, "cluster.validate_only and cluster.compile_only are for train.py")
