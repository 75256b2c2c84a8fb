"""Counts code lines, without blanks, comments and docstrings: the core six files, the rest of the
root and each folder of the product, and the original's six files."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ["model.py", "train.py", "eval.py", "sample.py", "configuration.py", "dataset.py"]
FOLDERS = ("common", "weights", "engines", "planner", "runtime", "data")
ORIGINAL, MEGATRON = 565, 20_507  # gigaGPT's six files, and Megatron-LM, by the original's README
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def code_lines(path: Path) -> int:
    """Lines that hold some token of code."""
    source = path.read_text(encoding="utf-8")
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def main() -> None:
    root = {path.name: code_lines(path) for path in sorted(ROOT.glob("*.py"))}
    total = sum(root.values())
    for name in CORE:
        print(f"{root[name]:6,}  {name}")
    core = sum(root[name] for name in CORE)
    print(f"{core:6,}  the core, these six (the original: {ORIGINAL})")
    print(f"{total - core:6,}  {', '.join(sorted(set(root) - set(CORE)))}")
    for folder in FOLDERS:
        lines = sum(code_lines(path) for path in (ROOT / folder).rglob("*.py"))
        total += lines * (folder != "data")
        print(f"{lines:6,}  {folder}/{' (not in the product below)' * (folder == 'data')}")
    print(f"{total:6,}  the product (Megatron-LM: {MEGATRON:,})")


if __name__ == "__main__":
    main()
