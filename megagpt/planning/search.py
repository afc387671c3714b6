"""The settings that a run can have on a cluster, planned and ranked; and the clusters that it can have."""

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from megagpt.config import Config, EngineConfig
from megagpt.planning.gpus import Cluster
from megagpt.planning.memory import peak_memory
from megagpt.planning.micro_batch import micro_batches
from megagpt.planning.plan import Plan, Planner
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


def engines(config: Config, cluster: Cluster) -> list[EngineConfig]:
    """The config's own engine if it can start there, and each engine with each of its shardings, without tensor ranks;
    offload only if the config has it."""
    own, gpus = config.engine, cluster.gpus
    others = [EngineConfig("ddp"), *_sharded(cluster, 1)]
    if own.shard_ranks == gpus:  # one group of all is the same as 0
        others = [other for other in others if other != replace(own, shard_ranks=0)]
    divides = gpus % (own.shard_ranks or 1) == cluster.per_node % own.tensor_ranks == 0
    possible = [own] if divides else []
    return [*possible, *(other for other in others if other != own)]


def _split(config: Config, cluster: Cluster) -> list[EngineConfig]:
    """Each sharding with each number of tensor ranks, the config's own engine left out."""
    sizes = tensor_sizes(config, cluster.per_node)
    return [engine for size in sizes for engine in _sharded(cluster, size) if engine != config.engine]


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
    largest that fit, with tensor ranks the smallest, and the config's own. `thorough`: every one up to the first that
    does not fit.

    Tensor ranks that the config does not have are left out if they would be slower than the fastest plan even with the
    best of all micro-batches, whether that fits or not; but not if `whole` or `thorough`. `quick`: so are all other
    settings; with fewer modes, and tensor ranks under FSDP and the config's engine only."""
    every = _EVERY[:1] if quick else _EVERY
    split = [e for e in _split(config, cluster) if not quick or e.name in ("fsdp", config.engine.name)]
    pairs = itertools.product([*engines(config, cluster), *split], modes(config, every))
    settings = [_Tried(vary(config, engine=vars(e), train={"activation_checkpointing": m}), cluster) for e, m in pairs]
    plans: list[Plan] = []
    fastest = math.inf

    def add(tried: _Tried, fitting: bool) -> None:
        nonlocal fastest
        if fitting and not (tried.sizes and tried.has_room(tried.sizes[0])):
            return
        sizes, most = tried.sizes, tried.count_of_fitting()
        chosen = set(sizes[: most + 1] if thorough else sizes[max(0, most - _TRIED) : max(1, most)])
        chosen |= {size for size in sizes if size == config.train.micro_batch}
        if most and tried.config.engine.tensor_ranks > 1:  # which need no copies of single sequences
            chosen.add(sizes[0])
        new = [planner.plan(tried.at(size), cluster) for size in sorted(chosen)]
        plans.extend(new)
        fastest = min([fastest, *(plan.seconds for plan in new if plan.verdict == "fits")])

    def is_sure(tried: _Tried) -> bool:
        engine = tried.config.engine
        if quick:
            return is_same(vary(tried.config, train={"micro_batch": config.train.micro_batch}), config)
        return thorough or whole or engine.tensor_ranks == 1 or engine == config.engine

    for tried in filter(is_sure, settings):
        add(tried, fitting=quick)
    others = [tried for tried in settings if not is_sure(tried)]
    if fastest == math.inf and not quick:  # then what needs least memory is of interest, too
        for tried in others:
            add(tried, fitting=False)
        return sorted(plans, key=_place)
    # First by the computation, which engines have in common, then by the whole step.
    alike = itertools.groupby(sorted(others, key=_computation), key=_computation)
    groups = [list(group) for _, group in alike]
    bounds = [(group[0].least_seconds(planner, group[0].sizes, alone=True), group) for group in groups]
    for computing, group in sorted(bounds, key=itemgetter(0)):
        for tried in group:
            limit = (1 + _SAME) * fastest
            if computing < limit and tried.may_take_less(limit, planner):
                add(tried, fitting=True)
    return sorted(plans, key=_place)


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
    groups = {1, *tensor_sizes(config, per_node)}
    most = min(config.batch_sequences * max(groups), _MOST_GPUS)
    counts = [*range(1, min(per_node, most + 1)), *range(per_node, most + 1, per_node)]
    sequences = config.batch_sequences
    return [n for n in counts if any(n % group == 0 and sequences % (n // group) == 0 for group in groups)]


@dataclass(frozen=True)
class _Tried:
    """An engine and a mode, with any micro-batch."""

    config: Config
    cluster: Cluster

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Micro-batches that divide the batch."""
        return micro_batches(self.config, self.cluster.gpus)

    def at(self, size: int) -> Config:
        return vary(self.config, train={"micro_batch": size})

    def least_seconds(self, planner: Planner, sizes: Sequence[int], alone: bool = False) -> float:
        """A bound of the run's time from below with these micro-batches, whether they fit or not; infinite without any.
        Larger ones are faster, but for single sequences, of which tensor ranks need no copies. `alone`: as in
        `Planner`."""
        some = {*sizes[-1:], *(sizes[:1] if self.config.engine.tensor_ranks > 1 else [])}
        return min((planner.least_seconds(self.at(size), self.cluster, alone) for size in some), default=math.inf)

    def may_take_less(self, seconds: float, planner: Planner) -> bool:
        """Whether some micro-batch could take less time, of which the smallest has room."""
        if self.least_seconds(planner, self.sizes) >= seconds:
            return False
        if self.least_seconds(planner, self.sizes[:1]) < seconds:
            return self.has_room(self.sizes[0])
        enough = bisect_left(self.sizes, True, key=lambda size: self.least_seconds(planner, [size]) < seconds)
        return self.has_room(self.sizes[enough])

    def has_room(self, size: int) -> bool:
        """Whether it fits at all, if only tightly."""
        return peak_memory(self.at(size), self.cluster.gpus).total <= self.cluster.gpu.memory

    def count_of_fitting(self) -> int:
        """How many of the sizes, which are in order, fit."""

        def too_large(size: int) -> bool:
            memory = peak_memory(self.at(size), self.cluster.gpus)
            return memory.verdict(self.cluster.gpu.memory) != "fits"

        return bisect_left(self.sizes, True, key=too_large)


def _computation(tried: _Tried) -> tuple[int, str]:
    return tried.config.engine.tensor_ranks, str(tried.config.train.activation_checkpointing)


def _place(plan: Plan) -> tuple[int, float, float]:
    order = _ORDER.index(plan.verdict)
    if plan.verdict == "does not fit":  # what needs least is the nearest to fitting
        return order, plan.memory.total, plan.seconds
    return order, plan.seconds, plan.memory.total


def _simplicity(engine: EngineConfig) -> tuple[int, int, int, bool]:
    name = ("ddp", "fsdp", "zero").index(engine.name)
    return engine.tensor_ranks, name, engine.shard_ranks, not engine.reshard_after_forward
