"""Counts code lines, without blanks, comments and docstrings, as the original counts its own.

The budgets are a compass (docs/design.md): six files under the original's 565, the whole product
under about a ninth of Megatron-LM's 20,507.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIX = ["model.py", "train.py", "eval.py", "sample.py", "configuration.py", "dataset.py"]
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
    folders = ("*.py", "engines/*.py", "data/**/*.py")
    product = sorted(path for pattern in folders for path in ROOT.glob(pattern))
    counts = {str(path.relative_to(ROOT)): code_lines(path) for path in product}
    for name, count in counts.items():
        print(f"{count:6,}  {name}")
    print(f"{sum(counts[name] for name in SIX):6,}  {' '.join(SIX)} (original: 565)")
    print(f"{sum(counts.values()):6,}  everything in the product (Megatron-LM: 20,507)")


if __name__ == "__main__":
    main()
