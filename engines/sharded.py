"""Several GPUs or CPU processes: PyTorch's FSDP2 shards weights, gradients and optimizer state.

Each block is gathered when it is needed, and so is what is outside the blocks. Every process takes
its rows of the global batch. Losses are divided by the tokens of the global batch and gradients
summed over the processes, so that the results do not depend on how many there are.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from configuration import Configuration
from dataset import Batch, EvalData
from engines.base import Engine, Limits, Report, micro_batches, prepare_compute
from engines.optimizer import clip_divisor, is_applied, make_optimizer, square_sum
from engines.state import Watch
from loss import IGNORE
from model import derive_seed


class ShardedEngine(Engine):
    """Holds 16 bytes a parameter, divided by the number of processes that share a copy: fp32
    weight, gradient and two moments, on the device or (`offload`) in host memory.

    With `reshard_after_forward` a block's gathered weights are freed after use and its gradient is
    scattered after every micro-batch; without it both stay complete for the step, and move once.
    """

    def __init__(self, config: Configuration, training: bool = True):
        super().__init__(config, training)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        if config.backend == "GPU":
            local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
            self.device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.shards = config.shard_group_size
        # shards of a copy are neighbours, on one machine if they fit there
        self.replica, self.shard = divmod(self.rank, self.shards)
        # each copy of the weights saves its share of the layers
        self.saved_layers = self.saved_layers[self.replica :: self.size // self.shards]
        self.file_suffix = f".{self.shard + 1}-of-{self.shards}"
        self.sequences = -(-config.batch_size // self.size)  # of the process that has most
        prepare_compute(config, self.model, training)
        self._shard()
        self.model.to_empty(device="cpu" if config.offload else self.device)
        self.weights = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(config, self.weights.values())

    def _shard(self) -> None:
        config = self.config
        policy = {"mesh": self._mesh()}
        if config.precision == "bf16":
            policy["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if config.offload:
            policy["offload_policy"] = CPUOffloadPolicy()
        for block in self.model.decoder:
            fully_shard(block, reshard_after_forward=config.reshard_after_forward, **policy)
        fully_shard(self.model, reshard_after_forward=False, **policy)
        for module in self._fsdp_modules():  # sums, where it would average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _mesh(self) -> DeviceMesh:
        """Returns copies × shards, or the shards of one copy; lost connections are noticed in
        step_timeout."""
        timeout = timedelta(seconds=self.config.step_timeout)
        self.group = dist.new_group(timeout=timeout)
        if self.shards == self.size:
            return DeviceMesh.from_group(self.group, self.device.type)
        ranks = torch.arange(self.size).view(-1, self.shards)
        groups = [
            dist.new_subgroups_by_enumeration(lists, timeout=timeout)[0]
            for lists in (ranks.T.tolist(), ranks.tolist())
        ]
        names = ("copies", "shards")
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=names)

    def _fsdp_modules(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if hasattr(module, "reshard")]

    def rows(self, name: str) -> slice:
        """Returns this process's rows, as FSDP2 cuts them (torch.chunk)."""
        count = self.weights[name].shape[0]
        rows = -(-count // self.shards)
        begin = min(self.shard * rows, count)
        return slice(begin, min(begin + rows, count))

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to_local()

    def step(
        self, step: int, batch: Batch, rate: float, limits: Limits, report_progress: Report
    ) -> tuple[float, float]:
        loss = self._accumulate(self._pad(batch), step, report_progress)
        gradients = [self.local(weight.grad) for weight in self.weights.values()]
        squares = square_sum(gradients)
        # one sum over the processes; every copy has the same gradients
        sums = torch.stack([loss, squares.to(self.device) * self.shards / self.size])
        dist.all_reduce(sums, group=self.group)
        loss = sums[0].item()
        norm = sums[1].sqrt().item()
        if is_applied(loss, norm, limits):
            clip = clip_divisor(self.config, torch.tensor(norm, dtype=torch.float64))
            self.optimizer.grad_scale = clip.to("cpu" if self.config.offload else self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer_steps += 1
        self.optimizer.zero_grad()
        return loss, norm

    def _pad(self, batch: Batch) -> Batch:
        """Pads to as many rows as any process has: each takes part in every gathering."""
        missing = ((0, self.sequences - len(batch.ids)), (0, 0))
        return Batch(
            ids=np.pad(batch.ids, missing),
            targets=np.pad(batch.targets, missing, constant_values=IGNORE),
            offsets=batch.offsets,
        )

    def _accumulate(self, batch: Batch, step: int, report_progress: Report) -> Tensor:
        """Leaves the gradient of the mean loss in the shards; returns this process's part of it."""
        config = self.config
        tokens = config.batch_size * config.sequence_length
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = -(-self.sequences // config.micro_batch_size)
        for i, (ids, targets) in enumerate(micro_batches(config, self.device, batch)):
            self.model.set_requires_all_reduce(i == count - 1)  # between copies
            if not config.reshard_after_forward:
                self.model.set_requires_gradient_sync(i == count - 1)
                self.model.set_reshard_after_backward(i == count - 1)
            index = self.rank * count + i  # among all micro-batches of the step
            seed = derive_seed(config.seed, step, index)
            loss = self.model(ids, targets, seed, tokens)
            loss.backward()
            total += loss.detach()
            report_progress((i + 1) / count)
        return total

    def sum_losses(self, batch: Batch) -> Tensor:
        return super().sum_losses(self._pad(batch))

    def evaluate(self, data: EvalData, sequences: int, track: Watch = iter) -> tuple[float, int]:
        sums = torch.tensor(super().evaluate(data, sequences, track), dtype=torch.float64)
        dist.all_reduce(sums)
        return sums[0].item(), int(sums[1])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            yield
        for module in self._fsdp_modules():
            module.reshard()

    def close(self) -> None:
        self.model = None
        self.optimizer = None
        self.weights.clear()
