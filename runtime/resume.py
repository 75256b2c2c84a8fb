"""Where a run starts: at random weights, at a checkpoint, or at Hugging Face weights."""

import io
import math
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from common.console import UserError, log, short, track, warn
from common.tokens import Tokens
from configuration import MODEL_KEYS, Configuration, Data, Optimizer, make_configuration
from dataset import EvalData, TrainData, open_val
from engines.base import Engine
from ops import find_gpu
from planner.resolve import resolve
from runtime.distributed import Group
from runtime.metrics import read_records
from runtime.samples import Samples
from weights.checkpoint import TOKENIZER, Checkpoint, find_checkpoints, newest
from weights.huggingface import check_vocabulary, read_hugging_face

TRAINING_KEYS = {"dropout", "init_std"}  # of the model's, but without effect on what it computes
MAX_SKIPPED = 10  # steps in a row that were not finite before training stops


@dataclass
class Start:
    """What a run starts from: `read(name, rows)` gives its tensors; None: random weights."""

    config: Configuration
    origin: str = "starting from random weights"
    read: Callable | None = None
    checkpoint: Checkpoint | None = None

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def resolved_before(self) -> dict:
        """The configuration with which an earlier part of the run replaced every `auto`."""
        return asdict(self.checkpoint.config) if self.checkpoint else {}

    @property
    def missing(self) -> list[str]:
        """The records of an evaluation before the first step, if eval_on_start, or of one that was
        due when the run ended and was not written: val_loss, and samples if there are prompts."""
        config = self.config
        out_dir = Path(config.out_dir)
        due = self.step % config.eval_steps == 0 or self.step == config.num_steps
        if self.checkpoint is None:
            due = config.eval_on_start
        if not due or (self.checkpoint and not _is_in(self.checkpoint, out_dir)):
            return []
        keys = ["val_loss", "samples"] if config.sample_prompts else ["val_loss"]
        records = read_records(out_dir / "metrics.jsonl")
        found = {key for record in records if record["step"] == self.step for key in record}
        return [key for key in keys if key not in found]

    @property
    def finished(self) -> bool:
        return self.step >= self.config.num_steps and not self.missing

    def open_data(
        self, config: Configuration, group: Group
    ) -> tuple[TrainData, list[EvalData], Samples]:
        """Opens the data for the whole run, and encodes its sample prompts. The data must be the
        same for every process, with the tokenizer of what the run starts from; logs if they changed
        since the checkpoint."""
        train = TrainData(config)
        val = open_val(config)
        self.check_tokenizer(train.tokens)
        if self.checkpoint is not None and self.checkpoint.train_digest != train.digest:
            changed = f"{train.tokens.path} is not what {self.checkpoint.path} was trained on"
            warn(f"{changed}; data order will differ")
        check_same_data(group, [data.tokens for data in (*train.sources, *val)])
        return train, val, Samples(config, train.tokens)

    def check_tokenizer(self, tokens: Tokens) -> None:
        """Refuses data whose ids stand for other text than in the weights."""
        if self.checkpoint is not None:
            check_tokenizer(self.checkpoint, tokens)
        elif self.config.init_from is not None:
            check_vocabulary(self.config.init_from, tokens)

    def restore(self, engine: Engine) -> None:
        """Gives the engine its weights, and the rest of its state."""
        checkpoint = self.checkpoint
        if self.read is None:
            engine.initialize(partial(track, what="initializing", unit="layer"))
        else:
            steps = checkpoint.optimizer_steps if checkpoint else None
            engine.load(self.read, steps, partial(track, what="loading", unit="layer"))
        if checkpoint is not None:
            engine.tokens = checkpoint.tokens
            engine.recent.extend(checkpoint.recent)
        log(self.origin)


def find_start(config: Configuration, group: Group) -> Start:
    """Returns what `checkpoint_path` or `init_from` names. Raises UserError where the run can't be
    resumed from it."""
    checkpoint = find_checkpoint(config, group)
    _check_out_dir(Path(config.out_dir), checkpoint)
    start = open_weights(config, checkpoint)
    if checkpoint is not None:
        if start.finished and not group.restarted:
            done = f"{checkpoint.path} is at step {start.step} and num_steps is {config.num_steps}"
            raise UserError(f"{done}: nothing is left to train; raise --num_steps")
        warn_of_changes(start.config, checkpoint)
    return start


def open_weights(config: Configuration, checkpoint: Checkpoint | None) -> Start:
    """Returns a start at a checkpoint, or without one at the weights of init_from, or at random
    ones; with the model that these have."""
    if checkpoint is not None:
        origin = f"resumed from {checkpoint.path} at step {checkpoint.step}"
        return Start(with_model_of(checkpoint, config), origin, checkpoint.read, checkpoint)
    if config.init_from is not None:
        config, read = read_hugging_face(config)
        return Start(config, f"starting from the weights of {config.init_from}", read)
    return Start(config)


def check_start(config: Configuration) -> None:
    """Raises UserError where no process could start, for want of data, checkpoint or memory."""
    with redirect_stderr(io.StringIO()):  # rank 0 prints the warnings
        start = find_start(config, Group())
        on_gpu = config.backend == "GPU" or (config.backend == "auto" and find_gpu()[0])
        if not on_gpu:  # of which this process would keep some memory
            resolve(start.config, start.resolved_before, True, config.num_systems)
        start.open_data(start.config, Group())


def find_checkpoint(config: Configuration, group: Group) -> Checkpoint | None:
    """Returns the checkpoint that `checkpoint_path` names, or None. Rank 0 says which is the
    latest, and each process verifies its share of the files."""
    name = config.checkpoint_path
    path = group.gather(name and newest(name, Path(config.out_dir)))[0]
    if path is None:
        return None
    checkpoint = Checkpoint(path)
    if group.size > 1:
        checkpoint.verify(group.rank, group.size)
    return checkpoint


def _check_out_dir(out_dir: Path, checkpoint: Checkpoint | None) -> None:
    """Raises UserError where a run would mix its checkpoints with those of another."""
    others = find_checkpoints(out_dir)
    if checkpoint is not None and _is_in(checkpoint, out_dir):
        others = {step: path for step, path in others.items() if step > checkpoint.step}
    if others:
        resume = "add --checkpoint_path latest to resume from it"
        wrong = f"{out_dir} already has {others[max(others)].name}"
        raise UserError(f"{wrong}; {resume}, use another --out_dir, or move it away")


def _is_in(checkpoint: Checkpoint, out_dir: Path) -> bool:
    """Returns whether it is in the folder, itself or as a link to where it was moved."""
    return checkpoint.path.absolute().parent.resolve() == out_dir.resolve()


def with_model_of(checkpoint: Checkpoint, config: Configuration) -> Configuration:
    """Returns the configuration with the checkpoint's model: with `init_from` it has no other.
    Raises UserError where its own keys of the model differ."""
    model = checkpoint.check_model()
    if config.init_from is not None:
        return make_configuration(asdict(config) | asdict(model))
    for key in MODEL_KEYS:
        before = getattr(model, key)
        now = getattr(config, key)
        if now != before and key not in TRAINING_KEYS:
            differing = f"its {key} is {before}, this configuration's {now}"
            raise UserError(f"{checkpoint.path} is of another model: {differing}")
    return config


def warn_of_changes(config: Configuration, checkpoint: Checkpoint) -> None:
    """Logs which keys of the data and the optimizer have changed since the checkpoint. The content
    of the data has a digest, whatever folder it is in."""
    for section, effect in ((Data, "; data order will differ"), (Optimizer, "")):
        for key in (field.name for field in fields(section) if field.name != "dataset"):
            now = getattr(config, key)
            before = getattr(checkpoint.config, key)
            if now != before:
                warn(f"{key} is {now}; it was {before} in {checkpoint.path}{effect}")


def check_same_data(group: Group, tokens: list[Tokens]) -> None:
    """Raises UserError where a process has other data than rank 0."""
    first = group.gather([each.digest for each in tokens])[0]
    for each, digest in zip(tokens, first, strict=True):
        if each.digest != digest:
            raise UserError(f"{each.path} differs from that of rank 0; copy it")


def check_tokenizer(checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Raises UserError for data with another tokenizer, whose ids stand for other text."""
    theirs = tokens.meta.get("tokenizer_sha256")
    if theirs and checkpoint.files.get(TOKENIZER, {}).get("sha256", theirs) != theirs:
        name = short(tokens.meta.get("tokenizer")).strip("'")
        wrong = f"{tokens.path} was made with another tokenizer ({name}) than {checkpoint.path}"
        raise UserError(f"{wrong}; use the dataset that it was trained on")


def diverged(step: int, config: Configuration) -> str:
    """Returns the message, which names the newest checkpoint whose weights are known to be good:
    the loss of the step after it is below that of guessing. Those of a later one may be ruined."""
    out_dir = Path(config.out_dir)
    records = read_records(out_dir / "metrics.jsonl")
    losses = {r["step"]: r["loss"] for r in records if r.get("loss") is not None}
    guessing = math.log(config.vocab_size)
    found = find_checkpoints(out_dir)
    good = [found[saved] for saved in found if losses.get(saved + 1, math.inf) < guessing]
    origin = f"resume from {good[-1]}" if good else "start again"
    return (
        f"stopped at step {step}: {MAX_SKIPPED} steps in a row had a loss or gradient that is not "
        f"finite; {origin} in another --out_dir, with a lower learning_rate or another seed"
    )
