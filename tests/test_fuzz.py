"""Files that an accident changed, and files of somebody who means harm: of checkpoints, datasets,
configurations and Hugging Face models. What is wrong is told in one line, soon, in little memory,
and no code of theirs runs."""

import ast
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import PROGRAM, ROOT, VOCABULARY, refused
from helpers import eval_data, train_data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.console import explain
from common.files import END, read_sealed, write_sealed
from common.tokens import Tokens
from configuration import Configuration
from runtime.arguments import parse_configuration
from runtime.resume import check_tokenizer, warn_of_changes
from weights.checkpoint import Checkpoint, _describe
from weights.huggingface import encode, hugging_face_tensors, load_tokenizer, read_hugging_face

SMALL = {
    "width": 8,
    "depth": 1,
    "heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "sequence_length": 16,
    "batch_size": 4,
    "num_steps": 2,
    "checkpoint_steps": 2,
    "eval_steps": 2,
    "warmup_steps": 1,
    "backend": "CPU",
}
ONE_LINE = "one line says what is wrong"


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> SimpleNamespace:
    """A checkpoint, a dataset and a configuration that a command wrote and read."""
    folder = tmp_path_factory.mktemp("fuzz")
    data = Path(shutil.copytree(dataset, folder / "data"))
    values = SMALL | {"dataset": str(data), "out_dir": str(folder / "out")}
    (folder / "small.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, ROOT / "train.py", folder / "small.yaml"]
    subprocess.run(command, check=True, capture_output=True)
    config = folder / "small.yaml"
    return SimpleNamespace(path=folder / "out" / "checkpoint_2.mdl", data=data, config=config)


@pytest.fixture(scope="module")
def hugging_face(trained) -> Path:
    """The model of `trained`, as transformers writes it."""
    out = trained.path.parent / "hf"
    command = [sys.executable, ROOT / "export.py", "--checkpoint_path", trained.path, "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    return out


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"it hangs: {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told(read: Callable[[], object]) -> str | None:
    """The line that a user sees when the files are read; None where they are taken."""
    try:
        with within(10):
            read()
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        assert 0 < len(line.splitlines()[0]) == len(line) <= 2000
        return line


@contextmanager
def holding(path: Path, content: bytes) -> Iterator[None]:
    """The file, with other content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def read_checkpoint(path: Path) -> None:
    checkpoint = Checkpoint(path)
    checkpoint.check_model()
    for name in checkpoint.tensors:
        checkpoint.read(name)
    assert checkpoint.tokenizer is None or checkpoint.tokenizer.parent == path


def use_checkpoint(trained: SimpleNamespace) -> None:
    """All that commands do with one, but computing."""
    checkpoint = Checkpoint(trained.path)
    config = Configuration(**SMALL, dataset=str(trained.data))
    checkpoint.check_model()
    for name in checkpoint.tensors:
        checkpoint.read(name)
    check_tokenizer(checkpoint, Tokens(str(trained.data), "train", VOCABULARY))
    warn_of_changes(replace(config, num_steps=3), checkpoint)
    for _ in hugging_face_tensors(checkpoint.config, checkpoint.read):
        pass


def read_dataset(folder: Path) -> None:
    data = (str(folder), VOCABULARY, 16, 4)
    for opened, what in ((train_data(*data, seed=0), (0,)), (eval_data(*data), (0, 4))):
        opened.tokens.read(0, opened.tokens.count)
        opened.get(*what)


def read_configuration(path: Path, monkeypatch) -> Configuration:
    monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
    return parse_configuration("")[0]


def changed(raw: bytes, source: random.Random) -> bytes:
    """With one accident in it, or a few."""
    for _ in range(source.choice([1, 1, 1, 2, 5])):
        at = source.randrange(len(raw) + 1)
        end = min(len(raw), at + source.choice([1, 2, 8, 100, 5000]))
        other = source.randrange(len(raw) + 1)
        noise = source.randbytes(source.choice([1, 4, 50]))
        raw = {
            "flip": raw[:at] + bytes(b ^ 1 << source.randrange(8) for b in raw[at:end]) + raw[end:],
            "delete": raw[:at] + raw[end:],
            "insert": raw[:at] + noise + raw[at:],
            "repeat": raw[:end] + raw[at:],
            "truncate": raw[:at],
            "zero": raw[:at] + bytes(end - at) + raw[end:],
            "move": (raw[:at] + raw[end:])[:other] + raw[at:end] + (raw[:at] + raw[end:])[other:],
        }[source.choice(["flip", "delete", "insert", "repeat", "truncate", "zero", "move"])]
    return raw


def changed_files(paths: list[Path], tries: int, seed: int) -> Iterator[str]:
    """Each of the files in turn, changed while it is the caller's; what it is, for a message."""
    source = random.Random(seed)
    for number in range(tries):
        path = paths[number % len(paths)]
        raw = path.read_bytes()
        while (content := changed(raw, source)) == raw:
            pass
        with holding(path, content):
            yield f"{path.name}, try {number} of seed {seed}"


@pytest.fixture
def seed(request) -> int:
    return request.config.getoption("--seed")


def test_changed_checkpoints_are_refused(trained, seed, tally):
    tries = 500
    for what in changed_files(sorted(trained.path.iterdir()), tries, seed):
        assert told(lambda: read_checkpoint(trained.path)), f"{what} was taken"
    read_checkpoint(trained.path)
    tally("a file of a checkpoint changed", "all", tries, ONE_LINE)


def test_changed_datasets_are_refused(trained, seed, tally):
    tries = 400
    for what in changed_files(sorted(trained.data.iterdir()), tries, seed):
        assert told(lambda: read_dataset(trained.data)), f"{what} was taken"
    read_dataset(trained.data)
    tally("a file of a dataset changed", "all", tries, ONE_LINE)


def test_changed_configurations(tmp_path, monkeypatch, seed, tally):
    """They have no checksum: what is still a configuration is taken."""
    tries = 200
    paths = [Path(shutil.copy(path, tmp_path)) for path in sorted(ROOT.glob("configs/*.yaml"))]
    lines = []
    for what in changed_files(paths, tries, seed):
        path = tmp_path / what.partition(",")[0]
        lines.append(told(lambda path=path: read_configuration(path, monkeypatch)))
    assert any(lines)
    tally("a configuration changed", "all", tries, f"{ONE_LINE}, or it is one still")


def test_changed_hugging_face_models(hugging_face, seed, tally):
    """They have no checksum either."""
    tries, names = 100, ("config.json", "model.safetensors.index.json", "generation_config.json")
    paths = [hugging_face / name for name in names if (hugging_face / name).is_file()]
    paths += sorted(hugging_face.glob("*.safetensors"))
    config = Configuration(init_from=str(hugging_face), sequence_length=8)
    for _ in changed_files(paths, tries, seed):
        told(lambda: read_hugging_face(config))
    read_hugging_face(config)
    tally("a file of a Hugging Face model changed", "all", tries, f"{ONE_LINE}, or it is one still")


# From here on, files whose checksums are right.

HOSTILE = [
    *(-1, 0, 2**31, 2**63, 2**64, 10**18, 10**400, 1e308, -1e-308, float("nan"), float("inf")),
    *("", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 10**5, "\x1b[2J", "&a [*a]"),
    *({}, [], [[]], [None], {"class_path": "this"}, "auto", "float32", "head.safetensors"),
]
JSON = st.sampled_from(HOSTILE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
fuzz = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[*HealthCheck],
)


def places(content: object, here: tuple = ()) -> Iterator[tuple]:
    """Where in JSON something stands."""
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(inner)[:12]:
        yield (*here, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*here, key))


def put(data: st.DataObject, content: dict) -> dict:
    """Arbitrary JSON at arbitrary places."""
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(sorted(places(content), key=repr)))
        holder = content
        for key in way:
            holder = holder[key]
        action = data.draw(st.sampled_from(["put", "put", "put", "add", "delete"]))
        if action == "delete":
            del holder[last]
        elif action == "add" and isinstance(holder, dict):
            name = data.draw(st.text(max_size=9) | st.sampled_from(["..", "a/b", "x"]))
            holder[name] = holder[last]
        else:
            holder[last] = deepcopy(data.draw(JSON))  # of HOSTILE, which stays as it is
        if not list(places(content)):
            break
    return content


@contextmanager
def kept(path: Path) -> Iterator[None]:
    with holding(path, path.read_bytes()):
        yield


@given(data=st.data())
@fuzz
def test_arbitrary_manifests(trained, data):
    manifest = trained.path / "manifest.json"
    with kept(manifest):
        write_sealed(manifest, put(data, read_sealed(manifest)))
        told(lambda: use_checkpoint(trained))


@given(data=st.data())
@fuzz
def test_arbitrary_meta(trained, data):
    meta = trained.data / "meta.json"
    with kept(meta):
        write_sealed(meta, put(data, read_sealed(meta)))
        told(lambda: read_dataset(trained.data))
        told(lambda: use_checkpoint(trained))


SIZES = st.integers(-1, 300) | st.sampled_from([2**31, 2**32, 10**8, 2**61, 2**63 - 1, 2**64 - 1])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "f32", "?"]),
        "shape": st.lists(SIZES, max_size=4),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2),
    }
)
NAMES = st.sampled_from(
    ["head.norm.weight", "head.norm.bias", "exp_avg.head.norm.weight", "__metadata__", "x"]
)
HEADERS = st.dictionaries(NAMES, ENTRY | JSON, max_size=4) | JSON


def reseal(trained: SimpleNamespace, name: str) -> None:
    """Lets the manifest say that the file is as it should be."""
    manifest = read_sealed(trained.path / "manifest.json")
    manifest["files"][name] = _describe(trained.path / name)
    write_sealed(trained.path / "manifest.json", manifest)


@given(header=HEADERS, length=st.none() | SIZES, body=st.integers(0, 400))
@example(header={}, length=2**63, body=0)
@example(header={}, length=99_999_999, body=0)
@fuzz
def test_arbitrary_safetensors(trained, header, length, body):
    file = trained.path / "head.safetensors"
    raw = json.dumps(header).encode()
    length = len(raw) if length is None else length % 2**64
    with kept(trained.path / "manifest.json"), kept(file):
        file.write_bytes(length.to_bytes(8, "little") + raw + bytes(body))
        reseal(trained, file.name)
        assert told(lambda: read_checkpoint(trained.path))


@given(data=st.data())
@settings(fuzz, max_examples=100)
def test_arbitrary_tokenizers(trained, data):
    file = trained.path / "tokenizer.json"
    with kept(trained.path / "manifest.json"), kept(file):
        file.write_text(json.dumps(put(data, json.loads(file.read_bytes()))))
        reseal(trained, file.name)
        told(lambda: encode(load_tokenizer(Checkpoint(trained.path)), "abc"))


@given(values=st.dictionaries(st.sampled_from([*SMALL, "cluster", "memory_limit", "x"]), JSON))
@fuzz
def test_arbitrary_values_in_a_configuration(trained, values):
    with pytest.MonkeyPatch.context() as patch, holding(trained.config, dump(values)):
        told(lambda: read_configuration(trained.config, patch))


def dump(values: dict) -> bytes:
    """YAML of it, whatever it is: JSON is YAML."""
    return json.dumps(values).encode()


DEEP, DIGITS = "[" * 100_000, "9" * 5000
BOMB = "\n".join(
    f"{key}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'x'}]"
    for i, key in enumerate(
        ["keep_checkpoints", "seed", "out_dir", "dataset", "heads", "depth", "width"]
    )
)
MERGES = "\n".join(
    f"{key}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10) if i else '{x: 1}'}]}}"
    for i, key in enumerate(
        ["keep_checkpoints", "seed", "out_dir", "dataset", "heads", "depth", "width"]
    )
)


@pytest.mark.parametrize(
    "text",
    [
        *(DEEP, f"width: {DEEP}", "width: " + "[" * 60_000, "width: " + "{a: " * 15_000),
        *(f"width: {DIGITS}", "width: 0x" + "f" * 50_000, f"0x{'f' * 50_000}: 1", "1: 2", "~: 1"),
        *(BOMB, MERGES, "width: &a [*a]", "&a {width: *a}", "<<: [1]", "? [a]\n: 1", "x: 1\n---\n"),
        *("learning_rate: .nan", "width: .inf", "width: 1e400", "width: !!timestamp 2001-99-99"),
        *("width: !!int ''", "width: !!bool x", "width: !!timestamp x", "width: !!float ''"),
        *("width: !!python/object/apply:os.system [exit]", "!!python/name:os.system ''"),
        *('out_dir: "\\ud800"', 'out_dir: "a\\0b"', "out_dir: [a]", "out_dir: !!binary aGk="),
        *("cluster: {class_path: this}", "cluster: /etc/passwd", "cluster: {__path__: x}"),
        *("config: /etc/passwd", "cluster: [[]]", "width: " + "1:" * 20_000 + "1", "\0"),
        *(f"width: '{DEEP[:60_000]}'", f"{'x' * 1000}: 1", f"width: !{'x' * 50_000} 1"),
        *("depth: 1000000000", f"width: {10**18}\nheads: 1", f"num_steps: {10**30}"),
        *("x" * 60_000, "#" * 10**6),
    ],
    ids=lambda text: text[:20],
)
def test_hostile_configurations(trained, monkeypatch, text):
    with holding(trained.config, text.encode()):
        assert told(lambda: read_configuration(trained.config, monkeypatch))


@pytest.mark.parametrize("kind", ["memory_limit", "stream_dir", "out_dir", "cluster"])
def test_text_in_a_configuration_is_not_read_as_yaml(trained, monkeypatch, kind):
    """It was, by the parser of the command line: this one killed the process."""
    value = "[" * 60_000
    content = {kind: {"mgmt_address": value} if kind == "cluster" else value}
    with holding(trained.config, dump(SMALL | content)):
        config = read_configuration(trained.config, monkeypatch)
    assert (config.cluster.mgmt_address if kind == "cluster" else getattr(config, kind)) == value


def sealed(text: str) -> bytes:
    body = text.removesuffix("\n}").encode()
    return body + (END % hashlib.sha256(body).hexdigest()).encode()


@pytest.mark.parametrize("place", ["format", "step", "config", "files", "recent"])
@pytest.mark.parametrize(
    "raw",
    [DEEP, "[" * 900 + "]" * 900, DIGITS, "1e999", '"\\ud800"', '{"a":' * 900 + "1" + "}" * 900],
    ids=lambda raw: raw[:9],
)
def test_hostile_json(trained, place, raw):
    """Deep, long or strange values, of the manifest, of its parts and of meta.json."""
    manifest = read_sealed(trained.path / "manifest.json")
    text = json.dumps(manifest | {place: "HERE"}, indent=1).replace('"HERE"', raw)
    inner = json.dumps(manifest | {"config": {"width": "HERE", "cluster": "HERE"}}, indent=1)
    for content in (text, inner.replace('"HERE"', raw), f'{{"{place}": {raw}\n}}', raw):
        with holding(trained.path / "manifest.json", sealed(content)):
            assert told(lambda: use_checkpoint(trained))
    meta = read_sealed(trained.data / "meta.json")
    for key in ("tokens", "vocab_size", "dtype", "shards", "tokenizer_sha256"):
        text = json.dumps(meta | {key: "HERE"}, indent=1).replace('"HERE"', raw)
        with holding(trained.data / "meta.json", sealed(text)):
            assert told(lambda: read_dataset(trained.data))


@pytest.mark.parametrize("claim", [{"depth": 10**9}, {"width": 10**18, "heads": 1}])
def test_a_manifest_that_claims_a_huge_model(trained, run, tmp_path, claim):
    manifest = trained.path / "manifest.json"
    commands = [
        ("eval", trained.config, "--checkpoint_path", trained.path),
        ("sample", "--checkpoint_path", trained.path, "--prompt", "a"),
        ("export", "--checkpoint_path", trained.path, "--out", tmp_path / "out"),
        ("train", trained.config, "--checkpoint_path", trained.path, "--num_steps", 3),
    ]
    with kept(manifest):
        content = read_sealed(manifest)
        content["config"] |= claim
        write_sealed(manifest, content)
        for command in commands:
            with within(20):
                seen = run(*command)
            refused(SimpleNamespace(returncode=seen.status, stderr=seen.err), str(trained.path))


@pytest.mark.parametrize(
    "changes",
    [
        *({"n_layer": 10**9}, {"n_embd": 10**18}, {"n_embd": "8"}, {"n_layer": [1]}, {"n_head": 0}),
        *({"vocab_size": -1}, {"activation_function": {}}, {"dtype": "x"}, {"model_type": 5}),
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
    ],
)
def test_hostile_hugging_face_configurations(hugging_face, changes):
    file = hugging_face / "config.json"
    config = Configuration(init_from=str(hugging_face), sequence_length=8)
    with holding(file, json.dumps(json.loads(file.read_text()) | changes).encode()):
        assert told(lambda: read_hugging_face(config))


WALL = """
import resource, sys
from pathlib import Path
from weights.checkpoint import Checkpoint
from runtime.arguments import make_configuration, read_yaml
from common.tokens import Tokens
from common.console import explain
def taken():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
def read(path):
    if path.suffix == ".yaml":
        make_configuration(read_yaml(path))
    elif path.suffix == ".mdl":
        opened = Checkpoint(path)
        for name in opened.tensors:
            opened.read(name)
    else:
        Tokens(str(path), "train", 10**12).read(0, 2)
for path in [Path(sys.argv[1]), *map(Path, sys.argv[1:])]:  # once without a wall, for what is lazy
    try:
        read(path)
    except Exception as error:
        if explain(error) is None:
            raise
        print(explain(error))
    resource.setrlimit(resource.RLIMIT_AS, (taken() + 2**26, resource.RLIM_INFINITY))
"""


def test_what_a_file_claims_takes_no_memory(trained, tmp_path):
    """In a process that can take 64 MB more than it has; all the files are below 1 MB."""

    def lying(name: str, how: Callable[[dict], None]) -> Path:
        copy = SimpleNamespace(path=Path(shutil.copytree(trained.path, tmp_path / f"{name}.mdl")))
        manifest = read_sealed(copy.path / "manifest.json")
        how(manifest)
        write_sealed(copy.path / "manifest.json", manifest)
        return copy.path

    def lying_file(number: int, length: int, header: dict) -> Path:
        def change(manifest: dict) -> None:
            file = tmp_path / f"file{number}.mdl" / "head.safetensors"
            raw = json.dumps(header).encode()
            file.write_bytes((length or len(raw)).to_bytes(8, "little") + raw)
            manifest["files"][file.name] = _describe(file)

        return lying(f"file{number}", change)

    def weight(size: int, end: int) -> dict:
        return {"head.norm.weight": {"dtype": "F32", "shape": [size], "data_offsets": [0, end]}}

    paths = [
        lying("bytes", lambda m: m["files"]["head.safetensors"].update(bytes=2**50)),
        lying_file(1, 2**40, {}),
        lying_file(2, 90_000_000, {}),
        lying_file(3, 0, weight(2**40, 2**42)),
        lying_file(4, 0, weight(2**62, 4)),
        Path(shutil.copytree(trained.data, tmp_path / "data")),
    ]
    meta = read_sealed(paths[-1] / "meta.json")
    meta["shards"]["train"][0][0] = 2**50
    write_sealed(paths[-1] / "meta.json", meta)
    for name, text in {"bomb": BOMB, "merges": MERGES, "deep": DEEP, "long": "#" * 10**6}.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(text)
    command = [sys.executable, "-c", WALL, *map(str, [trained.path, *paths])]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(paths), done.stdout


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_is_not_opened(hugging_face, tmp_path, trained, run):
    shutil.copy(hugging_face / "config.json", tmp_path)
    marker = tmp_path / "ran"
    for name in ("pytorch_model.bin", "model.safetensors", "training_args.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(marker)))
        seen = run("train", trained.config, "--init_from", tmp_path, "--out_dir", tmp_path / "out")
        refused(SimpleNamespace(returncode=seen.status, stderr=seen.err), f"init_from: {tmp_path}")
        (tmp_path / name).unlink()
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # it would have


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
        {"_attn_implementation": "evil/evil"},
        {"attn_implementation": "evil/evil"},
    ],
)
def test_a_model_brings_no_code(hugging_face, tmp_path, changes):
    folder = Path(shutil.copytree(hugging_face, tmp_path / "hf"))
    marker = tmp_path / "ran"
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    told(lambda: read_hugging_face(Configuration(init_from=str(folder), sequence_length=8)))
    assert not marker.exists()


RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.load_all"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("np.load", "numpy.load", "joblib.load", "runpy.run_path", "importlib.import_module"),
    *("os.system", "os.popen", "torch.hub.load", "torch.jit.load"),
}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle"}


def test_no_call_runs_what_a_file_says():
    assert len(PROGRAM) > 20
    for path in PROGRAM:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in RUNS_CODE, where
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", where
            if isinstance(node, ast.Import):
                assert not PICKLES & {alias.name.split(".")[0] for alias in node.names}, where
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in PICKLES, where
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml":
                assert not node.attr.endswith("Loader") or node.attr == "BaseLoader", where
