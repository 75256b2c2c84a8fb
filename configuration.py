"""What a run is: one flat set of keys, from configs/*.yaml, overridden on the command line.

A key's section says what a resumed run may do with it: the model (GPTConfig) stays what it was,
changes of Data and Optimizer print a warning, and all else is free.
"""

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from common.console import UserError, short
from model import GPTConfig


def _printable(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("should be printable text")
    return text


def _backend(name: object) -> object:
    """Returns a backend in the spelling of its key; PyTorch's names of devices are known too."""
    names = {"cpu": "CPU", "gpu": "GPU", "cuda": "GPU", "csx": "CSX"}
    return names.get(str(name).lower(), name)


section = dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False))
Text = Annotated[str, AfterValidator(_printable)]
Auto = Literal["auto"]
Backend = Annotated[Literal["auto", "CPU", "GPU", "CSX"], BeforeValidator(_backend)]
Count = Annotated[int, Field(gt=0, lt=2**63)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(ge=2.0**-126, lt=2.0**127)]  # what fp32 can hold


@section
class Data:
    """Data and batches

    Args:
        dataset: folder that data/prepare.py made, or several with weights, such as
            {data/web: 0.7, data/code: 0.3}
        batch_size: sequences in an optimizer step, whatever the number of systems
        sequence_length: tokens in a sequence
        seed: of the weights, the order of the data and dropout
    """

    dataset: Text | Annotated[dict[Text, Positive], Field(min_length=1)] = "data/openwebtext"
    batch_size: Annotated[int, Field(gt=0, le=2**20)] = 120
    sequence_length: Count = 2048
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@section
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


@section
class Weights:
    """Weights and evaluation

    Args:
        out_dir: folder for the checkpoints, metrics, loss curve and configuration of the run
        checkpoint_path: a checkpoint to start from, or latest: the newest in out_dir, if any
        init_from: folder or hub name of a released model to start from: GPT-2, Llama, Mistral,
            Qwen2 or Qwen3
        eval_batches: batches of an evaluation; null: all of val.bin
    """

    out_dir: Text = "model_dir"
    checkpoint_path: Text | None = None
    init_from: Text | None = None
    eval_batches: Count | None = None


@section
class Records:
    """Checkpoints and records of a training

    Args:
        checkpoint_steps: steps between checkpoints
        keep_checkpoints: how many of the newest checkpoints to keep; null: all
        eval_steps: steps between evaluations
        eval_on_start: evaluate before the first step too
        sample_prompts: texts, such as ["The ship", "A king"], that the model continues after each
            evaluation
        log_steps: steps between lines of the log; a terminal shows a bar instead
        tracker: where the records go as well as to metrics.jsonl; null: nowhere
        profile: START:STOP, the first and last of the steps whose torch.profiler trace is written
            into out_dir
    """

    checkpoint_steps: Count = 1000
    keep_checkpoints: Count | None = None
    eval_steps: Count = 1000
    eval_on_start: bool = False
    sample_prompts: list[Text] | None = None
    log_steps: Count = 10
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = "tensorboard"
    profile: Text | None = None


@section
class Memory:
    """Device, memory and speed

    Args:
        backend: where to run; auto: a GPU if there is one
        engine: how to run; auto: the first of resident and streaming that fits, or sharded
        precision: of matrix multiplications; weights and optimizer are always fp32; tf32: GPUs
        compile: the blocks with torch.compile; auto: on a GPU with a C++ compiler
        memory_limit: of the device, such as 20GB; a plan uses 95% of it; null: what it has
        micro_batch_size: sequences in one forward pass; null: as many as fit in memory
        host_memory: of the machine, such as 2TB; null: nine tenths of what it or its container has
        activation_checkpointing: recompute a block in the backward pass instead of keeping what
            it computed
        stream_to: where the streaming engine keeps weights and optimizer
        stream_dir: folder for its files, on a fast disk; null: out_dir
        stream_batch_size: sequences that go through each layer while its weights are on the
            device; null: as many as fit in memory
        activation_location: where the streaming engine keeps the inputs of recomputed blocks
    """

    backend: Backend = "auto"
    engine: Literal["auto", "resident", "streaming", "sharded", "cerebras"] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    compile: bool | Auto = "auto"
    memory_limit: Text | None = None
    micro_batch_size: Count | None = None
    host_memory: Text | None = None
    activation_checkpointing: bool | Auto = "auto"
    stream_to: Literal["auto", "ram", "disk"] = "auto"
    stream_dir: Text | None = None
    stream_batch_size: Count | None = None
    activation_location: Literal["auto", "device", "host"] = "auto"


@section
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
    step_timeout: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    shard_group_size: Count | None = None
    reshard_after_forward: bool | Auto = "auto"
    offload: bool | Auto = "auto"


@section
class Cluster:
    """Cerebras systems

    Where and how a cluster runs a job: fields of `cerebras.pytorch`'s ClusterConfig, backend and
    flags, by their names there. null is the package's default, or the cluster's. The number of
    systems is num_systems.

    Args:
        mgmt_address: host:port of the cluster's management; null: as the user node is set up
        mgmt_namespace: which of the cluster's sessions to use
        credentials_path: certificate of the management
        mount_dirs: folders that input workers see, with code and data; null: all the cluster has
        python_paths: folders that input workers import from, beside this program's
        num_workers_per_csx: input workers for each system
        max_wgt_servers: most servers that hold weights
        max_act_per_csx: most servers for activations of each system
        job_labels: key=value labels
        job_priority: p1, p2 or p3
        job_time_sec: limit for a job
        disable_version_check: do not compare the versions of package and cluster
        compile_dir: folder in which the cluster keeps what it compiled
        compile_crd_memory_gi: GiB for the job that compiles
        execute_crd_memory_gi: GiB for the job that runs
        validate_only: trace and lower a step on this machine, ask no cluster, and end
        compile_only: compile a step on the cluster, and end
    """

    mgmt_address: Text | None = None
    mgmt_namespace: Text | None = None
    credentials_path: Text | None = None
    mount_dirs: list[Text] | None = None
    python_paths: list[Text] | None = None
    num_workers_per_csx: Count | None = None
    max_wgt_servers: Count | None = None
    max_act_per_csx: Count | None = None
    job_labels: list[Text] | None = None
    job_priority: Text | None = None
    job_time_sec: Count | None = None
    disable_version_check: bool | None = None
    compile_dir: Text | None = None
    compile_crd_memory_gi: Count | None = None
    execute_crd_memory_gi: Count | None = None
    validate_only: bool = False
    compile_only: bool = False

    def __post_init__(self):
        if self.validate_only and self.compile_only:
            raise ValueError("cluster.validate_only and cluster.compile_only: use one of them")


@section
class Configuration(Distributed, Memory, Records, Weights, Optimizer, Data, GPTConfig):
    """A run: the keys of the model and of the sections above. Raises ValueError."""

    cluster: Cluster = Field(default_factory=Cluster)

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < self.num_systems:
            few = f"batch_size: {self.batch_size} is smaller than num_systems {self.num_systems}"
            raise ValueError(f"{few}; each needs at least one sequence")
        most = self.max_position_embeddings
        if self.sequence_length > most:
            long = (
                f"sequence_length: {self.sequence_length} is above max_position_embeddings {most}"
            )
            raise ValueError(f"{long}; lower the one or raise the other")


SECTIONS = (GPTConfig, Data, Optimizer, Weights, Records, Memory, Distributed, Cluster)
MODEL_KEYS = tuple(field.name for field in fields(GPTConfig))
KEYS = [field.name for field in fields(Configuration) if field.name != "cluster"]
KEYS += [f"cluster.{field.name}" for field in fields(Cluster)]


def make_configuration(values: dict) -> Configuration:
    """Returns the configuration with these keys. Raises UserError, which names the first key that
    is not valid."""
    try:
        return Configuration(**values)
    except ValidationError as error:
        wrong = error.errors()
    first = wrong[0]
    depth = 2 if first["loc"][:1] == ("cluster",) else 1
    key = first["loc"][:depth]
    messages = [each["msg"] for each in wrong if each["loc"][:depth] == key]
    reasons = [m.removeprefix("Value error, ").removeprefix("Input ") for m in messages]
    reason = " or ".join(dict.fromkeys(reasons))
    if not key or key == ("cluster",):  # from __post_init__, which names the key
        raise UserError(reason)
    raise UserError(f"{'.'.join(map(str, key))}: {short(first['input'])} {reason}")
