"""The sides of bench/compare.py: each builds a training step of the same shape on the same tokens.

Ours run as `python train.py` runs them. Peers are trained as their own documentation says: fp32
weights, autocast, AdamW (fused), clipping to 1, and micro-batches of the same size. Everything that
only one side needs is imported in its function, so that each runs in an environment of its own.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import Batch, TrainData

LLAMA = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False}
Step = Callable[[], float]  # trains one step and returns the mean loss


@dataclass
class Task:
    """What every side trains. data: a dataset's folder; scratch: a folder of its own."""

    width: int
    depth: int
    heads: int
    vocab_size: int
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    data: str
    scratch: str
    settings: dict = field(default_factory=dict)  # keys of ours for memory
    nanogpt: str | None = None
    gigagpt: str | None = None
    llama: bool = False

    @property
    def shape(self) -> dict:
        """The keys of the model in ours: GPT-2, or a Llama with as many parameters in a block."""
        keys = {key: getattr(self, key) for key in ("width", "depth", "heads", "vocab_size")}
        keys |= {"max_position_embeddings": self.sequence_length}
        return keys | (LLAMA | {"mlp_width": 8 * self.width // 3} if self.llama else {})

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def precision(self) -> str:
        """What is multiplied where a side chooses what is fast."""
        from ops import has_units

        fast = self.device == "cuda" or has_units("amx_bf16", "avx512_bf16")
        return "bf16" if fast else "fp32"

    def batches(self) -> "TimedBatches":
        from configuration import Configuration

        config = Configuration(
            **self.shape,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            dataset=self.data,
        )
        return TimedBatches(config)


class TimedBatches(TrainData):
    """Knows the seconds that its batches took."""

    seconds = 0.0

    def get(self, step: int, rank: int = 0, size: int = 1) -> Batch:
        begin = time.perf_counter()
        batch = super().get(step, rank, size)
        TimedBatches.seconds += time.perf_counter() - begin
        return batch


def end_with_parent() -> None:
    """Has Linux kill this process when its parent ends, which itself may be killed at a limit."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def roof(task: Task) -> Step:
    """A step is a large matrix product, whose FLOP/s are measured."""
    from planner.machine import measure_products

    def step() -> float:
        step.flops = measure_products("GPU" if task.device == "cuda" else "CPU", task.precision)
        return 0.0

    return step


def ours(task: Task, engine: str, **keys: object) -> Step:
    from configuration import Configuration
    from planner.costs import step_flops
    from planner.report import describe
    from planner.resolve import resolve

    config = Configuration(
        **task.shape,
        sequence_length=task.sequence_length,
        batch_size=task.batch_size,
        micro_batch_size=task.micro_batch_size,
        engine=engine,
        out_dir=task.scratch,
        **task.settings | keys,
    )
    planned = resolve(config, {})
    print(describe(planned), file=sys.stderr)
    steps = running(planned, task.batches())

    def step() -> float:
        return next(steps).loss

    step.flops = step_flops(planned.config)
    step.planned = {"seconds": planned.seconds, "bytes": planned.bytes}
    return step


def running(planned: "Plan", data: object) -> Iterator["StepStats"]:  # noqa: F821
    """The steps of our engine as it was planned."""
    from engines import open_engine

    engine = open_engine(planned.config, blocks_on_device=planned.blocks_on_device)
    engine.initialize()
    return engine.run(data, 0, 10**9, lambda fraction: None)


class RandomBatches:
    """The same random token ids in every step."""

    def __init__(self, config: "Configuration"):  # noqa: F821
        shape = (config.batch_size, config.sequence_length + 1)
        ids = np.random.RandomState(0).randint(0, config.vocab_size, shape)
        self.arrays = (ids[:, :-1], ids[:, 1:])

    def get(self, step: int, rank: int = 0, size: int = 1) -> Batch:
        return Batch(*(np.array_split(a, size)[rank] for a in self.arrays), [])


def held_block(task: Task) -> Step:
    """What streaming's step computes in its blocks, without the streaming: one block, compiled as
    there, stays on the device and is all of them, forward and, recomputed, backward."""
    from configuration import Configuration
    from engines.base import prepare_compute
    from model import GPT
    from planner.costs import block_flops
    from planner.resolve import resolve_device

    keys = task.shape | {"engine": "streaming"}
    keys |= {"sequence_length": task.sequence_length, "batch_size": task.batch_size}
    config = resolve_device(Configuration(**keys, activation_checkpointing=True), {})
    with torch.device("meta"):
        model = GPT(config)
    block = model.decoder[0].to_empty(device=task.device)
    prepare_compute(config, model)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.0, 0.02)
    if config.precision == "bf16":
        block.bfloat16()
    for parameter in block.parameters():
        parameter.grad_dtype = torch.float32
    shape = (task.micro_batch_size, task.sequence_length, task.width)
    count = task.depth * task.batch_size // task.micro_batch_size
    x = torch.randn(shape, device=task.device, dtype=next(block.parameters()).dtype)

    def step() -> float:
        for _ in range(count):
            y = block(x.detach().requires_grad_())
            y.backward(x)
        return y[0, 0, 0].item()

    step.flops = (
        block_flops(config) * count * task.micro_batch_size / (task.depth * task.batch_size)
    )
    return step


def trained(
    task: Task,
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    autocast: bool = True,
    before: Callable[[bool], None] = lambda last: None,
) -> Step:
    """The training step of a model of plain PyTorch; loss_of(ids, targets) -> the mean loss.
    `before` is called before each micro-batch, and told whether it is the last."""
    adamw = partial(torch.optim.AdamW, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    optimizer = optimizer or adamw(model.parameters())

    def step() -> float:
        total = torch.zeros((), device=task.device)
        parts = list(micro_batches(task, next(batches)))
        for i, (ids, targets, part) in enumerate(parts):
            before(i + 1 == len(parts))
            with torch.autocast(task.device, torch.bfloat16) if autocast else nullcontext():
                loss = loss_of(ids, targets) * part
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    batches = in_order(task)
    return step


def in_order(task: Task) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    batches, step = task.batches(), 0
    while True:
        batch = batches.get(step)
        yield tuple(a.astype(np.int64) for a in (batch.ids, batch.targets))
        step += 1


def micro_batches(task: Task, batch: tuple) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(ids, targets, their part of the batch), on the device."""
    pieces = (torch.from_numpy(a).split(task.micro_batch_size) for a in batch)
    for ids, targets in zip(*pieces, strict=True):
        yield ids.to(task.device), targets.to(task.device), len(ids) / task.batch_size


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def hugging_face(task: Task) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from model import GPTConfig
    from weights.families import family_of

    config = GPTConfig(**task.shape)
    with torch.device(task.device):  # where its weights are drawn, much faster than on a CPU
        model = AutoModelForCausalLM.from_config(family_of(config).theirs(config))
    return model.train()


def transformers(task: Task, compiled: bool = False) -> Step:
    model = hugging_face(task)

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(ids, use_cache=False).logits, targets)

    return trained(task, model, torch.compile(loss_of) if compiled else loss_of)


def litgpt(task: Task) -> Step:
    """Its GPT-NeoX: the nearest to GPT-2 that it has, with rotary positions and a head of its own.
    Compiled, bf16-mixed and with its own loss, as `litgpt pretrain`."""
    import litgpt
    from litgpt.utils import chunked_cross_entropy

    config = litgpt.Config(
        block_size=task.sequence_length,
        n_layer=task.depth,
        n_embd=task.width,
        n_head=task.heads,
        vocab_size=task.vocab_size,
        padded_vocab_size=task.vocab_size,
        parallel_residual=False,
    )
    with torch.device(task.device):
        model = litgpt.GPT(config)
    run = torch.compile(model)
    return trained(task, model, lambda ids, y: chunked_cross_entropy(run(ids), y, chunk_size=0))


def model_of(checkout: str) -> ModuleType:
    """The model.py of another program, beside ours."""
    sys.path.append(checkout)
    spec = spec_from_file_location("their_model", f"{checkout}/model.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def nanogpt(task: Task, autocast: bool = True, compiled: bool = False) -> Step:
    """Its model and optimizer."""
    theirs = model_of(task.nanogpt)
    config = theirs.GPTConfig(
        block_size=task.sequence_length,
        vocab_size=task.vocab_size,
        n_layer=task.depth,
        n_head=task.heads,
        n_embd=task.width,
        dropout=0.0,
    )
    model = theirs.GPT(config).to(task.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), task.device)
    run = torch.compile(model) if compiled else model
    return trained(task, model, lambda ids, targets: run(ids, targets)[1], optimizer, autocast)


def nanogpt_train(task: Task) -> Step:
    """Its own train.py as its README has it for a CPU, stopped between its iterations."""
    keys = {
        "dataset": task.data,
        "out_dir": task.scratch,
        "device": task.device,
        "compile": task.device == "cuda",
        "n_layer": task.depth,
        "n_head": task.heads,
        "n_embd": task.width,
        "block_size": task.sequence_length,
        "batch_size": task.micro_batch_size,
        "gradient_accumulation_steps": task.batch_size // task.micro_batch_size,
        "bias": True,
        "eval_iters": 1,
        "log_interval": 1,
    }
    command = [sys.executable, "-u", "train.py", *(f"--{k}={v}" for k, v in keys.items())]
    options = {"cwd": task.nanogpt, "stdout": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, **options, preexec_fn=end_with_parent)

    def step() -> float:
        os.kill(run.pid, signal.SIGCONT)
        for line in run.stdout:
            if line.startswith("iter "):
                os.kill(run.pid, signal.SIGSTOP)
                return float(line.split("loss ")[1].split(",")[0])
        raise RuntimeError("nanoGPT's train.py ended")

    step.process = run
    return step


def gigagpt(task: Task) -> Step:
    """The original's model, in fp32, as its CPU backend would run it."""
    theirs = model_of(task.gigagpt)
    config = theirs.GPTConfig(
        max_position_embeddings=task.sequence_length,
        vocab_size=task.vocab_size,
        depth=task.depth,
        heads=task.heads,
        width=task.width,
    )
    model = theirs.GPTModel(config).to(task.device)
    return trained(task, model, model, autocast=False)


def fsdp_offload(task: Task) -> Step:
    """Hugging Face's model under FSDP2 with its shards in host memory; unreduced gradients are
    summed on the device until the last micro-batch, as its documentation has it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    backends = "cpu:gloo,cuda:nccl" if task.device == "cuda" else "gloo"
    dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)
    policy = {
        "mesh": init_device_mesh(task.device, (1,)),
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=task.device == "cuda"),
    }
    model = hugging_face(task)
    for block in model.transformer.h:
        if task.device == "cuda":
            block.compile()
        fully_shard(block, **policy)
    fully_shard(model, **policy)
    loss_of = lambda ids, y: cross_entropy(model(ids, use_cache=False).logits, y)  # noqa: E731
    before = model.set_requires_gradient_sync
    return trained(task, model, loss_of, autocast=False, before=before)


def deepspeed_offload(task: Task, to: str = "cpu") -> Step:
    """Hugging Face's model under DeepSpeed's ZeRO-3 with parameters and optimizer offloaded."""
    import deepspeed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"LOCAL_RANK": "0"}
    offload = {"device": to, "pin_memory": task.device == "cuda", "nvme_path": task.scratch}
    model, _, _, _ = deepspeed.initialize(
        model=(network := hugging_face(task).cpu()),
        model_parameters=network.parameters(),
        config={
            "train_micro_batch_size_per_gpu": task.micro_batch_size,
            "gradient_accumulation_steps": task.batch_size // task.micro_batch_size,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 6e-4, "weight_decay": 0.1}},
            "zero_optimization": {
                "stage": 3,
                "offload_param": offload,
                "offload_optimizer": offload,
            },
        },
    )
    batches = in_order(task)

    def step() -> float:
        total = 0.0
        for ids, targets, part in micro_batches(task, next(batches)):
            loss = cross_entropy(model(ids, use_cache=False).logits, targets)
            model.backward(loss)
            model.step()
            total += loss.item() * part
        return total

    return step


SIDES: dict[str, Callable[[Task], Step]] = {
    "resident": partial(ours, engine="resident"),
    "streaming-ram": partial(ours, engine="streaming", stream_to="ram"),
    "streaming-disk": partial(ours, engine="streaming", stream_to="disk"),
    "held-block": held_block,
    "transformers": transformers,
    "transformers-compiled": partial(transformers, compiled=True),
    "litgpt-compiled": litgpt,
    "nanogpt-train": nanogpt_train,
    "nanogpt-fp32": partial(nanogpt, autocast=False),
    "nanogpt-bf16": nanogpt,
    "nanogpt-bf16-compiled": partial(nanogpt, compiled=True),
    "gigagpt-fp32": gigagpt,
    "fsdp-offload": fsdp_offload,
    "deepspeed-cpu": deepspeed_offload,
    "deepspeed-nvme": partial(deepspeed_offload, to="nvme"),
}
NOTES = {
    "fsdp-offload": "with one process FSDP2 copies weights in the stream that computes",
}
