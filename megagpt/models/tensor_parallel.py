"""Tensor and sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022): t ranks share each matrix product of
one model.

A rank's part of the model is a smaller model: heads / t heads, 4 C / t of the MLP's inner width, V / t rows of the
token embedding. Attention and MLP see all T tokens; the residual stream, its LayerNorms and its dropout see T / t
tokens, the rank's own. Two exchanges lead from one to the other, and each is the other's gradient:

    all_gather:     own tokens (B, T / t, C) -> all tokens (B, T, C), in front of the products that are split by columns
    reduce_scatter: partial sums (B, T, C) -> their sum, own tokens (B, T / t, C), behind those that are split by rows

Tokens travel in the compute dtype, and partial sums are added in fp32: a reduce-scatter in bf16 would round after each
of its t - 1 sums."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Operators, not their Python wrappers: PyTorch 2.13 renamed those, and torch.compile sees these in any case.
_ops = torch.ops._c10d_functional


class Split(NamedTuple):
    """How a parameter is divided among tensor ranks."""

    dimension: int
    """The dimension that is divided."""
    stacked: int
    """Matrices that are stacked in this dimension, each of which is divided: 3 for q, k and v."""


def split_of(name: str) -> Split | None:
    """How the parameter of that name is divided; None if each tensor rank has all of it. A rank then has the gradient
    of its own tokens, and the ranks' sum is the whole one."""
    if "attention.qkv." in name:
        return Split(0, 3)  # by heads
    if "mlp.up." in name or name == "token_embedding.weight":
        return Split(0, 1)
    return Split(1, 1) if name.endswith(("attention.out.weight", "mlp.down.weight")) else None


@dataclass(frozen=True)
class TensorRanks:
    """The ranks that share one model's products, and this one's place among them."""

    rank: int = 0
    size: int = 1
    group: str = ""
    """The process group's name, by which PyTorch's operators find it."""

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "TensorRanks":
        """This rank among those of a process group."""
        return cls(group.rank(), group.size(), group.group_name)

    def all_gather(self, x: Tensor) -> Tensor:
        """Own tokens (B, T / size, C) -> all tokens (B, T, C), in autocast's dtype if autocast is on."""
        if self.size == 1:
            return x
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _AllGather.apply(x, dtype, self.size, self.group)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Every rank's partial sums (B, T, C) -> their sum for the own tokens, fp32 (B, T / size, C)."""
        return x if self.size == 1 else _ReduceScatter.apply(x, self.size, self.group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Every rank's partial sums -> their sum, fp32, on each rank. It has no gradient."""
        return x if self.size == 1 else _ops.wait_tensor(_ops.all_reduce(x.float(), "sum", self.group))

    def all_gather_stacked(self, x: Tensor) -> Tensor:
        """Every rank's x, (size, *x.shape). It has no gradient."""
        every = _ops.all_gather_into_tensor(x.contiguous(), self.size, self.group)
        return _ops.wait_tensor(every).view(self.size, *x.shape)

    def all_gather_columns(self, x: Tensor) -> Tensor:
        """Every rank's columns (..., N / size) -> all columns (..., N). It has no gradient."""
        return x if self.size == 1 else self.all_gather_stacked(x).movedim(0, -2).flatten(-2)

    def own_tokens(self, x: Tensor) -> Tensor:
        """The own tokens' part of a tensor whose last dimension is T."""
        return x if self.size == 1 else x.chunk(self.size, -1)[self.rank]


ALONE = TensorRanks()


def row_linear(linear: nn.Linear, x: Tensor, ranks: TensorRanks, whole: bool) -> Tensor:
    """A linear layer whose inputs are cut over the ranks, applied to all tokens (B, T, inputs / size): its output for
    the own tokens, fp32 (B, T / size, outputs), or for all tokens if `whole`."""
    if ranks.size == 1:
        return linear(x)
    partial = F.linear(x, linear.weight)
    return (ranks.all_reduce(partial) if whole else ranks.reduce_scatter(partial)) + linear.bias  # the bias counts once


def _all_gather(x: Tensor, size: int, group: str) -> Tensor:
    B, T, C = x.shape
    every = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), size, group))
    return every.view(size, B, T, C).transpose(0, 1).reshape(B, size * T, C)  # a view if B is 1


def _reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """The ranks swap their partial sums in x's dtype, as many bytes as a reduce-scatter, and each adds up its own
    tokens' in the ranks' order."""
    B, T, C = x.shape
    parts = x.view(B, size, T // size, C).transpose(0, 1).reshape(size * B, T // size, C)
    splits = [B] * size
    every = _ops.wait_tensor(_ops.all_to_all_single(parts.contiguous(), splits, splits, group))
    return every.view(size, B, T // size, C).sum(0, dtype=torch.float32)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, size: int, group: str) -> Tensor:
        ctx.settings = x.dtype, dtype, size, group
        return _all_gather(x.to(dtype), size, group)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        into, dtype, size, group = ctx.settings
        return _reduce_scatter(gradient[0].to(dtype), size, group).to(into), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.settings = x.dtype, size, group
        return _reduce_scatter(x, size, group)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        dtype, size, group = ctx.settings
        return _all_gather(gradient[0].to(dtype), size, group), None, None
