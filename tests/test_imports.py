"""The ladder of docs/architecture.md: a row imports only from rows below it and from itself, also
inside functions, and never in a circle; and no function is longer than a screen."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import PROGRAM, ROOT

LADDER = [  # the ground first
    {"common"},
    {"ops", "loss", "model"},
    {"configuration", "dataset"},
    {"weights"},
    {"engines"},
    {"planner"},
    {"runtime"},
    {"train", "eval", "sample", "export", "plan"},
]
COMMANDS = LADDER[-1]
LONGEST = 60  # lines of a function


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {name_of(path): path for path in PROGRAM}


def imports(path: Path) -> set[str]:
    """All that a file imports anywhere; of `from X import Y` X.Y, if that is a module of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in OURS} or {node.module}
    return found


def row_of(name: str) -> int:
    return next(row for row, names in enumerate(LADDER) if name.split(".")[0] in names)


def test_every_file_is_on_the_ladder():
    names = set().union(*LADDER)
    assert {name.split(".")[0] for name in OURS} == names | {"data"}
    assert len(list(ROOT.glob("*.py"))) <= 10


@pytest.mark.parametrize("name", [name for name in OURS if not name.startswith("data")])
def test_imports_point_down(name):
    for other in imports(OURS[name]) & set(OURS):
        assert row_of(other) <= row_of(name), other


def test_there_are_no_circles():
    arrows = {name: imports(path) & set(OURS) for name, path in OURS.items()}
    assert set(TopologicalSorter(arrows).static_order()) == set(OURS)


def test_commands_do_not_import_each_other():
    for name in COMMANDS:
        assert not imports(OURS[name]) & set(COMMANDS), name


def test_the_model_needs_torch_only():
    assert {n.split(".")[0] for n in imports(OURS["model"])} == {
        *("torch", "math", "hashlib", "dataclasses", "typing", "threading", "ops", "loss")
    }


def test_engines_do_not_import_each_other():
    engines = {f"engines.{name}" for name in ("resident", "streaming", "sharded", "cerebras")}
    for name in engines:
        assert not imports(OURS[name]) & engines, name


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("cerebras", {"engines.cerebras"}),
        ("torch.distributed", {"engines.sharded", "runtime.distributed", "runtime.launch"}),
        ("pydantic", {"configuration"}),
    ],
)
def test_a_package_is_imported_by_these_only(package, files):
    for name, path in OURS.items():
        found = [n for n in imports(path) if n == package or n.startswith(f"{package}.")]
        assert not found or name in files, name


def test_functions_fit_a_screen():
    for path in PROGRAM:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST, f"{path.name}: {node.name} has {lines} lines"
