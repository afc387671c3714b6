"""PyTorch's FSDP2: every parameter is a DTensor, sharded by rows over the ranks and gathered block by block.

Weights, gradients and optimizer state are fp32 shards. A block's weights are gathered in the compute precision before
its forward and its backward pass; its gradients are summed in fp32 and scattered after each micro-batch. With hybrid
sharding, each group of `shard_ranks` neighbouring ranks holds one copy of the model, and the shards' gradients are
summed over the copies once per step.

With tensor ranks, a group of `tensor_ranks` neighbours shares each product (`models.tensor_parallel`), and FSDP shards
each of their parts over the groups: to FSDP, a tensor rank's part is the parameter."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from megagpt.config import Config
from megagpt.engines.engine import DTYPES, Replica, build_optimizer, prepare_model
from megagpt.engines.native import NativeEngine
from megagpt.models.gpt import GPT
from megagpt.models.tensor_parallel import ALONE, TensorRanks
from megagpt.world import World


class FSDPEngine(NativeEngine):
    """Full sharding over all ranks, or hybrid: sharded inside groups of ranks, replicated over the groups."""

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        engine, device = config.engine, world.device
        copy, group = config.sharing_ranks(world.size), engine.tensor_ranks
        sizes = {"replicate": world.size // copy, "shard": copy // group, "tensor": group}
        if group == 1:
            del sizes["tensor"]
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        self.replica = Replica(mesh.get_local_rank("replicate"), sizes["replicate"])
        self.gradient_groups = tuple(mesh[name].get_group() for name in sizes if name != "replicate")
        self.ranks = TensorRanks.of(mesh["tensor"].get_group()) if group > 1 else ALONE
        policy = MixedPrecisionPolicy(DTYPES[config.train.precision], torch.float32, cast_forward_inputs=False)
        on_gpu, on_host = device.type == "cuda", engine.offload == "all"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if on_host else OffloadPolicy()
        with torch.device("meta"):
            self.model = GPT(config.model, self.ranks)
        self.clock = prepare_model(self.model, config, device, self.compiled)
        # The root shards the rest as one group: the tied embedding and head, the positions, the final LayerNorm.
        over = mesh["replicate", "shard"] if copy < world.size else mesh["shard"]
        for module in (*self.model.blocks, self.model):
            again = engine.reshard_after_forward and module is not self.model
            fully_shard(module, mesh=over, mp_policy=policy, offload_policy=offload, reshard_after_forward=again)
        self.model.to_empty(device="cpu" if on_host else device)
        self.optimizer = build_optimizer(self.model, config)

    def _accumulate(self, tokens: Tensor, targets: Tensor, scale: float, last: bool) -> Tensor:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_all_reduce(last)
        return self._backward(self.model(tokens, targets), scale, last)

    @contextlib.contextmanager
    def evaluation(self, any_shape: bool = False) -> Iterator[nn.Module]:
        with super().evaluation(any_shape) as model:
            yield model
        # Without this, the root's gathered weights would stay until a backward pass.
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()

    def describe(self) -> str:
        copies, shard = self.replica.count, self.world.size // self.replica.count
        return super().describe() + (f", {copies} copies of the model over {shard} ranks each" if copies > 1 else "")
