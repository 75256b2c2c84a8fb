"""Writes docs/configuration.md from the docstrings of the keys: python docs/reference.py"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import docstring_parser
import yaml

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from configuration import SECTIONS, Cluster

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Every key of a configuration, made from the docstrings by `python docs/reference.py`. A key stands
in a YAML file or on the command line, which comes first: `python train.py configs/111m.yaml
--batch_size 8`. A list or a mapping is YAML in both places; what else is written there means what
its key says: a number, true or false, a text. `null` is no value; `auto` is replaced by what fits
and is fastest on this machine; the choice is printed, recorded in `config.yaml` and kept by a
resumed run. An unknown key is refused, with the nearest known one, and so is a key that is twice in
the file."""
TITLES = {"GPTConfig": "Model", "Cluster": "Cerebras cluster"}


def reference() -> str:
    """The page: a table for each section of the configuration."""
    parts = [HEAD]
    for section in SECTIONS:
        text = docstring_parser.parse(section.__doc__)
        prefix = "cluster." if section is Cluster else ""
        parts.append(f"\n## {TITLES.get(section.__name__, text.short_description)}\n")
        parts.append("| key | values | default | |\n| --- | --- | --- | --- |")
        about = {each.arg_name: " ".join(each.description.split()) for each in text.params}
        for field in fields(section):
            default = yaml.safe_dump(field.default).split("\n")[0]
            cells = (f"`{prefix}{field.name}`", kind(field.type), f"`{default}`")
            parts.append(" | ".join(("", *cells, about[field.name], "")).strip())
    return "\n".join(parts) + "\n"


def kind(annotation: object) -> str:
    """What a value may be, in words."""
    words = {bool: "true, false", int: "a whole number", float: "a number", str: "text"}
    if annotation in words:
        return words[annotation]
    if annotation is type(None):
        return "null"
    if isinstance(annotation, str):
        return annotation
    if getattr(annotation, "__origin__", None) is list:
        return "a list"
    if getattr(annotation, "__origin__", None) is dict:
        return "weights of texts"
    if hasattr(annotation, "__metadata__"):
        return kind(annotation.__origin__)
    return ", ".join(dict.fromkeys(kind(part) for part in get_args(annotation)))


if __name__ == "__main__":
    PAGE.write_text(reference())
