"""Where a run starts: from nothing, from a checkpoint, or from Hugging Face weights."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from checkpoint import MODEL_CODE, TOKENIZER, Checkpoint, find_checkpoints, newest
from configuration import MODEL_KEYS, Configuration
from dataset import EvalBatches, Tokens, TrainBatches, find_folder
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
    def tokens(self) -> int:
        """Seen in the steps before it."""
        return self.checkpoint.tokens if self.checkpoint else 0

    @property
    def chosen(self) -> dict:
        """The configuration in which an earlier part of the run replaced every `auto`."""
        return self.checkpoint.config if self.checkpoint else {}

    def open_data(self, config: Configuration, world: World) -> tuple[TrainBatches, EvalBatches]:
        """The batches to train on and those to evaluate on, opened once for the whole run. They
        must be the same on every system, in the vocabulary of what the run starts from; if they are
        not those that the checkpoint was trained on, it is said."""
        data = (config.dataset, config.vocab_size, config.sequence_length, config.batch_size)
        with world.together():
            train = TrainBatches(*data, config.seed)
            val = EvalBatches(*data, config.eval_batches)
            if self.checkpoint is not None:
                check_tokenizer(self.checkpoint, train.tokens)
            elif config.init_from is not None:
                from export import check_vocabulary  # transformers takes seconds to import

                check_vocabulary(config.init_from, train.tokens)
        check_same_data(world, train.tokens, val.tokens)
        if self.checkpoint is not None and self.checkpoint.train_digest != train.tokens.digest:
            say(
                f"note: {train.tokens.path} is not what {self.checkpoint.path} was trained on: "
                f"from here on the data are others"
            )
        return train, val


def find_start(config: Configuration, world: World) -> Start:
    """What `checkpoint_path` and `init_from` name; UserError where it can't be gone on from."""
    checkpoint = find_checkpoint(config, world)
    check_out_dir(Path(config.out_dir), checkpoint)
    if checkpoint is not None:
        model = model_config(checkpoint)
        if config.init_from is not None:  # then the model is that one, not the configuration's
            config = with_model(config, model)
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
    if config.checkpoint_path is None:
        return None
    path = world.gather(newest(config.checkpoint_path, Path(config.out_dir)))[0]
    if path is None:
        return None
    checkpoint = Checkpoint(path)
    if world.size > 1:
        checkpoint.verify(world.rank, world.size)
    return checkpoint


def check_out_dir(out_dir: Path, checkpoint: Checkpoint | None) -> None:
    """A run that starts from `checkpoint` never mixes its checkpoints with those of another."""
    others = find_checkpoints(out_dir)
    if checkpoint is not None and stands_in(checkpoint, out_dir):
        others = {step: path for step, path in others.items() if step > checkpoint.step}
    if others:
        raise UserError(
            f"{out_dir} already holds {others[max(others)].name}; add --checkpoint_path latest to "
            f"go on from it, take another --out_dir, or delete it"
        )


def stands_in(checkpoint: Checkpoint, out_dir: Path) -> bool:
    """Whether it is one of a run's own, itself or as a link to where it was moved."""
    return checkpoint.path.absolute().parent.resolve() == out_dir.resolve()


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
        if key == "dataset" and find_folder(now).absolute() == find_folder(then).absolute():
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
    first = world.gather([each.digest for each in tokens])[0]
    with world.together():
        for each, digest in zip(tokens, first, strict=True):
            if each.digest != digest:
                raise UserError(f"{each.path} is not the one that system 0 has; copy it")


def model_config(checkpoint: Checkpoint) -> GPTConfig:
    """The shape of the model in a checkpoint, whose tensors have that shape; if the code of the
    model has changed since it was saved, it is said."""
    if checkpoint.model_code != MODEL_CODE:
        print(
            f"note: model.py or loss.py has changed since {checkpoint.path} was saved",
            file=sys.stderr,
        )
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
        for kind in ("", "exp_avg.", "exp_avg_sq."):
            found = tensors.get(kind + name, {}).get("shape")
            if found != list(parameter.shape):
                raise UserError(
                    f"{checkpoint.path}: {kind}{name} has shape {found}, its configuration's is "
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
    if checkpoint is None or not stands_in(checkpoint, out_dir):
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
