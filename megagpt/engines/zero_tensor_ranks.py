"""Tensor ranks under ZeRO: DeepSpeed partitions each rank's part of the model over the groups of tensor ranks."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megagpt.config import Config
from megagpt.models.gpt import GPT
from megagpt.models.tensor_parallel import TensorRanks, split_of
from megagpt.world import World


class ModelParallelUnit:
    """The object that DeepSpeed asks for groups of ranks, Megatron's `mpu`: it calls tensor ranks model-parallel."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._data, self._tensor = mesh["data"].get_group(), mesh["tensor"].get_group()
        self.ranks = TensorRanks.of(self._tensor)

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data


def model_parallel_unit(config: Config, world: World) -> ModelParallelUnit | None:
    """The groups of the config's tensor ranks, which every rank makes together; None without tensor ranks."""
    size = config.engine.tensor_ranks
    if size == 1:
        return None
    sizes = (config.shares(world.size), size)
    return ModelParallelUnit(init_device_mesh(world.device.type, sizes, mesh_dim_names=("data", "tensor")))


def share_gradients(model: GPT, unit: ModelParallelUnit) -> None:
    """Mark the parameters that are parts, so that DeepSpeed's norm counts the others once; and sum the gradients of
    those others over the tensor ranks, each of which has its own tokens' gradient.

    The sum takes one small exchange for each parameter and micro-batch, before DeepSpeed sees the gradient. DeepSpeed's
    own sums over micro-batches, which would need one exchange for each step, are in other places at each stage, in bf16
    and with offload; and with offload it takes their norm before the step."""
    for name, parameter in model.named_parameters():
        if split_of(name):
            parameter.model_parallel = True  # type: ignore[attr-defined]
        else:
            parameter.register_hook(partial(_summed, unit.get_model_parallel_group()))


def _summed(group: dist.ProcessGroup, gradient: Tensor) -> Tensor:
    """In fp32, whatever the gradient's precision."""
    total = gradient.to(torch.float32, copy=True)
    dist.all_reduce(total, group=group)
    return total.to(gradient.dtype)
