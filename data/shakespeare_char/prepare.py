"""Prepare Shakespeare's plays by character: python data/shakespeare_char/prepare.py"""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from data.prepare import scratch, write
from data.shakespeare.prepare import SOURCE, plays
from data.vocabularies import characters
from runtime.console import command


def main() -> None:
    ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False).parse_args()
    folder = Path(__file__).absolute().parent
    with scratch(folder) as temporary:
        splits = plays()
        write(folder, temporary, splits, characters(splits), SOURCE)


if __name__ == "__main__":
    command(main)
