"""The configuration of a command: a YAML file, overridden on the command line."""

import difflib
import sys
from argparse import SUPPRESS, ArgumentParser
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

import docstring_parser
import yaml

from common.console import UserError, one_line, short
from common.files import replacing
from configuration import KEYS, SECTIONS, Cluster, Configuration, make_configuration

# Names of nanoGPT's configuration that are unlike ours, and ours
OTHER_NAMES = {
    "n_layer": "depth",
    "n_embd": "width",
    "block_size": "sequence_length",
    "device": "backend",
    "dtype": "precision",
    "lr": "learning_rate",
    "max_iters": "num_steps",
    "grad_clip": "max_gradient_norm",
    "gradient_accumulation_steps": "micro_batch_size",
    "eval_interval": "eval_steps",
    "log_interval": "log_steps",
    "min_lr": "learning_rate, a tenth of which is the minimum",
    "eval_iters": "eval_batches",
}
_LONGEST = 2**16  # bytes of a configuration file; all keys take 2,000, and YAML is slow to read


def parse_configuration(
    description: str, shown: tuple = SECTIONS, **extra_options: tuple[type, str]
) -> tuple[Configuration, dict]:
    """Reads `CONFIG [--key value ...]` from the command line; --help shows the keys of the sections
    that a command uses.

    Returns the configuration, and the values of `extra_options`, which have a type and a help text:
    None where they are not given; a bool takes no value. Raises UserError for an unknown key (with
    the nearest known one) or a value that is not valid.
    """
    arguments = sys.argv[1:]
    parser = _make_parser(description, shown, extra_options)
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise UserError("the first argument is a configuration, such as configs/demo.yaml")
    typed = [text[2:].split("=")[0] for text in arguments if text.startswith("--")]
    check_keys(typed, "--", extra_options)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"{short(unknown[0])} is neither a key nor the value of one")
    options = vars(namespace)
    values = read_yaml(options.pop("CONFIG"))
    extra = {name: options.pop(name, None) for name in extra_options}
    for key, text in options.items():
        section = values["cluster"] if key.startswith("cluster.") else values
        section[key.removeprefix("cluster.")] = _read_value(key, text)
    return make_configuration(values), extra


def _make_parser(description: str, shown: tuple, extra_options: dict) -> ArgumentParser:
    parser = ArgumentParser(
        description=description,
        usage="%(prog)s CONFIG [--key value ...]",
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=SUPPRESS,
    )
    parser.add_argument("CONFIG", help="a file with these keys:")
    for name, (kind, text) in extra_options.items():
        form = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name}", help=text, **form)
    for section in SECTIONS:
        prefix = "cluster." if section is Cluster else ""
        text = docstring_parser.parse(section.__doc__)
        group = parser.add_argument_group(text.short_description)
        described = {key.arg_name: key.description for key in text.params}
        for field in fields(section):
            default = yaml.safe_dump(field.default).split("\n")[0]
            about = " ".join(described.get(field.name, "").split()).replace("%", "%%")
            group.add_argument(
                f"--{prefix}{field.name}",
                metavar="|".join(_choices(field.type)) or "VALUE",
                help=f"{about} (default: {default})" if section in shown else SUPPRESS,
            )
    return parser


def _choices(kind: object) -> list[str]:
    """The words that a key can be, if it is one of a few."""
    if kind is bool:
        return ["true", "false"]
    if isinstance(kind, str):
        return [kind]
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _read_value(key: str, text: str) -> object:
    """Returns a value of the command line: a list or a mapping is YAML, all else is its text."""
    if text[:1] not in ("[", "{"):
        return None if text == "null" else text
    try:
        return _Loader(text).get_single_data()
    except Exception as error:
        raise UserError(f"{key}: {short(text)} is not YAML: {one_line(error)}") from None


class _Loader(yaml.BaseLoader):
    """Reads YAML without types: a value is a text, a list or a mapping, whose keys differ. What a
    text means, the type of its key says, so that 6e-4 is a number and 1:30 none. There are no tags,
    and no aliases, with which a few lines can expand without bound."""

    def compose_node(self, parent: object, index: object) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            raise ValueError("a text that begins with *, & or ! needs quotes")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        for name, times in Counter(str(name.value) for name, _ in node.value).items():
            if times > 1:
                raise ValueError(f"the key {short(name)} is there twice; remove one")
        values = super().construct_mapping(node, deep)
        return {key: None if value in ("", "null", "~") else value for key, value in values.items()}

    def construct_sequence(self, node: yaml.Node, deep: bool = False) -> list[str]:
        return [_source(item) for item in node.value]


def _source(node: yaml.Node) -> str:
    """Returns the text of an item of a list, such as `ROMEO:`, which YAML takes for a mapping."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    is_block = isinstance(node, yaml.MappingNode) and not node.flow_style
    last = node.value[-1][1] if is_block else node  # what follows it may be a comment
    begin = node.start_mark
    return begin.buffer[begin.pointer : last.end_mark.pointer].strip()


def read_yaml(path: str | Path) -> dict:
    """Returns the keys of a configuration file and their values. Raises UserError for what is not
    YAML, and for an unknown key or one that is there twice."""
    with open(path, "rb") as file:
        raw = file.read(_LONGEST + 1)
    if len(raw) > _LONGEST:
        raise UserError(f"{path} is not a configuration: it has more than {_LONGEST:,} bytes")
    try:
        values = _Loader(raw).get_single_data()
    except Exception as error:  # YAML has many
        raise UserError(f"{path} is not a configuration: {one_line(error)[:500]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a configuration: it has no `key: value` lines")
    cluster = values.pop("cluster", None) or {}
    if not isinstance(cluster, dict):
        raise UserError(f"{path}: cluster is a section, with lines such as `  job_priority: p1`")
    check_keys([*values, *(f"cluster.{key}" for key in cluster)], f"{path}: ")
    for key in [key for key in values if key.startswith("cluster.")]:
        name = key.removeprefix("cluster.")
        if name in cluster:
            raise UserError(f"{path} is not a configuration: the key {key!r} is there twice")
        cluster[name] = values.pop(key)
    return values | {"cluster": cluster}


def write_configuration(config: Configuration, resolved: Configuration, path: Path) -> None:
    """Writes the configuration as it was given, so that it can be used again on another machine or
    on more systems; what was chosen for this one is added as comments."""
    given = asdict(config)
    chosen = {key: value for key, value in asdict(resolved).items() if value != given[key]}
    comments = "".join(f"# chosen here: {line}\n" for line in yaml.safe_dump(chosen).splitlines())
    with replacing(path) as writing:
        writing.write_text(comments + yaml.safe_dump(given, sort_keys=False), encoding="utf-8")


def check_keys(keys: list[str], prefix: str, extra: Iterable[str] = ()) -> None:
    """Raises UserError for the first key that is not known, with the nearest that is."""
    known = [*KEYS, *extra]
    for key in keys:
        if key not in known:
            close = [name for name in known if name.endswith(f".{key}")]
            close += [OTHER_NAMES[key]] if key in OTHER_NAMES else []
            close += difflib.get_close_matches(key[:100], known, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists the keys"
            raise UserError(f"{prefix}{key[:100]} is not a known key; {hint}")
