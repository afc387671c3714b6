"""Bytes that ranks exchange in a step, by engine.

Weights travel in the compute precision, gradients in fp32. A gather or a scatter over N ranks sends (N - 1)/N of a
tensor, a sum of it twice as much (Patarasuk and Yuan 2009)."""

from typing import NamedTuple

from megagpt.config import Config

_FP32 = 4
# Elements in one of DDP's buckets: 25 MiB of fp32.
_DDP_BUCKET = 25 * 2**20 / _FP32


class Exchange(NamedTuple):
    """One kind of exchange."""

    name: str
    moved: float
    """Bytes that a rank sends, each time."""
    ranks: int
    """Ranks that share it: a whole copy's, or one of each copy."""
    calls: float
    """Gathers, scatters and sums of which it consists, each time."""
    each_micro_batch: bool
    """False: once a step, with its last micro-batch or after it."""
    is_sum: bool = False
    """Whether it is an all-reduce, for which NCCL has trees beside rings."""
    groups: int = 1
    """Groups of ranks that do the same at the same time, each with every `groups`-th rank."""


def exchanges(config: Config, ranks: int) -> list[Exchange]:
    """The exchanges of a rank, by kind; none on one rank."""
    engine, model = config.engine, config.model
    parameters, layers = model.stored_parameters, model.layers
    value = _FP32 if config.train.precision == "fp32" else 2
    share = (ranks - 1) / ranks
    if ranks == 1:
        return []
    if engine.name == "ddp":
        buckets = parameters / _DDP_BUCKET
        return [Exchange("gradients", 2 * share * _FP32 * parameters, ranks, buckets, False, is_sum=True)]
    if engine.name == "fsdp":
        return _fsdp(config, ranks, value)
    if engine.stage == 3:
        # DeepSpeed fetches the weights of each module by itself: six in a block, as its published speeds show.
        gathered = Exchange("weights", 2 * share * value * parameters, ranks, 2 * 6 * layers, True)
        return [gathered, Exchange("gradients", share * _FP32 * parameters, ranks, 6 * layers, True)]
    rounded = Exchange("weights", share * value * parameters, ranks, layers, False)
    if engine.stage == 2:
        return [Exchange("gradients", share * _FP32 * parameters, ranks, layers, True), rounded]
    # DeepSpeed's optimizer for bf16 sums on every rank.
    is_sum = config.train.precision == "bf16"
    sums = (2 if is_sum else 1) * share * _FP32 * parameters
    return [Exchange("gradients", sums, ranks, layers, False, is_sum=is_sum), rounded]


def exchanged_bytes(config: Config, ranks: int, micro_batches: float) -> float:
    """Bytes that a rank sends in a step."""
    return sum(e.moved * (micro_batches if e.each_micro_batch else 1) for e in exchanges(config, ranks))


def _fsdp(config: Config, ranks: int, value: int) -> list[Exchange]:
    model, shard = config.model, config.sharing_ranks(ranks)
    parameters, layers = model.stored_parameters, model.layers
    copies, inside = ranks // shard, (shard - 1) / shard
    twice = config.engine.reshard_after_forward
    gathered = parameters + (layers * model.block_parameters if twice else 0)
    found = []
    if shard > 1:
        found.append(Exchange("weights", inside * value * gathered, shard, (2 if twice else 1) * layers, True))
        found.append(Exchange("gradients", inside * _FP32 * parameters, shard, layers, True))
    if copies > 1:
        moved = 2 * (copies - 1) / copies * _FP32 * parameters / shard
        found.append(Exchange("copies", moved, copies, layers, False, is_sum=True, groups=shard))
    return found
