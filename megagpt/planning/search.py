"""The settings that a run can have on a cluster, planned and ranked; and the clusters that it can have."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

from megagpt.config import Config, EngineConfig
from megagpt.planning.gpus import Cluster
from megagpt.planning.plan import Plan, make_plan
from megagpt.planning.speed import Calibration

# Blocks of which one is computed again: what lies between the modes none and full.
_EVERY = (2, 3, 4)
# Largest micro-batch that is tried (sequences), and the largest number of GPUs.
_LARGEST_BATCH, _MOST_GPUS = 4096, 16_384
# Two speeds as near as this are the same for the prediction: the simpler setting is then the better one.
_SAME = 0.01
_ORDER = ("fits", "tight", "does not fit")


@dataclass(frozen=True)
class Search:
    """What is varied, and for whom."""

    config: Config
    price: float | None = None
    calibration: Calibration | None = None

    def plan(self, config: Config, cluster: Cluster) -> Plan:
        return make_plan(config, cluster, self.price, self.calibration)


def micro_batches(config: Config, ranks: int) -> list[int]:
    """The micro-batches that divide the batch over that many ranks, smallest first; empty if none does."""
    each, rest = divmod(config.batch_sequences, ranks)
    if rest or not each:
        return []
    return [size for size in range(1, min(each, _LARGEST_BATCH) + 1) if each % size == 0]


def engines(config: Config, cluster: Cluster) -> list[EngineConfig]:
    """The config's own engine, and each engine with each of its shardings; offload only if the config has it."""
    made: list[dict[str, Any]] = [{"name": "ddp"}]
    groups = [0, cluster.per_node] if cluster.gpus > cluster.per_node else [0]
    for group, reshard in itertools.product(groups, (True, False)):
        made.append({"name": "fsdp", "shard_ranks": group, "reshard_after_forward": reshard})
    made += [{"name": "zero", "stage": stage} for stage in (1, 2, 3)]
    own = config.engine
    others = [EngineConfig(**values) for values in made]
    if own.name == "fsdp" and own.shard_ranks == cluster.gpus:
        others = [replace(own, shard_ranks=0) if own == replace(other, shard_ranks=own.shard_ranks) else other
                  for other in others]  # fmt: skip
    return [own, *(other for other in others if other != own)]


def modes(config: Config) -> list[Any]:
    """Values of `train.activation_checkpointing`, the config's own first."""
    own = config.train.activation_checkpointing
    every = [{"every": k} for k in _EVERY if k < config.model.layers]
    return [own, *(mode for mode in ["none", "selective", *every, "full"] if mode != own)]
