"""A trained model's fp32 weights, gathered block by block while it runs: the same numbers under every engine, whatever
the precision in which the engine computes. Nothing of the engine changes, and no second copy of the model is made."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from megagpt.engines.engine import Engine
from megagpt.engines.flat_shard import FlatShard
from megagpt.models.gpt import GPT
from megagpt.models.tensor_parallel import split_of


@contextlib.contextmanager
def full_precision(engine: Engine, dtype: torch.dtype = torch.float32) -> Iterator[nn.Module]:
    """The engine's model with its fp32 weights, in evaluation mode, without gradients, with matrix products in `dtype`.
    Every rank must enter, and call the model equally often. In memory at a time: one block, and what is outside of the
    blocks."""
    whole = _Whole(engine)
    with torch.no_grad(), torch.autocast(engine.world.device.type, dtype, enabled=dtype != torch.float32):
        yield whole.eval()


class _Whole(nn.Module):
    def __init__(self, engine: Engine) -> None:
        super().__init__()
        state = engine.state()
        shards = {key.removeprefix("model."): shard for key, shard in state.items() if key.startswith("model.")}
        with torch.device("meta"):
            self.model = GPT(engine.config.model)
        self.model.blocks = nn.ModuleList(
            _Block(block, _below(shards, f"blocks.{i}."), engine) for i, block in enumerate(self.model.blocks)
        )
        outside = {name: shard for name, shard in shards.items() if not name.startswith("blocks.")}
        self._outside = _gathered(outside, engine)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return functional_call(self.model, self._outside, arguments, named)


class _Block(nn.Module):
    def __init__(self, block: nn.Module, shards: dict[str, FlatShard], engine: Engine) -> None:
        super().__init__()
        self.block, self._shards, self._engine = block, shards, engine

    def forward(self, *arguments: Any) -> Tensor:
        return functional_call(self.block, _gathered(self._shards, self._engine), arguments)


def _below(shards: dict[str, FlatShard], prefix: str) -> dict[str, FlatShard]:
    return {name.removeprefix(prefix): shard for name, shard in shards.items() if name.startswith(prefix)}


def _gathered(shards: dict[str, FlatShard], engine: Engine) -> dict[str, Tensor]:
    """Whole tensors on this rank's device."""
    world, replica = engine.world, engine.replica
    if replica.count == world.size:  # each rank holds a whole copy
        return {name: shard.flat.to(world.device).view(tuple(shard.shape)) for name, shard in shards.items()}
    found = {}
    for name, shard in shards.items():
        whole = torch.zeros(tuple(shard.shape), dtype=torch.float32, device=world.device)
        if replica.index == 0 and (engine.ranks.rank == 0 or split_of(name)):  # tensor ranks share the others
            for box, piece in shard.pieces():
                whole[box.place] = piece
        dist.all_reduce(whole)  # one rank's values and the zeros of all others: exact
        found[name] = whole
    return found
