"""Where a run starts: from nothing, from a checkpoint, or from Hugging Face weights."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from checkpoint import TOKENIZER, Checkpoint, find_checkpoints
from configuration import MODEL_KEYS, Configuration
from dataset import EvalBatches, Tokens, TrainBatches
from errors import UserError, short
from metrics import read_records, say
from model import GPT, GPTConfig
from systems import World

# Keys that may change freely, and those that the order of the data depends on.
FREE = {
    *("out_dir", "checkpoint_path", "init_from", "memory_limit", "keep", "max_restarts", "timeout"),
    *("stream_to", "stream_dir", "recompute", "activations", "pass_size"),
    *("shards", "reshard", "offload", "cluster"),
}
DATA_KEYS = {"dataset", "batch_size", "sequence_length", "seed"}


@dataclass
class Start:
    """What a run starts from: `read(name, rows)` gives its tensors, None where they are drawn."""

    config: Configuration
    read: Callable | None = None
    updates: int | None = None  # of Adam's moments; None where there are none
    step: int = 0
    origin: str = "starting fresh"
    checkpoint: Checkpoint | None = None

    @property
    def recent(self) -> list[tuple[float, float]]:
        """Losses and norms of the last steps before it."""
        return self.checkpoint.recent if self.checkpoint else []

    @property
    def chosen(self) -> dict:
        """The configuration in which an earlier part of the run replaced every `auto`."""
        return self.checkpoint.config if self.checkpoint else {}

    def open_data(
        self, config: Configuration, world: World
    ) -> tuple[Callable, Callable, TrainBatches]:
        """The batches to train on and those to evaluate on, as functions of (rank, world), and the
        former as they are for all. They must be the same on every system, and if they are not those
        that the checkpoint was trained on, it is said."""
        data = (config.dataset, config.vocab_size, config.sequence_length, config.batch_size)
        train_batches = partial(TrainBatches, *data, config.seed)
        val_batches = partial(EvalBatches, *data, config.eval_batches)
        with world.together():  # both are opened here, for their errors
            whole, val_tokens = train_batches(0, 1), val_batches(0, 1).tokens
            tokens = whole.tokens
            if self.checkpoint is not None:
                check_tokenizer(self.checkpoint, tokens)
        check_same_data(world, tokens, val_tokens)
        if self.checkpoint is not None and self.checkpoint.train_tokens != tokens.count:
            say(f"note: {tokens.path} is not what it was; its order is another from here on")
        return train_batches, val_batches, whole


def find_start(config: Configuration, world: World) -> Start:
    """What `checkpoint_path` and `init_from` name; UserError where it can't be gone on from."""
    checkpoint = find_checkpoint(config, world)
    check_out_dir(Path(config.out_dir), checkpoint)
    if checkpoint is not None:
        if config.init_from is not None:  # then the model is that one, not the configuration's
            config = with_model(config, model_config(checkpoint))
        check_configuration(config, checkpoint)
        origin = f"resumed from {checkpoint.path} at step {checkpoint.step}"
        done = (checkpoint.updates, checkpoint.step)
        return Start(config, checkpoint.read, *done, origin, checkpoint)
    if config.init_from is not None:
        from export import read_hugging_face  # transformers takes seconds to import

        config, read = read_hugging_face(config)
        return Start(config, read, origin=f"started from the weights of {config.init_from}")
    return Start(config)


def find_checkpoint(config: Configuration, world: World) -> Checkpoint | None:
    """The checkpoint that `checkpoint_path` names, or None where there is none to start from. Of
    several systems the first says which is the latest, and each verifies its share of the files."""
    path = config.checkpoint_path
    if path == "latest":
        found = find_checkpoints(Path(config.out_dir))
        path = world.gather(found[max(found)] if found else None)[0]
    if path is None:
        return None
    checkpoint = Checkpoint(path)
    if world.size > 1:
        checkpoint.verify(world.rank, world.size)
    return checkpoint


def check_out_dir(out_dir: Path, checkpoint: Checkpoint | None) -> None:
    """A run that starts from `checkpoint` never mixes its checkpoints with those of another."""
    others = find_checkpoints(out_dir)
    if checkpoint is not None and checkpoint.path.resolve().parent == out_dir.resolve():
        others = {step: path for step, path in others.items() if step > checkpoint.step}
    if others:
        raise UserError(
            f"{out_dir} already holds {others[max(others)].name}; add --checkpoint_path latest to "
            f"go on from it, take another --out_dir, or delete it"
        )


def check_configuration(config: Configuration, checkpoint: Checkpoint) -> None:
    """The checkpoint must be of this model and leave something to do; other changes are said."""
    if checkpoint.step >= config.num_steps and not lacks_evaluation(config, checkpoint):
        raise UserError(
            f"{checkpoint.path} is at step {checkpoint.step} and num_steps is {config.num_steps}: "
            f"nothing is left to train; raise --num_steps"
        )
    before = asdict(Configuration()) | checkpoint.config
    for key, now in asdict(config).items():
        then = before[key]
        if now in (then, "auto") or key in FREE or (key, now) == ("micro_batch_size", None):
            continue
        if key == "dataset" and Path(now).absolute() == Path(then).absolute():
            continue
        if key in MODEL_KEYS and key not in ("dropout", "init_std"):
            raise UserError(
                f"{checkpoint.path} is of another model: its {key} is {then}, this "
                f"configuration's {now}"
            )
        effect = "; the data go on in another order" if key in DATA_KEYS else ""
        if key == "num_steps" and config.decay_steps is None:
            effect = "; the learning rate decays towards the new end"
        say(f"note: {key} is {now}; it was {then} when {checkpoint.path} was saved{effect}")


def check_same_data(world: World, *tokens: Tokens) -> None:
    """Every system must have the same data."""
    counts = [each.count for each in tokens]
    first = world.gather(counts)[0]
    with world.together():
        for each, count in zip(tokens, first, strict=True):
            if each.count != count:
                raise UserError(
                    f"{each.path} has {each.count:,} tokens, on system 0 {count:,}; copy it"
                )


def model_config(checkpoint: Checkpoint) -> GPTConfig:
    """The shape of the model in a checkpoint, whose tensors have that shape."""
    keys, tensors = checkpoint.config, checkpoint.tensors
    try:
        config = GPTConfig(**{key: keys[key] for key in MODEL_KEYS if key in keys})
        numbers = sum(entry["bytes"] for entry in checkpoint.files.values()) // 4
        rows = max(4 * config.width, config.vocab_size, config.max_position_embeddings)
        if config.depth > len(tensors) or rows * config.width > numbers:
            raise ValueError("it holds no model of that size")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.path}: its configuration is not its model's: {error}"
        ) from None
    with torch.device("meta"):
        model = GPT(config)
    for name, parameter in model.named_parameters():
        found = tensors.get(name, {}).get("shape")
        if found != list(parameter.shape):
            raise UserError(
                f"{checkpoint.path}: {name} has shape {found}, its configuration's is "
                f"{list(parameter.shape)}: it is of another model"
            )
    return config


def with_model(config: Configuration, model: GPTConfig) -> Configuration:
    """The run of `config` for another model."""
    try:
        return replace(config, **{key: getattr(model, key) for key in MODEL_KEYS})
    except ValueError as error:
        raise UserError(str(error)) from None


def lacks_evaluation(config: Configuration, checkpoint: Checkpoint | None) -> bool:
    """Whether the run that saved it ended before an evaluation that was due at this step."""
    out_dir = Path(config.out_dir)
    if checkpoint is None or checkpoint.path.resolve().parent != out_dir.resolve():
        return False
    step, records = checkpoint.step, read_records(out_dir / "metrics.jsonl")
    due = step % config.eval_steps == 0 or step == config.num_steps
    return due and not any("val_loss" in r and r["step"] == step for r in records)


def check_tokenizer(checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Refuses data in another vocabulary, which would train to no purpose."""
    theirs = tokens.meta.get("tokenizer_sha256")
    if theirs and checkpoint.files.get(TOKENIZER, {}).get("sha256", theirs) != theirs:
        name = short(tokens.meta.get("tokenizer")).strip("'")
        raise UserError(
            f"{tokens.path} was made with another tokenizer ({name}) than {checkpoint.path}; take "
            f"the dataset that it was trained on"
        )
