"""The settings that a run can have on a cluster, planned and ranked; and the clusters that it can have."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megagpt.config import Config, EngineConfig
from megagpt.planning.gpus import Cluster
from megagpt.planning.memory import peak_memory
from megagpt.planning.micro_batch import micro_batches
from megagpt.planning.plan import Plan
from megagpt.planning.setting import is_same, overrides, tensor_sizes, vary

# Blocks of which one is computed again: what lies between the modes none and full.
_EVERY = (2, 3, 4)
# Largest number of GPUs that is tried.
_MOST_GPUS = 16_384
# Micro-batches that are planned of each engine and mode: the largest are not always the fastest.
_TRIED = 2
# Two speeds as near as this are the same for the prediction: the simpler setting is then the better one.
_SAME = 0.01
_ORDER = ("fits", "tight", "does not fit")
Planner = Callable[[Config, Cluster], Plan]
"""Plans a config on a cluster: `make_plan` with a price and a calibration."""


def engines(config: Config, cluster: Cluster) -> list[EngineConfig]:
    """The config's own engine, and each engine with each of its shardings, without tensor ranks; offload only if the
    config has it."""
    own, gpus = config.engine, cluster.gpus
    others = [EngineConfig("ddp"), *_sharded(cluster, 1)]
    if own.shard_ranks == gpus:  # one group of all is the same as 0
        others = [other for other in others if other != replace(own, shard_ranks=0)]
    possible = [] if own.shard_ranks and gpus % own.shard_ranks else [own]
    return [*possible, *(other for other in others if other != own)]


def _sharded(cluster: Cluster, tensor_ranks: int) -> list[EngineConfig]:
    """Every sharding."""
    groups = [0, cluster.per_node] if cluster.gpus > cluster.per_node else [0]
    made: list[dict[str, Any]] = [
        {"name": "fsdp", "shard_ranks": group, "reshard_after_forward": reshard}
        for group, reshard in itertools.product(groups, (True, False))
    ]
    made += [{"name": "zero", "stage": stage} for stage in (1, 2, 3)]
    return [EngineConfig(**values, tensor_ranks=tensor_ranks) for values in made]


def modes(config: Config, every: Sequence[int] = _EVERY) -> list[Any]:
    """Values of `train.activation_checkpointing`, the config's own first. `every`: for its form {every: k}."""
    own = config.train.activation_checkpointing
    some = [{"every": k} for k in every if k < config.model.layers]
    return [own, *(mode for mode in ["none", "selective", *some, "full"] if mode != own)]


def search(
    config: Config, cluster: Cluster, planner: Planner, thorough: bool = False, quick: bool = False, whole: bool = False
) -> list[Plan]:
    """Plans of the settings that divide, the best first: those that fit, by time; then the tight ones; then those that
    do not fit, by memory. Of each engine, sharding and mode it has the micro-batches that may be the fastest: the
    largest that fit, and the config's own. `thorough`: every one up to the first that does not fit. `quick`: without
    settings that do not fit, and with fewer modes. Tensor ranks that the config does not have are left out where their
    products and exchanges alone take longer than the fastest plan, unless `whole` or `thorough`."""
    every = _EVERY[:1] if quick else _EVERY
    plans: list[Plan] = []

    def add(engine: EngineConfig, mode: Any, fitting: bool) -> None:
        tried = _Tried(vary(config, engine=vars(engine), train={"activation_checkpointing": mode}), cluster)
        sizes = micro_batches(tried.config, cluster.gpus)
        if fitting and not (sizes and tried.has_room(sizes[0])):
            return
        most = tried.count_of_fitting(sizes)
        chosen = set(sizes[: most + 1] if thorough else sizes[max(0, most - _TRIED) : max(1, most)])
        chosen |= {size for size in sizes if size == config.train.micro_batch}
        plans.extend(planner(tried.at(size), cluster) for size in sorted(chosen))

    for engine, mode in itertools.product(engines(config, cluster), modes(config, every)):
        add(engine, mode, fitting=quick)
    for size, mode in itertools.product(tensor_sizes(config, cluster.per_node), modes(config, every)):
        best = min((plan.seconds for plan in plans if plan.verdict == "fits"), default=math.inf)
        if thorough or whole or _least_seconds(config, cluster, planner, size, mode) < best:
            for engine in _sharded(cluster, size):
                if engine != config.engine:
                    add(engine, mode, fitting=best < math.inf)
    return sorted(plans, key=_place)


def _least_seconds(config: Config, cluster: Cluster, planner: Planner, tensor_ranks: int, mode: Any) -> float:
    """A run's time with tensor ranks if it had memory for any micro-batch, and no other exchange took time."""
    engine = vars(EngineConfig("fsdp", tensor_ranks=tensor_ranks))
    tried = _Tried(vary(config, engine=engine, train={"activation_checkpointing": mode}), cluster)
    sizes, least = micro_batches(tried.config, cluster.gpus), math.inf
    # A single sequence needs no copies, and the largest micro-batch has the fewest calls.
    for size in {*sizes[:1], *sizes[-1:]}:
        speed = planner(tried.at(size), cluster).speed
        least = min(least, speed.step - speed.seconds["exchange"])
    return least * config.total_sequences / config.batch_sequences


def own_plan(plans: Iterable[Plan], config: Config) -> Plan | None:
    """The plan with the config's own setting; of an automatic micro-batch, the largest that fits. None if there is no
    such plan, because its micro-batch does not divide."""
    same = [plan for plan in plans if is_same(plan.config, config)]
    fitting = [plan for plan in same if plan.verdict == "fits"]
    if fitting:
        return max(fitting, key=lambda plan: plan.config.micro_batch)
    return min(same, key=lambda plan: plan.config.micro_batch, default=None)


def recommend(plans: Sequence[Plan], config: Config) -> Plan | None:
    """The fastest plan that fits, or a tight one if none fits; None if none does. Of those that are as fast, it is the
    config's own, or else the one with the fewest changed keys, the simplest engine and the most memory to spare."""
    possible = sorted((plan for plan in plans if plan.verdict != "does not fit"), key=_place)
    if not possible:
        return None
    best, own = possible[0], own_plan(plans, config)
    near = [p for p in possible if p.verdict == best.verdict and p.seconds <= best.seconds * (1 + _SAME)]
    return min(
        near, key=lambda p: (p is not own, len(overrides(config, p.config)), _simplicity(p.config.engine), -p.spare)
    )


@dataclass(frozen=True)
class Clusters:
    """Clusters of one kind of GPU for a run, each with its best setting."""

    plans: list[Plan]
    """The best plan on each number of GPUs that divides the batch and has room, fewest GPUs first."""
    own: list[Plan]
    """Plans with the config's own setting, for the numbers of GPUs that it divides, fewest GPUs first."""

    @property
    def smallest(self) -> Plan | None:
        """The plan on the fewest GPUs."""
        return next(iter(self._roomy()), None)

    @property
    def cheapest(self) -> Plan | None:
        """The plan with the fewest GPU-hours."""
        return min(self._roomy(), key=lambda plan: plan.gpu_hours, default=None)

    @property
    def fastest(self) -> Plan | None:
        return min(self._roomy(), key=lambda plan: plan.seconds, default=None)

    def in_time(self, days: float) -> Plan | None:
        """The plan on the fewest GPUs with which the run takes at most `days`."""
        return next((plan for plan in self._roomy() if plan.days <= days), None)

    def _roomy(self) -> Sequence[Plan]:
        """Those that fit; the tight ones if none does."""
        return [plan for plan in self.plans if plan.verdict == "fits"] or self.plans


def find_clusters(config: Config, like: Cluster, planner: Planner) -> Clusters:
    """Plan the run on every number of GPUs that divides its batch: on a part of a node, then on whole nodes. `like`: a
    cluster with the GPU, the size of a node and the network."""
    found, own = [], []
    for gpus in gpu_counts(config, like.per_node):
        plans = search(config, replace(like, gpus=gpus, per_node=min(gpus, like.per_node)), planner, quick=True)
        best, same = recommend(plans, config), own_plan(plans, config)
        found += [best] if best else []
        own += [same] if same else []
    return Clusters(found, own)


def gpu_counts(config: Config, per_node: int) -> list[int]:
    """Numbers of GPUs over which the batch can be divided, fewest first."""
    groups = {1, config.engine.tensor_ranks, *tensor_sizes(config, per_node)}
    most = min(config.batch_sequences * max(groups), _MOST_GPUS)
    counts = [*range(1, min(per_node, most + 1)), *range(per_node, most + 1, per_node)]
    sequences = config.batch_sequences
    return [n for n in counts if any(n % group == 0 and sequences % (n // group) == 0 for group in groups)]


@dataclass(frozen=True)
class _Tried:
    """An engine and a mode, with any micro-batch."""

    config: Config
    cluster: Cluster

    def at(self, size: int) -> Config:
        return vary(self.config, train={"micro_batch": size})

    def has_room(self, size: int) -> bool:
        """Whether it fits at all, if only tightly."""
        return peak_memory(self.at(size), self.cluster.gpus).total <= self.cluster.gpu.memory

    def count_of_fitting(self, sizes: Sequence[int]) -> int:
        """How many of the sizes, which are in order, fit."""

        def too_large(size: int) -> bool:
            memory = peak_memory(self.at(size), self.cluster.gpus)
            return memory.verdict(self.cluster.gpu.memory) != "fits"

        return bisect_left(sizes, True, key=too_large)


def _place(plan: Plan) -> tuple[int, float, float]:
    order = _ORDER.index(plan.verdict)
    if plan.verdict == "does not fit":  # what needs least is the nearest to fitting
        return order, plan.memory.total, plan.seconds
    return order, plan.seconds, plan.memory.total


def _simplicity(engine: EngineConfig) -> tuple[int, int, int, bool]:
    name = ("ddp", "fsdp", "zero").index(engine.name)
    return engine.tensor_ranks, name, engine.shard_ranks, not engine.reshard_after_forward
