"""Several systems: PyTorch's FSDP2 shards weights, gradients and optimizer state among them.

Each block is a unit that is gathered when it is needed, and so is what is outside the blocks. Every
system takes its rows of the global batch. Losses are divided by the tokens of the global batch and
gradients summed over the systems, so that the numbers do not depend on how many there are.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from configuration import Configuration
from engines import (
    Batches,
    Read,
    StepStats,
    draw_units,
    micro_batches,
    prepare_compute,
    run_steps,
    sum_losses,
)
from engines.optimizer import (
    BETAS,
    MOMENTS,
    SPIKE_STEPS,
    clip_factor,
    counts,
    parameter_groups,
    square_sum,
)
from model import GPT, IGNORE, derive_seed


class ShardedEngine:
    """Holds 16 bytes a parameter, divided by the number of systems that share a copy: fp32 weight,
    gradient and two moments, on the device or (`offload`) in host memory.

    With `reshard` a block's weights are given back after use and its gradient is divided after
    every micro-batch; without it both stay whole for the step, and move once.
    """

    def __init__(self, config: Configuration, training: bool = True):
        self.config, self.training, self.updates = config, training, 0
        self.recent = deque(maxlen=SPIKE_STEPS)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu")
        if config.backend == "GPU":
            local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
            self.device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.shards = config.shards
        # shards of a copy are neighbours, on one machine if they fit there
        self.replica, self.shard = divmod(self.rank, self.shards)
        self.rows = -(-config.batch_size // self.world)  # of the system that has most
        with torch.device("meta"):
            self.model = GPT(config)
        prepare_compute(config, self.model, training)
        self._shard()
        self.model.to_empty(device="cpu" if config.offload else self.device)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.parameters.values(), config.weight_decay),
            lr=config.learning_rate,
            betas=BETAS,
            eps=config.adam_epsilon,
            fused=True,
        )

    def _shard(self) -> None:
        config, policy = self.config, {"mesh": self._mesh()}
        if config.precision == "bf16":
            policy["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if config.offload:
            policy["offload_policy"] = CPUOffloadPolicy()
        units = self.model.units().items()
        for block in (unit for name, unit in units if name.startswith("decoder.")):
            if config.recompute and self.training:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            fully_shard(block, reshard_after_forward=config.reshard, **policy)
        fully_shard(self.model, reshard_after_forward=False, **policy)
        for unit in self._fsdp_units():  # sums, where it would average
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    def _mesh(self) -> DeviceMesh:
        """Copies × shards, or the shards of one copy; lost connections are noticed in time."""
        timeout = timedelta(seconds=self.config.timeout)
        self.group = dist.new_group(timeout=timeout)
        if self.shards == self.world:
            return DeviceMesh.from_group(self.group, self.device.type)
        ranks = torch.arange(self.world).view(-1, self.shards)
        groups = [
            dist.new_subgroups_by_enumeration(lists, timeout=timeout)[0]
            for lists in (ranks.T.tolist(), ranks.tolist())
        ]
        names = ("copies", "shards")
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=names)

    def _fsdp_units(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if hasattr(module, "reshard")]

    def _mine(self, parameter: Tensor) -> slice:
        """This system's rows, as FSDP2 cuts them (torch.chunk)."""
        rows = -(-parameter.shape[0] // self.shards)
        begin = min(self.shard * rows, parameter.shape[0])
        return slice(begin, min(begin + rows, parameter.shape[0]))

    def initialize(self, progress: Callable = iter) -> None:
        with torch.device("meta"):
            blank = GPT(self.config)
        modules = blank.units()

        def draw(unit: str) -> None:
            modules[unit].to_empty(device="cpu")
            blank.init_unit(unit, self.config.seed)
            for name, whole in modules[unit].named_parameters():
                shard = self.parameters[f"{unit}.{name}"]
                _local(shard).copy_(whole.detach()[self._mine(shard)])
            modules[unit].to("meta")

        draw_units(blank, draw, progress)

    @torch.no_grad()
    def load(self, read: Read, updates: int | None, progress: Callable = iter) -> None:
        with_moments = updates is not None and self.training
        self.updates = updates if with_moments else 0
        for name, parameter in progress(list(self.parameters.items())):
            rows = self._mine(parameter)
            _local(parameter).copy_(read(name, rows))
            if with_moments:
                state = self.optimizer.state[parameter]
                state["step"] = torch.tensor(float(updates), device=parameter.device)
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(parameter)
                    part = read(f"{moment}.{name}", rows)
                    _local(state[moment]).copy_(part)

    def run(
        self, batches: Batches, start: int, stop: int, progress: Callable[[float], None]
    ) -> Iterator[StepStats]:
        def one_step(
            step: int, ids: np.ndarray, targets: np.ndarray, rate: float, limits: tuple
        ) -> tuple:
            loss = self._accumulate(*self._pad(ids, targets), step, progress)
            squares = square_sum([_local(p.grad) for p in self.parameters.values()])
            # one sum over the systems; every copy holds the same gradients
            sums = torch.stack([loss, squares.to(self.device) * self.shards / self.world])
            dist.all_reduce(sums, group=self.group)
            loss, norm = sums[0].item(), sums[1].sqrt().item()
            if counts(loss, norm, limits):
                self._update(norm, rate)
            self.optimizer.zero_grad()
            return loss, norm

        self.model.train()
        source = batches(self.rank, self.world)
        yield from run_steps(self, source, start, stop, one_step)

    def _pad(self, ids: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As many rows on every system: each takes part in every gathering of weights."""
        missing = ((0, self.rows - len(ids)), (0, 0))
        return np.pad(ids, missing), np.pad(targets, missing, constant_values=IGNORE)

    def _accumulate(
        self, ids: np.ndarray, targets: np.ndarray, step: int, progress: Callable[[float], None]
    ) -> Tensor:
        """Leaves the gradient of the mean loss in the shards; returns this system's part of it."""
        tokens = self.config.batch_size * self.config.sequence_length
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = -(-self.rows // self.config.micro_batch_size)
        for i, (x, y) in enumerate(micro_batches(self.config, self.device, ids, targets)):
            self.model.set_requires_all_reduce(i == count - 1)  # between copies
            if not self.config.reshard:
                self.model.set_requires_gradient_sync(i == count - 1)
                self.model.set_reshard_after_backward(i == count - 1)
            # of all micro-batches of the step
            number = self.rank * count + i
            loss = self.model(x, y, derive_seed(self.config.seed, step, number))
            (loss / tokens).backward()
            total += loss.detach()
            progress((i + 1) / count)
        return total / tokens

    def _update(self, norm: float, rate: float) -> None:
        """Clips and steps."""
        grads = [parameter.grad for parameter in self.parameters.values()]
        clip = clip_factor(self.config, torch.tensor(norm, dtype=torch.float64))
        torch._foreach_mul_(grads, clip.item())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.updates += 1

    def evaluate(self, batches: Batches, progress: Callable = iter) -> tuple[float, int]:
        def losses(ids: np.ndarray, targets: np.ndarray) -> Tensor:
            cut = micro_batches(self.config, self.device, *self._pad(ids, targets))
            return torch.stack([self.model(x, y) for x, y in cut]).double().sum()

        source = batches(self.rank, self.world)
        sums = torch.tensor(sum_losses(self.model, progress(source), losses), dtype=torch.float64)
        for unit in self._fsdp_units():
            unit.reshard()
        dist.all_reduce(sums)
        return sums[0].item(), int(sums[1])

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """This system's shards. Each copy of the weights yields its share of the units."""
        for i, unit in enumerate(self.model.units()):
            if i % (self.world // self.shards) != self.replica:
                continue
            file = f"{unit}.{self.shard + 1}-of-{self.shards}"
            named = {n: p for n, p in self.parameters.items() if n.startswith(f"{unit}.")}
            yield file, {n: _local(p).cpu() for n, p in named.items()}
            for moment in MOMENTS:
                yield (
                    f"{moment}.{file}",
                    {f"{moment}.{n}": self._moment(p, moment) for n, p in named.items()},
                )

    def _moment(self, parameter: Tensor, moment: str) -> Tensor:
        """Before the first update there are none yet: zeros."""
        state = self.optimizer.state.get(parameter)
        return _local(state[moment]).cpu() if state else torch.zeros(_local(parameter).shape)

    def close(self) -> None:
        self.model = self.optimizer = None
        self.parameters.clear()


def _local(sharded: Tensor) -> Tensor:
    """What this system has of it."""
    return sharded.detach().to_local()
