"""What a run is: one flat set of keys, from configs/*.yaml, overridden on the command line."""

from dataclasses import fields, replace
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from cluster import Cluster
from model import GPTConfig
from runtime.console import UserError


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("should be printable text")
    return text


STRICT = ConfigDict(strict=True, allow_inf_nan=False)
strict = dataclass(config=STRICT)
Text = Annotated[str, AfterValidator(_printable)]
Auto = Literal["auto"]
Count = Annotated[int, Field(gt=0, lt=2**63)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]


@strict
class Data:
    """Data and batches

    Args:
        out_dir: folder for the checkpoints, metrics, loss curve and configuration of the run
        dataset: folder with train.bin, val.bin and meta.json (see data/)
        batch_size: sequences in an optimizer step, whatever the number of systems
        micro_batch_size: sequences in one forward pass; null: as many as fit in memory
        sequence_length: tokens in a sequence
        seed: of the weights, the order of the data and dropout
    """

    out_dir: Text = "model_dir"
    dataset: Text = "data/openwebtext"
    batch_size: Count = 120
    micro_batch_size: Count | None = None
    sequence_length: Count = 2048
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@strict
class Optimizer:
    """Optimizer

    Args:
        num_steps: optimizer steps of the whole run
        learning_rate: the peak, after warm-up
        warmup_steps: steps of linear warm-up
        schedule: after warm-up, cosine: a cosine to a tenth of the peak; wsd: the peak, and a line
            to a tenth of it at the end of num_steps, which a resumed run may raise before that
        decay_steps: steps from the peak to a tenth of it; null: of cosine all after warm-up, of
            wsd a tenth of num_steps
        weight_decay: of AdamW, on matrices and embeddings only
        adam_epsilon: of AdamW
        max_gradient_norm: global norm to which gradients are clipped
        skip_loss_spikes: skip the update of a step whose loss or gradient norm is 6 standard
            deviations above the mean of the 128 steps before it
    """

    num_steps: Count = 10000
    learning_rate: Positive = 6e-4
    warmup_steps: CountOrZero = 1500
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_steps: Count | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    adam_epsilon: Positive = 1e-8
    max_gradient_norm: Positive = 1.0
    skip_loss_spikes: bool = False


@strict
class Saving:
    """Checkpoints, evaluation and records

    Args:
        checkpoint_steps: steps between checkpoints
        keep_checkpoints: how many of the newest checkpoints to keep; null: all
        checkpoint_path: a checkpoint to start from, or latest: the newest in out_dir, if any
        init_from: folder or hub name of a Hugging Face GPT-2 or Llama to start from
        eval_steps: steps between evaluations
        eval_batches: batches of an evaluation; null: all of val.bin
        sample_prompts: texts, such as ["The ship", "A king"], that the model continues after each
            evaluation
        tracker: where the records go beside metrics.jsonl; null: nowhere
        profile: START:STOP, the first and last of the steps whose torch.profiler trace is written
            into out_dir
    """

    checkpoint_steps: Count = 1000
    keep_checkpoints: Count | None = None
    checkpoint_path: Text | None = None
    init_from: Text | None = None
    eval_steps: Count = 1000
    eval_batches: Count | None = None
    sample_prompts: list[Text] | None = None
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = "tensorboard"
    profile: Text | None = None


@strict
class Memory:
    """Device, memory and speed

    Args:
        backend: where to run; auto: a GPU if there is one
        engine: how to run; auto: the first of resident and streaming that fits, or sharded
        precision: of matrix multiplications; weights and optimizer are always fp32; tf32: GPUs
        compile: the blocks with torch.compile; auto: on a GPU with a C++ compiler
        memory_limit: of the device, such as 20GB; null: what it has
        host_memory: of the machine, such as 2TB; null: nine tenths of what it or its container has
        activation_checkpointing: recompute a block in the backward pass instead of keeping what
            it computed
        stream_to: where the streaming engine keeps weights and optimizer
        stream_dir: folder for its files, on a fast disk; null: out_dir
        stream_batch_size: sequences that go through each layer while its weights are on the
            device; null: as many as fit in memory
        activation_location: where the streaming engine keeps the inputs of recomputed blocks
    """

    backend: Literal["auto", "CPU", "GPU", "CSX"] = "auto"
    engine: Literal["auto", "resident", "streaming", "sharded", "cerebras"] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    compile: bool | Auto = "auto"
    memory_limit: Text | None = None
    host_memory: Text | None = None
    activation_checkpointing: bool | Auto = "auto"
    stream_to: Literal["auto", "ram", "disk"] = "auto"
    stream_dir: Text | None = None
    stream_batch_size: Count | None = None
    activation_location: Literal["auto", "device", "host"] = "auto"


@strict
class Distributed:
    """Several GPUs or systems

    Args:
        num_systems: number of GPUs, CPU processes or Cerebras systems to train on
        max_restarts: how often to resume from the newest checkpoint when a process is lost
        step_timeout: seconds in a step after which a silent process is lost; null: 120, or three
            steps
        shard_group_size: processes that share one copy of the weights; null: all, or as few as fit
        reshard_after_forward: free a block's gathered weights after each use; false: once a step
        offload: keep the shards in host memory
    """

    num_systems: Count = 1
    max_restarts: CountOrZero = 0
    step_timeout: Count | None = None
    shard_group_size: Count | None = None
    reshard_after_forward: bool | Auto = "auto"
    offload: bool | Auto = "auto"


@strict
class Configuration(Distributed, Memory, Saving, Optimizer, Data, GPTConfig):
    """A run: the keys of the model and of the sections above. Raises ValueError."""

    cluster: Cluster = Field(default_factory=Cluster)

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < self.num_systems:
            raise ValueError(
                f"batch_size: {self.batch_size} is smaller than num_systems {self.num_systems}; "
                f"each needs at least one sequence"
            )
        if self.sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"sequence_length: {self.sequence_length} is above max_position_embeddings "
                f"{self.max_position_embeddings}; lower the one or raise the other"
            )

    def with_model(self, model: GPTConfig) -> "Configuration":
        """This run, with another model. Raises UserError."""
        try:
            return replace(self, **{key: getattr(model, key) for key in MODEL_KEYS})
        except ValidationError as error:
            raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


SECTIONS = (GPTConfig, Data, Optimizer, Saving, Memory, Distributed, Cluster)
MODEL_KEYS = tuple(field.name for field in fields(GPTConfig))
TYPES = {field.name: field.type for field in fields(Configuration) if field.name != "cluster"}
TYPES |= {f"cluster.{field.name}": field.type for field in fields(Cluster)}
