"""The check before a run starts: whether it fits its GPUs, and the micro-batch that `train.micro_batch: auto` means."""

from dataclasses import dataclass

from megagpt.config import Config
from megagpt.config_types import AUTO
from megagpt.errors import UserError
from megagpt.planning.memory import Memory, peak_memory
from megagpt.planning.search import micro_batches
from megagpt.planning.setting import vary
from megagpt.planning.way_out import way_out

# Tokens in a CPU's micro-batch: its matrix products reach their full rate by then, and more would only take memory.
_CPU_TOKENS = 4096


@dataclass(frozen=True)
class Fit:
    """A run that a GPU's memory can hold."""

    memory: Memory
    sentence: str
    """The memory that each GPU needs."""
    warning: str
    """Why it may run out of memory all the same; empty if there is room."""


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
    most = max(1, _CPU_TOKENS // config.model.context)
    each = config.sequences_of_a_rank(ranks)
    return max(size for size in range(1, min(most, each) + 1) if each % size == 0)


def resolved(config: Config, ranks: int, capacity: float | None) -> Config:
    """The config with a number for `train.micro_batch: auto`."""
    if config.train.micro_batch != AUTO:
        return config
    return with_micro_batch(config, largest_micro_batch(config, ranks, capacity))


def check_fit(config: Config, ranks: int, capacity: float, card: str = "") -> Fit:
    """The memory of a run on GPUs of `capacity` bytes. Raises UserError if the ranks do not divide the batch, and if the
    run does not fit, with the smallest change that makes it fit. `card`: the GPU's name, for people."""
    config.check_ranks(ranks)
    wanted, config = config, resolved(config, ranks, capacity)
    memory = peak_memory(config, ranks)
    verdict = memory.verdict(capacity)
    needs = f"{gigabytes(memory.total)} at the peak, {memory.moment}"
    sentence = f"each GPU needs {needs}, and has {gigabytes(capacity)}"
    if verdict == "fits":
        return Fit(memory, sentence, "")
    found = way_out(wanted, ranks, capacity)
    if verdict == "tight":
        beside = f"CUDA and the allocator may need {gigabytes(memory.reserve)} besides"
        way = f"; if memory runs out: {found}" if found else ""
        return Fit(memory, sentence, f"memory is tight: {sentence}, and {beside}{way}")
    way = found or "no setting of this code makes it fit: take GPUs with more memory"
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in memory.parts.items() if size)
    where = f"{ranks} GPU(s) of {gigabytes(capacity)}{f' ({card})' if card else ''}"
    raise UserError(f"{config.run.name} does not fit on {where}: each needs {needs} ({parts}); {way}")


def gigabytes(size: float) -> str:
    """Bytes for people, in GB of 1e9, as makers count."""
    return f"{size / 1e9:,.1f} GB"
