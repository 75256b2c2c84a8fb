"""Prepare Shakespeare's plays by character: python data/shakespeare_char/prepare.py"""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from common.console import command
from data.shakespeare.prepare import SOURCE, plays
from data.shards import write
from data.vocabularies import characters


def main() -> None:
    ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False).parse_args()
    documents = plays()
    vocabulary = characters(text for _, text in documents)
    write(Path(__file__).absolute().parent, documents, vocabulary, SOURCE)


if __name__ == "__main__":
    command(main)
