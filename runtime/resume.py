"""Where a run starts: at random weights, at a checkpoint, or at Hugging Face weights."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from configuration import MODEL_KEYS, Configuration
from dataset import EvalData, TrainData
from engines.base import Engine
from runtime.checkpoint import MANIFEST, TOKENIZER, Checkpoint, find_checkpoints, newest
from runtime.console import UserError, log, progress, short, warn
from runtime.distributed import Group
from runtime.metrics import read_records
from runtime.samples import Samples
from runtime.tokens import Tokens, find_folder

# Keys that may change without a word, and those that the order of the data depends on
FREE = {
    *("out_dir", "checkpoint_path", "init_from", "memory_limit", "host_memory"),
    *(
        "keep_checkpoints",
        "max_restarts",
        "step_timeout",
        "stream_to",
        "stream_dir",
        "stream_batch_size",
    ),
    *("activation_checkpointing", "activation_location", "shard_group_size"),
    *("sample_prompts", "tracker", "profile"),
    *("reshard_after_forward", "offload", "cluster"),
}
DATA_KEYS = {"dataset", "batch_size", "sequence_length", "seed"}


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
    def chosen(self) -> dict:
        """The configuration with which an earlier part of the run replaced every `auto`."""
        return asdict(self.checkpoint.config) if self.checkpoint else {}

    @property
    def lacks_evaluation(self) -> bool:
        """Whether the run ended before an evaluation that was due at this step."""
        out_dir, step = Path(self.config.out_dir), self.step
        if self.checkpoint is None or not _is_in(self.checkpoint, out_dir):
            return False
        due = step % self.config.eval_steps == 0 or step == self.config.num_steps
        records = read_records(out_dir / "metrics.jsonl")
        return due and not any("val_loss" in r and r["step"] == step for r in records)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.num_steps and not self.lacks_evaluation

    def open_data(self, config: Configuration, group: Group) -> tuple[TrainData, EvalData, Samples]:
        """Opens the data for the whole run, and encodes its sample prompts. The data must be the
        same for every process, with the tokenizer of what the run starts from; logs if they changed
        since the checkpoint."""
        folder = (config.dataset, config.vocab_size, config.sequence_length, config.batch_size)
        with group.shared_errors():
            train = TrainData(*folder, config.seed)
            val = EvalData(*folder, config.eval_batches)
            if self.checkpoint is not None:
                check_tokenizer(self.checkpoint, train.tokens)
            elif config.init_from is not None:
                from runtime.huggingface import check_vocabulary  # transformers is slow to import

                check_vocabulary(config.init_from, train.tokens)
            samples = Samples(config, train.tokens)
        check_same_data(group, train.tokens, val.tokens)
        if self.checkpoint is not None and self.checkpoint.train_digest != train.tokens.digest:
            warn(
                f"{train.tokens.path} changed since {self.checkpoint.path}; data order will differ"
            )
        return train, val, samples

    def restore(self, engine: Engine) -> None:
        """Gives the engine its weights, and the rest of its state."""
        if self.read is None:
            engine.initialize(partial(progress, what="initializing", unit="layer"))
        else:
            steps = self.checkpoint.optimizer_steps if self.checkpoint else None
            engine.load(self.read, steps, partial(progress, what="loading", unit="layer"))
        if self.checkpoint is not None:
            engine.recent.extend(self.checkpoint.recent)
            engine.tokens = self.checkpoint.tokens
        log(self.origin)


def find_start(config: Configuration, group: Group) -> Start:
    """What `checkpoint_path` and `init_from` name, or in a restarted process what the run saved
    before. Raises UserError where it can't be resumed."""
    checkpoint = find_checkpoint(_restarted(config, group), group)
    _check_out_dir(Path(config.out_dir), checkpoint)
    if checkpoint is not None:
        model = checkpoint.check_model()
        if config.init_from is not None:  # then the model is that one, not the configuration's
            config = config.with_model(model)
        start = Start(config, "", checkpoint.read, checkpoint)
        start.origin = f"resumed from {checkpoint.path} at step {checkpoint.step}"
        if start.finished and group.restarted is None:
            raise UserError(
                f"{checkpoint.path} is at step {checkpoint.step} and num_steps is "
                f"{config.num_steps}: nothing is left to train; raise --num_steps"
            )
        check_configuration(config, checkpoint)
        return start
    if config.init_from is not None:
        from runtime.huggingface import read_hugging_face  # transformers is slow to import

        config, read = read_hugging_face(config)
        return Start(config, f"starting from the weights of {config.init_from}", read)
    return Start(config)


def _restarted(config: Configuration, group: Group) -> Configuration:
    """A restarted process resumes from what this run has saved, if anything."""
    latest = newest("latest", Path(config.out_dir)) if group.restarted is not None else None
    ours = latest is not None and (latest / MANIFEST).stat().st_mtime >= group.restarted
    return replace(config, checkpoint_path="latest") if group.gather(ours)[0] else config


def find_checkpoint(config: Configuration, group: Group) -> Checkpoint | None:
    """The checkpoint that `checkpoint_path` names, or None. Rank 0 says which is the latest, and
    each process verifies its share of the files."""
    if config.checkpoint_path is None:
        return None
    path = group.gather(newest(config.checkpoint_path, Path(config.out_dir)))[0]
    if path is None:
        return None
    checkpoint = Checkpoint(path)
    if group.size > 1:
        checkpoint.verify(group.rank, group.size)
    return checkpoint


def _check_out_dir(out_dir: Path, checkpoint: Checkpoint | None) -> None:
    """A run never mixes its checkpoints with those of another."""
    others = find_checkpoints(out_dir)
    if checkpoint is not None and _is_in(checkpoint, out_dir):
        others = {step: path for step, path in others.items() if step > checkpoint.step}
    if others:
        raise UserError(
            f"{out_dir} already has {others[max(others)].name}; add --checkpoint_path latest to "
            f"resume from it, use another --out_dir, or delete it"
        )


def _is_in(checkpoint: Checkpoint, out_dir: Path) -> bool:
    """Whether it is in the folder, itself or as a link to where it was moved."""
    return checkpoint.path.absolute().parent.resolve() == out_dir.resolve()


def check_configuration(config: Configuration, checkpoint: Checkpoint) -> None:
    """The checkpoint must be of this model; other changes are logged."""
    for key, before in asdict(checkpoint.config).items():
        now = getattr(config, key)
        if now in (before, "auto") or key in FREE or (key, now) == ("micro_batch_size", None):
            continue
        if key == "dataset" and find_folder(now).absolute() == find_folder(before).absolute():
            continue
        if key in MODEL_KEYS and key not in ("dropout", "init_std"):
            raise UserError(
                f"{checkpoint.path} is of another model: its {key} is {before}, this "
                f"configuration's {now}"
            )
        effect = "; data order will differ" if key in DATA_KEYS else ""
        if key == "num_steps" and (config.decay_steps is None or config.schedule == "wsd"):
            effect = "; the learning rate decays towards the new end"
        warn(f"{key} is {now}; it was {before} in {checkpoint.path}{effect}")


def check_same_data(group: Group, *tokens: Tokens) -> None:
    """Every process must have the same data."""
    first = group.gather([each.digest for each in tokens])[0]
    with group.shared_errors():
        for each, digest in zip(tokens, first, strict=True):
            if each.digest != digest:
                raise UserError(f"{each.path} differs from that of rank 0; copy it")


def check_tokenizer(checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Refuses data with another tokenizer, whose ids stand for other text."""
    theirs = tokens.meta.get("tokenizer_sha256")
    if theirs and checkpoint.files.get(TOKENIZER, {}).get("sha256", theirs) != theirs:
        name = short(tokens.meta.get("tokenizer")).strip("'")
        raise UserError(
            f"{tokens.path} was made with another tokenizer ({name}) than {checkpoint.path}; use "
            f"the dataset that it was trained on"
        )
