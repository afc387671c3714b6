"""The common part of DDP and FSDP: the model's parameters are the fp32 weights, and PyTorch's AdamW updates them."""

from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from megagpt.engines.engine import MOMENTS, Engine, moments_of
from megagpt.engines.flat_shard import FlatShard, parts_of
from megagpt.models.tensor_parallel import TensorRanks, split_of

# Elements in one fp32 norm: few enough to be exact to 1e-7.
_ROW = 1024


class NativeEngine(Engine):
    """An engine whose gradients and optimizer state are sharded like the parameters, or not at all."""

    gradient_groups: tuple[dist.ProcessGroup, ...] = ()
    """Groups of ranks over which gradients are divided: by shards, then by tensor ranks. Empty if each rank has all."""
    keeps_gradients = False
    """Whether gradients lie in memory that is never given back: a step then sets them to zero."""

    def _backward(self, loss: Tensor, scale: float, last: bool) -> Tensor:
        self._scaled(loss, scale * self.loss_scale.value, last).backward()
        return loss.detach()

    @torch.no_grad()
    def _update(self) -> Tensor:
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        by_name = {name: g.to_local() if isinstance(g, DTensor) else g for name, g in gradients.items()}
        local, counted = list(by_name.values()), list(by_name.values())
        if self.ranks.size > 1:
            self._sum_of_tensor_ranks([g for name, g in by_name.items() if not split_of(name)])
            counted = [g for name, g in by_name.items() if split_of(name) or self.ranks.rank == 0]
        square = sum_of_squares(counted).to(self.world.device)
        for group in self.gradient_groups:
            dist.all_reduce(square, group=group)
        norm = square.sqrt() / self.loss_scale.value
        # On the device, so that the host need not wait for the norm before the update is on its way.
        device = local[0].device
        factor = (self.config.optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0) / self.loss_scale.value
        factor = factor.to(device, torch.float32)
        if not _is_one(factor):
            torch._foreach_mul_(local, factor)
        # AdamW then leaves everything as it is. The name is that of PyTorch's own gradient scaler.
        self.optimizer.found_inf = (~torch.isfinite(norm)).to(device, torch.float32)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        return norm

    def _sum_of_tensor_ranks(self, gradients: list[Tensor]) -> None:
        """Add up the gradients of what every tensor rank has, in one exchange: a rank's come from its own tokens."""
        flat = torch.cat([g.flatten() for g in gradients]).to(self.world.device)
        dist.all_reduce(flat, group=self.gradient_groups[-1])
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def state(self) -> dict[str, FlatShard]:
        state = {}
        for name, parameter in self.model.named_parameters():
            moments = moments_of(self.optimizer, parameter)
            state[f"model.{name}"] = held(name, parameter.detach(), self.ranks)
            state |= {f"{kind}.{name}": held(name, moments[kind], self.ranks) for kind in MOMENTS}
        return state

    def initialize(self) -> None:
        for name, parameter in self.model.named_parameters():
            self._initialize(name, held(name, parameter.detach(), self.ranks))
        self.optimizer.state.clear()  # zeros, made when they are needed

    def _state_loaded(self, updates: int) -> None:
        for moments in self.optimizer.state.values():
            moments["step"].fill_(updates)


def _is_one(factor: Tensor) -> bool:
    """Whether a factor is known to change nothing. To know it of a GPU's, the host would have to wait."""
    return factor.device.type == "cpu" and float(factor) == 1


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """The sum of all elements' squares, an fp64 scalar on the tensors' device."""
    if tensors[0].is_cuda:  # which sums in a tree: fp32 is exact enough, and no copy in fp64 is made
        return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
    return torch.stack([_sum_of_squares_on_cpu(tensor.flatten()) for tensor in tensors]).sum()


def _sum_of_squares_on_cpu(flat: Tensor) -> Tensor:
    """By rows, whose norms are taken in fp32, at the speed of memory, and added in fp64. The fp32 norm of a large
    tensor is off by up to a thousandth, and its fp64 norm takes ten times as long."""
    whole = flat.numel() // _ROW * _ROW
    parts = (flat[:whole].view(-1, _ROW), flat[None, whole:])
    return torch.stack([torch.linalg.vector_norm(part, dim=1).double().square().sum() for part in parts]).sum()


def held(name: str, tensor: Tensor, ranks: TensorRanks) -> FlatShard:
    """This rank's part of the parameter of that name, or of one of its moments, as a flat range."""
    shape, parts = parts_of(name, tuple(tensor.shape), ranks)
    if not isinstance(tensor, DTensor):
        return FlatShard(tensor.view(-1), shape, 0, parts)
    # FSDP cuts rows into equal chunks, the last one shorter.
    dimension = tensor.placements.index(Shard(0))
    rank, size = tensor.device_mesh.get_local_rank(dimension), tensor.device_mesh.size(dimension)
    rows, *inner = tensor.shape
    return FlatShard(tensor.to_local().view(-1), shape, min(rows, rank * -(-rows // size)) * prod(inner), parts)
