"""The ladder of docs/architecture.md: each file imports from files below it only, also inside
functions; and no function is longer than a screen."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LADDER = [  # the ground first
    *("loss", "model", "runtime.console", "runtime.files", "runtime.tokens", "dataset"),
    *("cluster", "configuration", "runtime.arguments", "runtime.checkpoint"),
    *("engines.optimizer", "engines.attention", "engines.lean", "engines.base"),
    *("engines.threads", "engines.buffers", "engines.store"),
    *("engines.resident", "engines.streaming", "engines.sharded", "engines.cerebras", "engines"),
    *("planner.measure", "planner.machine", "planner.costs", "planner.search", "planner.report"),
    *("planner.resolve", "runtime.launch", "runtime.distributed", "runtime.tracking"),
    *("runtime.metrics", "runtime.profiling", "runtime.families", "runtime.huggingface"),
    *("runtime.samples", "runtime.generation", "runtime.card", "runtime.resume"),
]
COMMANDS = ["train", "eval", "sample", "export", "plan"]
PACKAGES = ("runtime", "planner", "engines", "data")
PATTERNS = ("*.py", *(f"{package}/**/*.py" for package in PACKAGES))
FILES = [path for pattern in PATTERNS for path in ROOT.glob(pattern)]
LONGEST = 60  # lines of a function


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {name_of(path): path for path in FILES}


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


def test_every_file_is_on_the_ladder():
    listed = {*LADDER, *COMMANDS, *PACKAGES}
    assert {name for name in OURS if not name.startswith("data.")} <= listed
    assert set(LADDER) | set(COMMANDS) <= set(OURS)
    assert len(list(ROOT.glob("*.py"))) <= 10


@pytest.mark.parametrize("name", LADDER)
def test_imports_point_down(name):
    below = set(LADDER[: LADDER.index(name)])
    assert imports(OURS[name]) & set(OURS) <= below


def test_commands_do_not_import_each_other():
    for name in COMMANDS:
        assert not imports(OURS[name]) & set(COMMANDS), name


def test_the_model_needs_torch_only():
    assert {n.split(".")[0] for n in imports(OURS["model"])} == {
        *("torch", "math", "hashlib", "dataclasses", "typing", "loss")
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
        ("pydantic", {"configuration", "cluster", "runtime.arguments"}),
    ],
)
def test_a_package_is_imported_by_these_only(package, files):
    for name, path in OURS.items():
        found = [n for n in imports(path) if n == package or n.startswith(f"{package}.")]
        assert not found or name in files, name


def test_functions_fit_a_screen():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST, f"{path.name}: {node.name} has {lines} lines"
