"""Cerebras systems, through the vendor's own package, which nothing else imports.

A step is traced once, lowered and compiled for the wafer; the appliance then pulls batches from its
input workers by itself and returns losses later. Its weights are available after steps that were
named in advance, so each segment of the run, up to an evaluation, is one execution with a schedule
of checkpoints. docs/cerebras.md says what was tested, and what was not.
"""

import atexit
import logging
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

import cerebras.pytorch as cstorch
import grpc
import numpy as np
import torch
from cerebras.appliance.cluster.config import ClusterConfigError, get_cs_cluster_config
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.console import UserError
from configuration import Configuration
from dataset import Batch, EvalData, TrainData
from engines.base import Engine, Report, StepStats
from engines.optimizer import BETAS, FINAL_FRACTION, decay_span, learning_rate, parameter_groups
from engines.state import Read, Watch
from loss import IGNORE
from model import GPT, derive_seed
from weights.checkpoint import KINDS, write_error

PROGRAM = Path(__file__).resolve().parents[1]
# At Ctrl-C these cancel what they wait for; we go on to the next checkpoint
CANCELLING = (
    "cerebras.appliance.utils.interceptors",
    "cerebras.pytorch.core.appliance",
    "cerebras.pytorch.storage.save",
)


class CerebrasEngine(Engine):
    """The package's CSX backend, or its CPU backend, which runs the same step eagerly in fp32.

    Weights are passed through files in out_dir/cerebras, which the package reads and writes tensor
    by tensor, so that this machine never holds the model.
    """

    def __init__(self, config: Configuration, training: bool = True):
        super().__init__(config, training)
        self.saved: Path | None = None
        if config.skip_loss_spikes:
            raise UserError("skip_loss_spikes: not supported by engine cerebras; remove it")
        self.folder = Path(config.out_dir, "cerebras")
        self.folder.mkdir(parents=True, exist_ok=True)
        if training:
            self._clear()  # what a run that was killed left
        else:  # another run may have its files there
            self.folder = Path(mkdtemp(prefix="eval_", dir=self.folder))
        self.backend = open_backend(config, self.folder)
        with self.backend.device:
            self.model = GPT(config)
        if self.backend.is_csx:  # it draws its own masks: a seed for each step is another graph
            self.model.seed_dropout = lambda seed, layer: None
            torch.manual_seed(config.seed)
        self.compiled = cstorch.compile(self.model, self.backend)
        if training:
            self._make_optimizer()

    def _make_optimizer(self) -> None:
        config = self.config
        self.optimizer = cstorch.optim.AdamW(
            parameter_groups(self.model.parameters(), config.weight_decay),
            lr=config.learning_rate,
            betas=BETAS,
            eps=config.adam_epsilon,
        )
        schedulers = cstorch.optim.lr_scheduler
        rate = config.learning_rate
        warmup = config.warmup_steps
        begin, steps = decay_span(config)
        pieces = [schedulers.LinearLR(self.optimizer, 0.0, rate, max(1, warmup))]
        self.milestones = [warmup]
        if begin > warmup:
            pieces.append(schedulers.ConstantLR(self.optimizer, rate, begin - warmup))
            self.milestones.append(begin)
        decay = schedulers.LinearLR if config.schedule == "wsd" else schedulers.CosineDecayLR
        pieces.append(decay(self.optimizer, rate, FINAL_FRACTION * rate, steps))
        self.schedule = schedulers.SequentialLR(self.optimizer, pieces, self.milestones)
        if self.backend.is_csx:  # bf16 needs no scale, but its scaler skips steps, traced
            self.scaler = cstorch.amp.GradScaler("dynamic", 1.0, None, 1.0, 1.0)

    def initialize(self, track: Watch = iter) -> None:
        if self.backend.is_e2e_execution:  # else only the graph matters, not the weights
            super().initialize(track)

    def load(self, read: Read, optimizer_steps: int | None, track: Watch = iter) -> None:
        if self.backend.is_e2e_execution:
            super().load(read, optimizer_steps, track)

    def put(self, layer: str, kind: str, tensors: dict[str, Tensor]) -> None:
        named = {kind + name: tensor.contiguous() for name, tensor in tensors.items()}
        path = self.folder / f"{kind}{layer}.safetensors"
        try:
            save_file(named, path)
        except SafetensorError as error:
            raise write_error(path, str(error)) from None

    def ready(self) -> None:
        """Has the package load what was put: it reads a tensor when it sends it."""
        tensors = {}
        for path in self.folder.glob("*.safetensors"):
            tensors |= cstorch.load(str(path))  # which it may write into another file
        names = [name for name, _ in self.model.named_parameters()]
        self.model.load_state_dict({name: tensors.pop(name) for name in names})
        if self.training:
            self._load_optimizer(tensors)

    def _numbers(self) -> dict[str, int]:
        """Returns the number of each parameter in the optimizer, which follows its groups."""
        ordered = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        return {name: ordered.index(id(p)) for name, p in self.model.named_parameters()}

    def _load_optimizer(self, moments: dict[str, Tensor]) -> None:
        """Sets Adam's moments, if there are any, and what depends on the number of optimizer steps:
        the powers of beta for the next bias correction, and the steps of the schedules, which count
        from 1 as `learning_rate` does."""
        count = self.optimizer_steps + 1
        # multiplied up in fp32, as the package's AdamW does
        powers = [np.full(count, beta, np.float32).cumprod()[-1] for beta in BETAS]
        state = self.optimizer.state_dict()
        for name, number in self._numbers().items():
            values = state["state"][number]
            values["beta1_power"] = torch.tensor(powers[0])
            values["beta2_power"] = torch.tensor(powers[1])
            if moments:
                for kind in KINDS[1:]:
                    values[kind.removesuffix(".")] = moments[kind + name]
        self.optimizer.load_state_dict(state)
        state = self.schedule.state_dict()
        state["last_epoch"] = count
        for piece, begin in zip(state["_schedulers"], [0, *self.milestones], strict=True):
            piece["last_epoch"] = max(0, count - begin)
        self.schedule.load_state_dict(state)
        if not self.backend.is_csx:  # there it is done in every traced step
            self.schedule.update_last_value()

    def run(
        self, data: TrainData, start: int, stop: int, report_progress: Report
    ) -> Iterator[StepStats]:
        if not self.backend.is_e2e_execution:  # one step has the whole graph
            stop = start + 1
        every = self.config.eval_steps
        while start < stop:
            end = min(stop, (start // every + 1) * every)
            yield from self._execute(data, start, end)
            start = end

    def _execute(self, data: TrainData, start: int, end: int) -> Iterator[StepStats]:
        """Runs steps start to end in one execution of the appliance."""
        config = self.config
        arrived = []
        began = time.perf_counter()
        steps = range(start + 1, end + 1)
        due = [s for s in steps if s % config.checkpoint_steps == 0 or s == config.num_steps]

        @cstorch.step_closure
        def absorb(loss: Tensor, norm: Tensor, step: int) -> None:
            self.tokens += config.batch_size * config.sequence_length
            stats = StepStats(
                step=step,
                loss=loss.item(),
                grad_norm=norm.item(),
                learning_rate=learning_rate(config, self.optimizer_steps + 1),
                seconds=time.perf_counter() - began,
                tokens=self.tokens,
                offsets=data.offsets(step - 1),
                applied=bool(np.isfinite(loss.item() + norm.item())),
                can_save=step in due,
            )
            self.optimizer_steps += stats.applied
            arrived.append(stats)

        @cstorch.checkpoint_closure
        def save(step: int) -> None:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            if self.saved is not None:  # of a step that was not finite
                self.saved.unlink(missing_ok=True)
            self.saved = self.folder / f"step_{step}.h5"
            try:
                cstorch.save(state, self.saved)
                return
            except Exception as error:
                reason = re.search(r"error message = '([^']*)'", str(error))  # HDF5's
                if reason is None:
                    raise
            # here the file is closed, as nothing holds the error; HDF5 would crash at the end
            atexit.register(os._exit, 1)
            raise write_error(self.saved, reason[1])

        schedule = cstorch.utils.data.utils.Schedule
        saving = [schedule.Range(step - start - 1, step - start, 1, False) for step in due]
        executor = cstorch.utils.data.DataExecutor(
            self._loader(data.get, range(start, end)),
            num_steps=end - start,
            checkpoint_steps=schedule(saving),
        )
        self.model.train()
        trace = cstorch.trace(self._step)
        for step, (ids, targets) in enumerate(answering(executor), start):
            while arrived:
                yield arrived.pop(0)
                began = time.perf_counter()  # without what the loop did
            loss, norm = trace(ids, targets, derive_seed(config.seed, step, 0))
            absorb(loss, norm, step + 1)
            save(step + 1)
        yield from arrived

    def _step(self, ids: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Runs a step; returns the mean loss and the gradient norm. A step that is not finite
        changes nothing."""
        loss = self.compiled(ids, targets, seed) / targets.numel()
        if self.backend.is_csx:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
        else:
            loss.backward()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_gradient_norm)
        if self.backend.is_csx:
            self.scaler.step(self.optimizer)
            self.schedule.step()
            self.scaler.update()
        elif (loss + norm).isfinite():  # eager, where the scaler does not run
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad()
        return loss, norm

    def _loader(self, get: Callable, steps: range) -> cstorch.utils.data.DataLoader:
        # the wafer has no 64-bit integers, PyTorch's cross-entropy takes no other
        dtype = torch.int32 if self.backend.is_csx else torch.int64
        size = self.config.batch_size
        return cstorch.utils.data.DataLoader(read_batches, get, steps, size, dtype)

    def evaluate(self, data: EvalData, sequences: int, track: Watch = iter) -> tuple[float, int]:
        if not self.backend.is_e2e_execution:
            raise UserError("cluster.validate_only and cluster.compile_only are for train.py")
        steps = range(-(-len(data) // self.config.batch_size))
        get = partial(read_sequences, data, self.config.batch_size)
        tokens = sum(int((get(step).targets != IGNORE).sum()) for step in steps)
        return self._evaluate(get, steps, track), tokens

    def _evaluate(self, get: Callable, steps: range, track: Watch = iter) -> float:
        """Returns the sum of the losses, in one execution of the appliance."""
        total = 0.0

        @cstorch.step_closure
        def absorb(loss: Tensor) -> None:
            nonlocal total
            total += loss.item()

        @cstorch.trace
        @torch.no_grad()
        def losses(ids: Tensor, targets: Tensor) -> Tensor:
            return self.compiled(ids, targets)

        loader = self._loader(get, steps)
        executor = cstorch.utils.data.DataExecutor(loader, num_steps=len(steps))
        tracked = iter(track(steps))
        self.model.eval()
        # to the end, whatever is tracked: leaving an execution shuts the appliance down
        for ids, targets in answering(executor):
            absorb(losses(ids, targets))
            next(tracked, None)
        self.model.train()
        return total

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        with cstorch.storage.serializers.cache_deferred_tensors(False):
            saved = cstorch.load(self.saved)
        self.loaded = dict(saved["model"])
        for name, number in self._numbers().items():
            moments = saved["optimizer"]["state"][number]
            for kind in KINDS[1:]:
                self.loaded[kind + name] = moments[kind.removesuffix(".")]
        yield from super().state()
        self.saved.unlink()

    def get(self, layer: str, kind: str) -> dict[str, Tensor]:
        return {name: read_deferred(self.loaded[kind + name]) for name in self.layers[layer]}

    def close(self) -> None:
        self.model = self.compiled = self.optimizer = None
        if self.training:
            self._clear()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _clear(self) -> None:
        for path in [*self.folder.glob("*.safetensors"), *self.folder.glob("step_*.h5*")]:
            path.unlink()


def open_backend(config: Configuration, folder: Path) -> cstorch.backend:
    """The package's backend, of which a process has one."""
    for name in CANCELLING:
        import_module(name).on_sigint = lambda cancel: nullcontext()
    if config.backend == "CPU":
        return cstorch.backend("CPU", artifact_dir=str(folder))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # it starts the compiler that was installed beside this Python by its bare name
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cluster = config.cluster
    csx = cstorch.backends.csx
    try:
        cluster_config = make_cluster_config(config)
        csx.performance.micro_batch_size = config.micro_batch_size or "auto"
        csx.debug.compile_crd_memory_gi = cluster.compile_crd_memory_gi
        csx.debug.execute_crd_memory_gi = cluster.execute_crd_memory_gi
    except ValueError as error:
        raise UserError(f"cluster: {error}") from None
    backend = cstorch.backend(
        "CSX",
        artifact_dir=str(folder),
        compile_dir=cluster.compile_dir,
        compile_only=cluster.compile_only,
        validate_only=cluster.validate_only,
        cluster_config=cluster_config,
    )
    cstorch.amp.set_half_dtype("bfloat16")
    return backend


def make_cluster_config(config: Configuration) -> cstorch.distributed.ClusterConfig:
    """What was asked for, and the folder of this program for the input workers to import it from.
    Raises UserError where no cluster is named, by us or by the user node's own configuration."""
    cluster = config.cluster
    if cluster.mgmt_address is None and not cluster.validate_only:
        try:
            _ = get_cs_cluster_config()[1].mgmt_address
        except ClusterConfigError as error:
            name_it = "name the cluster's management with --cluster.mgmt_address HOST:PORT"
            without = "or lower the step without one: --cluster.validate_only true"
            raise UserError(f"cluster.mgmt_address: {error}; {name_it}, {without}") from None
    known = {field.name for field in fields(cstorch.distributed.ClusterConfig)}
    keys = {k: v for k, v in asdict(cluster).items() if k in known and v is not None}
    keys["python_paths"] = [*(cluster.python_paths or []), str(PROGRAM)]
    return cstorch.distributed.ClusterConfig(num_csx=config.num_systems, **keys)


def answering(executor: cstorch.utils.data.DataExecutor) -> Iterator:
    """Its batches; raises UserError for what comes from the cluster, or on the way to it."""
    try:
        yield from executor
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        names = [frame.f_globals.get("__name__", "") for frame, _ in frames]
        theirs = any(name.startswith("cerebras.appliance") for name in names)
        if not theirs or isinstance(error, (OSError, UserError)):  # of this machine's disk
            raise
        text = f"{type(error).__name__}: {error}"
        text = error.details() if isinstance(error, grpc.RpcError) else text
        raise UserError(f"cluster: {text}") from error


def read_sequences(data: EvalData, count: int, step: int) -> Batch:
    return data.get(step * count, count)


def read_batches(
    get: Callable[[int], Batch], steps: range, batch_size: int, dtype: torch.dtype
) -> torch.utils.data.DataLoader:
    """The batches of `steps`: all of each, or on an input worker of the appliance its part. The
    workers of a system take steps in turn, and each system a part of the rows. A batch is padded to
    batch_size with targets that do not count."""
    distributed = cstorch.distributed
    rows = slice(0, batch_size)
    if distributed.is_streamer():
        workers = distributed.service_resolver().cluster_spec
        me = workers.task()
        of_system = {task.wse_id: task.rank for task in workers.tasks}
        sizes = [
            distributed.get_streaming_batch_size(batch_size, of_system[system])
            for system in range(me.wse_id + 1)
        ]
        rows = slice(sum(sizes[:-1]), sum(sizes))
        # the package wants at least one
        steps = steps[me.local_rank :: workers.num_workers_per_csx] or steps[-1:]

    def read(step: int) -> tuple[Tensor, Tensor]:
        batch = get(step)
        missing = ((0, batch_size - len(batch.ids)), (0, 0))
        ids = np.pad(batch.ids, missing)
        targets = np.pad(batch.targets, missing, constant_values=IGNORE)
        return tuple(torch.from_numpy(array[rows]).to(dtype) for array in (ids, targets))

    return torch.utils.data.DataLoader(steps, batch_size=None, collate_fn=read)


def read_deferred(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that the package left in its file."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
