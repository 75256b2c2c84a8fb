"""The configuration of a command: a YAML file, overridden on the command line."""

import difflib
import re
import sys
from argparse import SUPPRESS, ArgumentParser
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

import docstring_parser
import yaml
from pydantic import TypeAdapter, ValidationError

from cluster import Cluster
from configuration import SECTIONS, STRICT, TYPES, Configuration, Text
from runtime.console import UserError, short
from runtime.files import replacing

# Names of nanoGPT's configuration and of earlier versions, and ours
OTHER_NAMES = {
    "n_layer": "depth",
    "n_head": "heads",
    "n_embd": "width",
    "block_size": "sequence_length",
    "device": "backend",
    "dtype": "precision",
    "lr": "learning_rate",
    "max_iters": "num_steps",
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "decay_steps",
    "grad_clip": "max_gradient_norm",
    "gradient_accumulation_steps": "micro_batch_size",
    "eval_interval": "eval_steps",
    "eval_iters": "eval_batches",
    "keep": "keep_checkpoints",
    "recompute": "activation_checkpointing",
    "reshard": "reshard_after_forward",
    "shards": "shard_group_size",
    "activations": "activation_location",
    "pass_size": "stream_batch_size",
    "timeout": "step_timeout",
}
_VALIDATORS = {key: TypeAdapter(kind, config=STRICT) for key, kind in TYPES.items()}
_LONGEST = 2**16  # bytes of a configuration file; all keys take 2,000, and YAML is slow to read


def parse_configuration(description: str, **more: tuple[type, str]) -> tuple[Configuration, dict]:
    """Reads `CONFIG [--key value ...]` from the command line; a value is YAML, as in the file.

    Returns the configuration and the values of `more`, further options by name, with their types
    and help texts: None where they are not given, or False for a bool, which takes no value.
    Raises UserError for an unknown key (with the nearest known one) or a value that is not valid.
    """
    arguments = sys.argv[1:]
    parser = _make_parser(description, more)
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise UserError("the first argument is a configuration, such as configs/demo.yaml")
    _check_keys([a[2:].split("=")[0] for a in arguments if a.startswith("--")], "--", *more)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"{short(unknown[0])} is neither a key nor the value of one")
    given = vars(namespace)
    path = given.pop("CONFIG")
    more = {name: given.pop(name, False if more[name][0] is bool else None) for name in more}
    values = {key: _read_value(key, text) for key, text in given.items()}
    try:
        return make_configuration(read_yaml(path) | values), more
    except ValueError as error:
        raise UserError(str(error)) from None


def _make_parser(description: str, more: dict[str, tuple[type, str]]) -> ArgumentParser:
    parser = ArgumentParser(
        description=description,
        usage="%(prog)s CONFIG [--key value ...]",
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=SUPPRESS,
    )
    parser.add_argument("CONFIG", help="a file with these keys:")
    for name, (kind, text) in more.items():
        form = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name}", help=text, **form)
    for section in SECTIONS:
        text, prefix = docstring_parser.parse(section.__doc__), "cluster." * (section is Cluster)
        group = parser.add_argument_group(text.short_description)
        for key in text.params:
            default = {field.name: field.default for field in fields(section)}[key.arg_name]
            shown = yaml.safe_dump(default).split("\n")[0]
            about = " ".join(key.description.split()).replace("%", "%%")
            name = f"{prefix}{key.arg_name}"
            values = "|".join(_choices(TYPES[name])) or "VALUE"
            group.add_argument(f"--{name}", metavar=values, help=f"{about} (default: {shown})")
    return parser


def _choices(kind: object) -> list[str]:
    """The words that a key can be, if it is one of a few."""
    if kind is bool:
        return ["true", "false"]
    parts = get_args(kind)
    return [c for part in parts for c in ([part] if isinstance(part, str) else _choices(part))]


def _read_value(key: str, text: str) -> object:
    """A value of the command line; what a file would have to quote needs no quotes here."""
    try:
        value = _Loader(text).get_single_data()
    except Exception as error:
        raise UserError(f"{key}: {short(text)} is not YAML: {_one_line(error)}") from None
    return text if value is not None and Text in (TYPES[key], *get_args(TYPES[key])) else value


def read_yaml(path: str | Path) -> dict:
    """The keys of a configuration file and their values, `cluster.KEY` for those of its section.
    Raises UserError for what is not YAML, an unknown key or a value that is not valid."""
    with open(path, "rb") as file:
        raw = file.read(_LONGEST + 1)
    if len(raw) > _LONGEST:
        raise UserError(f"{path} is not a configuration: it has more than {_LONGEST:,} bytes")
    try:
        content = _Loader(raw.decode()).get_single_data()
    except Exception as error:  # YAML's, or what a value such as 2001-99-99 raises
        raise UserError(f"{path} is not YAML: {_one_line(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("cluster") or {}, dict):
        raise UserError(f"{path} is not a configuration: something in it has no `key: value` lines")
    values = {k if isinstance(k, str) else short(k): value for k, value in content.items()}
    cluster = values.pop("cluster", None) or {}
    values |= {f"cluster.{k if isinstance(k, str) else short(k)}": v for k, v in cluster.items()}
    _check_keys([*values], f"{path}: ")
    try:
        _check_values(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return values


class _Loader(yaml.SafeLoader):
    """YAML as a configuration needs it: no code, no dates, 6e-4 a number, and no aliases, with
    which a few lines can expand without bound."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if not pair[0].endswith(":timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: object, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"write the value of *{self.peek_event().anchor} out")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def make_configuration(values: dict) -> Configuration:
    """The configuration of these keys, `cluster.KEY` for those of that section. Raises ValueError,
    in one line that names the key."""
    _check_values(values)
    cluster = {k.removeprefix("cluster."): v for k, v in values.items() if k.startswith("cluster.")}
    values = {k: v for k, v in values.items() if not k.startswith("cluster.")}
    try:
        return Configuration(**values, cluster=Cluster(**cluster))
    except ValidationError as error:  # of __post_init__
        raise ValueError(_reason(error)) from None


def _reason(error: ValidationError) -> str:
    reasons = (each["msg"].removeprefix("Value error, ") for each in error.errors())
    return " or ".join(dict.fromkeys(reason.removeprefix("Input ") for reason in reasons))


def _check_values(values: dict) -> None:
    """Raises ValueError, `KEY: VALUE should be ...`, for the first that is not valid."""
    for key, value in values.items():
        try:
            _VALIDATORS[key].validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{key}: {short(value)} {_reason(error)}") from None


def write_configuration(config: Configuration, resolved: Configuration, path: Path) -> None:
    """Writes the configuration as it was given, so that it can be used again on another machine or
    on more systems; what was chosen for this one is added as comments."""
    given, chosen = asdict(config), asdict(resolved)
    chosen = {key: value for key, value in chosen.items() if value != given[key]}
    comments = "".join(f"# chosen here: {line}\n" for line in yaml.safe_dump(chosen).splitlines())
    with replacing(path) as writing:
        writing.write_text(comments + yaml.safe_dump(given, sort_keys=False), encoding="utf-8")


def _check_keys(keys: list[str], prefix: str, *more: str) -> None:
    known = [*TYPES, *more]
    for key in keys:
        if key not in known:
            near = [n for n in known if n.endswith(f".{key}") or n == OTHER_NAMES.get(key)]
            near = near or difflib.get_close_matches(key[:100], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
            raise UserError(f"{prefix}{key[:100]} is not a known key; {hint}")
