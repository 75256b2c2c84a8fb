"""Who may know whom (docs/design.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {path.stem for path in ROOT.glob("*.py")} | {"engines", "data"}
MAY_KNOW = {
    "errors": set(),
    "loss": set(),
    "model": {"loss"},
    "cluster": set(),
    "files": {"errors"},
    "configuration": {"cluster", "model", "errors", "files"},
    "dataset": {"errors", "files"},
    "checkpoint": {"configuration", "errors", "files"},
    "systems": {"configuration", "errors", "launch"},
    "launch": {"checkpoint", "configuration", "errors", "plan", "resume", "systems"},
    "resume": {
        *("checkpoint", "configuration", "dataset", "errors", "export", "metrics", "model"),
        *("systems",),
    },
    "machine": {"configuration", "errors", "files"},
    "plan": {"configuration", "dataset", "model", "errors", "files", "machine", "engines"},
    "metrics": {"engines", "errors", "files"},
    "engines/__init__": {"configuration", "model", "errors", "engines"},
    "engines/optimizer": {"configuration"},
    "engines/resident": {"configuration", "model", "engines"},
    "engines/store": {"errors"},
    "engines/streaming": {"configuration", "model", "engines", "errors"},
    "engines/sharded": {"configuration", "model", "engines"},
    "engines/cerebras": {"configuration", "model", "engines", "errors"},
}
PLANNERS = {"plan", "train", "eval", "launch"}
DISTRIBUTED = {"systems", "launch", "sharded"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("module", MAY_KNOW)
def test_modules_know_no_more_than_they_may(module):
    known = {name.split(".")[0] for name in imports(ROOT / f"{module}.py")} & OURS
    assert known <= MAY_KNOW[module]


def test_model_knows_torch_alone():
    assert {n.split(".")[0] for n in imports(ROOT / "model.py")} == {
        *("torch", "math", "hashlib", "dataclasses", "typing", "loss")
    }


def test_engines_do_not_know_each_other():
    for path in (ROOT / "engines").glob("*.py"):
        if path.stem != "__init__":
            engines = {n for n in imports(path) if n.startswith("engines.")}
            store = {"engines.store"} if path.stem == "streaming" else set()
            assert engines <= {"engines.optimizer"} | store, path


def test_only_these_plan():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("engines/*.py")]:
        if "plan" in imports(path):
            assert path.stem in PLANNERS, path


def test_only_one_file_knows_cerebras():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("engines/*.py")]:
        theirs = {name.split(".")[0] for name in imports(path)} & {"cerebras", "grpc"}
        assert not theirs or path.name == "cerebras.py", path
    for path in ROOT.glob("*.py"):  # and its engine is imported when it is opened
        assert "engines.cerebras" not in path.read_text(), path


def test_only_these_know_of_distributed():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("engines/*.py")]:
        if path.stem not in DISTRIBUTED:
            assert not re.search(r"\btorch\.distributed", path.read_text()), path
