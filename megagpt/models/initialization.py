"""Initial weights as a pure function of (seed, parameter name, row, column).

Any rank can fill any box of any parameter by itself, so the same model starts on one process, on a thousand shards,
or from the meta device. The generator is Philox, keyed by a hash of seed, name and row block: no draw depends on the
order in which parameters are built."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn

from megagpt.models.presets import ModelConfig

# Numbers in a block of rows; each block has its own key.
_BLOCK_NUMEL = 2**20


def initial_std(name: str, config: ModelConfig) -> float | None:
    """Standard deviation of a parameter's initial values, None if they are constant. GPT-2's released code has
    N(0, 0.02) for matrices, N(0, 0.01) for positions. Section 2.3 of the paper scales the projections that write into
    the residual stream by 1/sqrt(N), where N counts 2 residual branches per layer."""
    if name == "position_embedding.weight":
        return 0.01
    if name.endswith(("attention.out.weight", "mlp.down.weight")):
        return 0.02 / math.sqrt(2 * config.layers)
    if name == "token_embedding.weight" or name.endswith(("attention.qkv.weight", "mlp.up.weight")):
        return 0.02
    return None


def normal_rows(seed: int, name: str, columns: int, start: int, stop: int, kept: slice = slice(None)) -> np.ndarray:
    """Rows [start, stop) of the standard normal matrix named `name`, and of these the `kept` columns, float32 of shape
    (stop - start, kept columns). All columns are drawn, one block of rows at a time."""
    rows_per_block = max(1, _BLOCK_NUMEL // columns)
    out = np.empty((stop - start, len(range(columns)[kept])), dtype=np.float32)
    for block in range(start // rows_per_block, -(-stop // rows_per_block)):
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        first = block * rows_per_block
        lo, hi = max(start, first), min(stop, first + rows_per_block)
        drawn = generator.standard_normal((hi - first, columns), dtype=np.float32)
        out[lo - start : hi - start] = drawn[lo - first :, kept]
    return out


def initial_values(
    name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Tensor:
    """A box of the parameter `name` of that shape, fp32, in the box's own shape."""
    std = initial_std(name, config)
    if std is None:
        # LayerNorm gains start at one, every bias at zero.
        return torch.full(sizes, 1.0 if name.endswith("norm.weight") else 0.0)
    kept = slice(offsets[1], offsets[1] + sizes[1])
    rows = normal_rows(seed, name, shape[1], offsets[0], offsets[0] + sizes[0], kept)
    return torch.from_numpy(rows).mul_(std)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of an unsharded model in place, on its device."""
    for name, p in model.named_parameters():
        p.copy_(initial_values(name, tuple(p.shape), config, seed, (0,) * p.dim(), tuple(p.shape)))


def is_decayed(name: str) -> bool:
    """Whether weight decay applies: to matrices only, never to biases and LayerNorm gains. The name decides, because
    sharded engines flatten parameters."""
    return name.endswith(".weight") and not name.endswith("norm.weight")
