"""The micro-batches that a run can be cut into, and the one that `train.micro_batch: auto` means."""

import functools

from megagpt.config import Config
from megagpt.config_types import AUTO
from megagpt.planning.memory import peak_memory
from megagpt.planning.setting import vary

# Largest micro-batch that is tried (sequences).
_LARGEST = 4096
# Tokens in a CPU's micro-batch: its matrix products reach their full rate by then, and more would only take memory.
_CPU_TOKENS = 4096


def micro_batches(config: Config, ranks: int) -> list[int]:
    """The micro-batches that divide the batch over that many ranks, smallest first; empty if none does."""
    shares, apart = divmod(ranks, config.engine.tensor_ranks)
    each, rest = divmod(config.batch_sequences, max(1, shares))
    if apart or rest or not each:
        return []
    return _divisors(each)


@functools.lru_cache(maxsize=256)
def _divisors(number: int) -> list[int]:
    return [size for size in range(1, min(number, _LARGEST) + 1) if number % size == 0]


def with_micro_batch(config: Config, size: int) -> Config:
    """The same run, in micro-batches of `size` sequences."""
    return vary(config, train={"micro_batch": size})


def micro_batch_choices(config: Config, ranks: int, capacity: float) -> list[int]:
    """The micro-batches that divide the batch and fit a GPU of `capacity` bytes, the largest first. If none fits, the
    smallest one. Raises UserError if the ranks do not divide the batch."""
    config.sequences_of_a_rank(ranks)
    sizes = micro_batches(config, ranks)
    fits = [s for s in sizes if peak_memory(with_micro_batch(config, s), ranks).verdict(capacity) == "fits"]
    return sorted(fits, reverse=True) or sizes[:1]


def largest_micro_batch(config: Config, ranks: int, capacity: float | None) -> int:
    """The value of `train.micro_batch: auto` on GPUs of `capacity` bytes; None: on CPUs, the largest of at most 4,096
    tokens. It divides the batch. Raises UserError if the ranks do not."""
    if capacity is not None:
        return micro_batch_choices(config, ranks, capacity)[0]
    config.sequences_of_a_rank(ranks)
    most = max(1, _CPU_TOKENS // config.model.context)
    return max(size for size in micro_batches(config, ranks) if size <= most)


def resolved(config: Config, ranks: int, capacity: float | None) -> Config:
    """The config with a number for `train.micro_batch: auto`. Raises UserError if the ranks do not divide the batch."""
    if config.train.micro_batch != AUTO:
        return config
    return with_micro_batch(config, largest_micro_batch(config, ranks, capacity))
