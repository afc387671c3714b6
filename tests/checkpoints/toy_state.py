"""A toy state and its checkpoints: three small tensors, whose values tell which save wrote them."""

import dataclasses

import torch

from megagpt.checkpoints.checkpoint import Checkpoint, CheckpointMeta
from megagpt.checkpoints.loading import read_weights
from megagpt.checkpoints.saving import Saver
from megagpt.config_file import build_config
from megagpt.engines.engine import Replica
from megagpt.engines.flat_shard import FlatShard
from megagpt.errors import ExpectedError
from megagpt.world import World

CONFIG = build_config(
    {"model": {"layers": 1, "width": 8, "heads": 1, "context": 4}, "train": {"batch_tokens": 8, "tokens": 800}}, "test"
)
ALONE = World.alone()
SHAPES = {"model.matrix": (3, 5), "model.vector": (7,), "exp_avg.matrix": (3, 5)}


def state_of(value: float) -> dict[str, FlatShard]:
    return {
        key: FlatShard(torch.arange(torch.Size(shape).numel()) + torch.tensor(value), shape, 0)
        for key, shape in SHAPES.items()
    }


WHOLE = Replica(0, 1)


def meta(step: int, milestone: bool = False) -> CheckpointMeta:
    """One sequence of 4 tokens in each step."""
    config = dataclasses.asdict(CONFIG)
    return CheckpointMeta(4 * step, step, step, "test", 1, config, [], {"updates": step}, milestone)


def is_complete(checkpoint: Checkpoint) -> bool:
    try:
        return bool(checkpoint.open())
    except (ExpectedError, OSError):
        return False


def save(saver: Saver, step: int, milestone: bool = False) -> None:
    saver.save(state_of(step), WHOLE, meta(step, milestone))


def saved_value(checkpoint: Checkpoint) -> float:
    return float(read_weights(checkpoint.open(), {"vector": (7,)})["vector"][0])
