"""The smallest change that makes a run fit its GPUs. Each change leaves the run the same: none touches the batch, the
order of the data or the schedule."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megagpt.config import Config, EngineConfig
from megagpt.config_checks import contradictions
from megagpt.config_types import AUTO
from megagpt.errors import UserError
from megagpt.planning.memory import peak_memory
from megagpt.planning.micro_batch import micro_batches
from megagpt.planning.setting import overrides, tensor_sizes, vary
from megagpt.planning.state import gpu_state_bytes, state_bytes

# Doublings of the number of GPUs that are tried.
_DOUBLINGS = 12


class _Place(NamedTuple):
    config: Config
    ranks: int
    per_node: int


# A kind of change: the places to which one change of that kind leads, the smallest change first.
_Change = Callable[[_Place], Iterator[_Place]]


def way_out(config: Config, ranks: int, capacity: float, per_node: int = 1) -> str:
    """Settings with which the run fits GPUs of `capacity` bytes, as advice with overrides; empty if nothing that is
    tried helps. Of several, the one that changes fewest kinds of settings, in this order: a smaller micro-batch,
    activation checkpointing, sharding, tensor ranks, offload, more GPUs. `config`: its micro-batch may be auto.
    `per_node`: GPUs of a node, which hold whole groups of tensor ranks."""
    for wanted in ("fits", "tight"):
        for place in _places(_Place(config, ranks, per_node)):
            if peak_memory(place.config, place.ranks).verdict(capacity) == wanted:
                return _order(config, ranks, place)
    return ""


def _places(start: _Place) -> Iterator[_Place]:
    """All combinations of changes that can run, those of the fewest kinds first."""
    kinds: tuple[_Change, ...] = (_smaller, _recomputing, _sharded, _split, _offloaded, _more_gpus)
    for count in range(1, len(kinds) + 1):
        for chosen in itertools.combinations(kinds, count):
            # The micro-batch comes last: the largest that fits depends on all else.
            for place in _changed(start, sorted(chosen, key=lambda kind: kind is _smaller)):
                if _runs(place):
                    yield place


def _changed(place: _Place, kinds: list[_Change]) -> Iterator[_Place]:
    if not kinds:
        yield from ([place] if place.config.train.micro_batch != AUTO else _smaller(place))
        return
    for other in kinds[0](place):
        yield from _changed(other, kinds[1:])


def _runs(place: _Place) -> bool:
    try:
        place.config.check_ranks(place.ranks)
    except UserError:
        return False
    return not any(contradictions(place.config))


def _smaller(place: _Place) -> Iterator[_Place]:
    now = place.config.train.micro_batch
    for size in reversed(micro_batches(place.config, place.ranks)):
        if now == AUTO or size < now:
            yield place._replace(config=vary(place.config, train={"micro_batch": size}))


def _recomputing(place: _Place) -> Iterator[_Place]:
    now = place.config.train.activation_checkpointing
    stronger = {"none": ("selective", "full"), "full": ()}.get(str(now), ("full",))
    for mode in stronger:
        yield place._replace(config=vary(place.config, train={"activation_checkpointing": mode}))


def _sharded(place: _Place) -> Iterator[_Place]:
    engine = place.config.engine
    if engine.name == "ddp":
        yield place._replace(config=vary(place.config, engine=vars(EngineConfig(name="fsdp"))))
    if engine.name == "zero":
        for stage in range(engine.stage + 1, 4):
            yield place._replace(config=vary(place.config, engine={"stage": stage}))
    if engine.name == "fsdp" and not engine.reshard_after_forward:
        yield place._replace(config=vary(place.config, engine={"reshard_after_forward": True}))
    if engine.name == "fsdp" and place.config.sharing_ranks(place.ranks) < place.ranks:
        yield place._replace(config=vary(place.config, engine={"shard_ranks": 0, "reshard_after_forward": True}))


def _split(place: _Place) -> Iterator[_Place]:
    now = place.config.engine.tensor_ranks
    for size in tensor_sizes(place.config, place.per_node):
        if size > now:
            yield place._replace(config=vary(place.config, engine={"tensor_ranks": size}))


def _offloaded(place: _Place) -> Iterator[_Place]:
    now, values = place.config.engine.offload, ("none", "optimizer", "all")
    for value in values[values.index(now) + 1 :]:
        yield place._replace(config=vary(place.config, engine={"offload": value}))


def _more_gpus(place: _Place) -> Iterator[_Place]:
    for power in range(1, _DOUBLINGS + 1):
        more = place._replace(ranks=place.ranks * 2**power)
        if more.ranks <= place.config.batch_sequences * place.config.engine.tensor_ranks:
            yield more


def _order(config: Config, ranks: int, place: _Place) -> str:
    """The changes as an order to the user."""
    own = config.train.micro_batch == AUTO
    wanted = vary(place.config, train={"micro_batch": AUTO}) if own else place.config
    words = overrides(config, wanted)
    sets = [f"set {' '.join(words)}"] if words else []
    takes = [f"take {place.ranks} GPUs"] if place.ranks != ranks else []
    order = " and ".join(sets + takes)
    if place.config.engine.offload == config.engine.offload or place.config.engine.nvme_path:
        return order
    moved = state_bytes(place.config, place.ranks).total - gpu_state_bytes(place.config, place.ranks).total
    return f"{order}, which takes {moved / 1e9:,.1f} GB of host memory for each GPU"
