"""What a run is: one flat set of keys, from configs/*.yaml, overridden on the command line."""

import difflib
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from cluster import Cluster
from errors import UserError, short
from files import replacing
from model import GPTConfig


@dataclass
class Configuration(GPTConfig):
    """A run: the keys of the model, and these.

    Args:
        out_dir: folder of the checkpoints, metrics, picture and resolved configuration
        dataset: folder with train.bin, val.bin and meta.json (see data/)
        batch_size: sequences in an optimizer step, whatever the number of systems
        micro_batch_size: sequences in one forward pass; null: what memory allows
        sequence_length: tokens in a sequence
        num_steps: optimizer steps of the whole run
        checkpoint_steps: steps between checkpoints
        keep: how many of the newest checkpoints to keep; null: all
        eval_steps: steps between evaluations
        eval_batches: batches of an evaluation; null: all of val.bin
        learning_rate: the peak, after warm-up
        warmup_steps: steps of linear warm-up
        decay_steps: steps from the end of warm-up to a tenth of the peak; null: up to num_steps
        weight_decay: of AdamW, on matrices and embeddings only
        adam_epsilon: of AdamW
        max_gradient_norm: global norm to which gradients are clipped
        skip_loss_spikes: leave out the update of a step whose loss or gradient norm is 6 standard
            deviations above the mean of the 128 steps before it
        seed: of the weights, the order of the data and dropout
        backend: where to run; auto takes a GPU when there is one
        engine: how to run; auto asks the planner
        num_systems: number of GPUs or systems to train on
        max_restarts: how often to go on from the newest checkpoint when one of several is lost
        timeout: seconds in a step after which a silent system is lost; null: 120 or three steps
        precision: of the matrix products; weights and optimizer are fp32 always; tf32: on GPUs
        compile: the blocks with torch.compile; auto: on a GPU, as it takes a C++ compiler and a
            minute, and gains nothing on a CPU
        memory_limit: such as 20GB; null: what the machine or its container has
        stream_to: where the streaming engine keeps weights and optimizer
        stream_dir: folder for its files, on a fast disk; null: out_dir
        recompute: compute a block again in the backward pass instead of keeping what it computed
        activations: where the inputs of recomputed blocks wait for the backward pass
        pass_size: sequences that go through the layers together; null: as many as memory allows
        shards: systems that share a copy of the weights; null: all, or as few as memory allows
        reshard: share them again after each use; false: once a step
        offload: keep the shards in host memory
        cluster: of Cerebras systems; --cluster.mgmt_address HOST:PORT and so on
        checkpoint_path: a checkpoint to start from, or latest: the newest in out_dir, if any
        init_from: folder or hub name of Hugging Face GPT-2 weights to start from
    """

    out_dir: str = "model_dir"
    dataset: str = "data/openwebtext"
    batch_size: int = 120
    micro_batch_size: int | None = None
    sequence_length: int = 2048
    num_steps: int = 10000
    checkpoint_steps: int = 1000
    keep: int | None = None
    eval_steps: int = 1000
    eval_batches: int | None = None
    learning_rate: float = 6e-4
    warmup_steps: int = 1500
    decay_steps: int | None = None
    weight_decay: float = 0.1
    adam_epsilon: float = 1e-8
    max_gradient_norm: float = 1.0
    skip_loss_spikes: bool = False
    seed: int = 0
    backend: Literal["auto", "CPU", "GPU", "CSX"] = "auto"
    engine: Literal["auto", "resident", "streaming", "sharded", "cerebras"] = "auto"
    num_systems: int = 1
    max_restarts: int = 0
    timeout: int | None = None
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    memory_limit: str | None = None
    stream_to: Literal["auto", "ram", "disk"] = "auto"
    stream_dir: str | None = None
    recompute: bool | Literal["auto"] = "auto"
    activations: Literal["auto", "device", "host"] = "auto"
    pass_size: int | None = None
    shards: int | None = None
    reshard: bool | Literal["auto"] = "auto"
    offload: bool | Literal["auto"] = "auto"
    cluster: Cluster = field(default_factory=Cluster)
    checkpoint_path: str | None = None
    init_from: str | None = None

    def __post_init__(self):
        check_types(asdict(self))
        super().__post_init__()
        for key, most in _MOST.items():
            if getattr(self, key) > most:
                raise ValueError(f"{key}: {getattr(self, key)} is above {most:,}")
        for key in _POSITIVE:
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"{key}: {value} is not a positive number")
        for key in ("warmup_steps", "weight_decay", "seed", "max_restarts"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key}: {getattr(self, key)} is negative")
        if self.seed >= 2**32:
            raise ValueError(f"seed: {self.seed} is not below 2**32")
        if self.batch_size < self.num_systems:
            raise ValueError(
                f"batch_size: {self.batch_size} is smaller than num_systems {self.num_systems}; "
                f"every system takes at least a sequence"
            )
        if self.sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"sequence_length: {self.sequence_length} is above max_position_embeddings "
                f"{self.max_position_embeddings}; lower the one or raise the other"
            )


_POSITIVE = (
    *("batch_size", "micro_batch_size", "sequence_length", "num_steps", "checkpoint_steps", "keep"),
    *("eval_steps", "eval_batches", "learning_rate", "decay_steps", "adam_epsilon"),
    *("max_gradient_norm", "num_systems", "pass_size", "shards", "timeout"),
)
_MOST = {  # of a model that can be laid out in seconds, without its memory
    "width": 10**6,
    "depth": 10**4,
    "vocab_size": 10**9,
    "max_position_embeddings": 10**9,
}
MODEL_KEYS = tuple(field.name for field in fields(GPTConfig))
_KINDS = {field.name: field.type for field in fields(Configuration) if field.type is not Cluster}
_KINDS |= {f"cluster.{field.name}": field.type for field in fields(Cluster)}
# Names of nanoGPT's configuration, and ours
NANOGPT = {
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
}
_LONGEST = 2**16  # bytes of a configuration file; all keys take 2,000, and YAML is slow to read


def parse_configuration(description: str, **more: tuple[type, str]) -> tuple[Configuration, dict]:
    """Reads `CONFIG [--key value ...]` from the command line.

    Returns the configuration and the values of `more`, further options by name, with their types
    and help texts: None where they are not given, or False for a bool, which takes no value. Raises
    UserError for an unknown key (with the nearest known one) or a value of the wrong type.
    """
    arguments = sys.argv[1:]
    parser = ArgumentParser(
        description=description,
        usage="%(prog)s CONFIG [--key value ...]",
        allow_abbrev=False,
        exit_on_error=False,
        print_config=None,
    )
    parser.add_argument("CONFIG", help="a file; its keys are these:")
    for name, (kind, text) in more.items():
        form = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name}", help=text, **form)
    parser.add_class_arguments(Configuration)
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise UserError("the first argument is a configuration, such as configs/demo.yaml")
    _check_keys([a[2:].split("=")[0] for a in arguments if a.startswith("--")], "--", *more)
    values = read_yaml(arguments[0])
    try:
        typed = vars(parser.parse_args(arguments, defaults=False))
        del typed["CONFIG"]
        given = {
            name: typed.pop(name, False if kind is bool else None)
            for name, (kind, _) in more.items()
        }
        typed["cluster"] = vars(typed["cluster"]) if "cluster" in typed else {}
        values |= _flat(typed)
        cluster = {key: values.pop(f"cluster.{key}") for key in _cluster_keys(values)}
        return Configuration(**values, cluster=Cluster(**cluster)), given
    except (ArgumentError, ValueError) as error:
        message = str(error).replace("Parser key ", "").replace('"', "")
        message = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", message)
        raise UserError(" ".join(message.split())) from None


def read_yaml(path: str | Path) -> dict:
    """The keys of a configuration file, `cluster.KEY` for those of its section, and their values,
    of the right types. They are not passed through a parser of the command line, which would read
    text once more as YAML and look for classes to import."""
    with open(path, "rb") as file:
        raw = file.read(_LONGEST + 1)
    if len(raw) > _LONGEST:
        raise UserError(f"{path} is not a configuration: it has more than {_LONGEST:,} bytes")
    try:
        content = _Loader(raw.decode()).get_single_data()
    except Exception as error:  # YAML's, or what a value such as 2001-99-99 comes to
        message = " ".join(str(error).split())[:500]
        raise UserError(f"{path} is not YAML: {message}") from None
    if not isinstance(content, dict) or not isinstance(content.get("cluster") or {}, dict):
        raise UserError(f"{path} is not a configuration: something in it has no `key: value` lines")
    values = _flat(content)
    _check_keys([*values], f"{path}: ")
    try:
        check_types(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return values


class _Loader(yaml.SafeLoader):
    """YAML as a configuration needs it: no code, no dates, 6e-4 a number, and no aliases, which
    make a few lines as large as one likes."""

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


def check_types(values: dict) -> None:
    """Raises ValueError where a key of a configuration has a value of the wrong type."""
    if not isinstance(values.get("cluster") or {}, dict):
        raise ValueError(f"cluster: expected keys and values, not {short(values['cluster'])}")
    for key, value in _flat(values).items():
        kind = _KINDS.get(key)
        if kind is not None and not _fits(value, kind):
            name = str(kind) if get_args(kind) else kind.__name__
            raise ValueError(f"{key}: expected {name.replace('typing.', '')}, not {short(value)}")


def _fits(value: object, kind: object) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(each, *inner) for each in value)
    if kind is str:
        return isinstance(value, str) and value.isprintable()
    if type(value) is int and abs(value) >= 2**63:
        return False
    return type(value) in ((int, float) if kind is float else (kind,))


def _flat(values: dict) -> dict:
    """With the keys of the section `cluster` beside the others."""
    values = {k if isinstance(k, str) else short(k): value for k, value in values.items()}
    cluster = values.pop("cluster", None) or {}
    return values | {
        f"cluster.{k if isinstance(k, str) else short(k)}": value for k, value in cluster.items()
    }


def _cluster_keys(values: dict) -> list[str]:
    return [key.removeprefix("cluster.") for key in values if key.startswith("cluster.")]


def write_configuration(config: Configuration, resolved: Configuration, path: Path) -> None:
    """Writes a file that is a configuration again, also for another machine or number of systems:
    what the planner chose for this one is in its comments."""
    asked, chosen = asdict(config), asdict(resolved)
    chosen = {key: value for key, value in chosen.items() if value != asked[key]}
    comments = "".join(f"# chosen here: {line}\n" for line in yaml.safe_dump(chosen).splitlines())
    with replacing(path) as writing:
        writing.write_text(comments + yaml.safe_dump(asked, sort_keys=False), encoding="utf-8")


def _check_keys(keys: list[str], prefix: str, *more: str) -> None:
    known = [*_KINDS, "cluster", *more]
    for key in keys:
        if key not in known:
            near = [name for name in known if name.endswith(f".{key}") or name == NANOGPT.get(key)]
            near = near or difflib.get_close_matches(key[:100], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
            raise UserError(f"{prefix}{key[:100]} is not a known key; {hint}")
