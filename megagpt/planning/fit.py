"""The check before a run starts: whether it fits its GPUs, and if not, what would make it fit."""

from dataclasses import dataclass

from megagpt.config import Config
from megagpt.errors import UserError
from megagpt.planning.amounts import gigabytes
from megagpt.planning.memory import Memory, peak_memory
from megagpt.planning.micro_batch import resolved
from megagpt.planning.way_out import way_out


@dataclass(frozen=True)
class Fit:
    """A run that a GPU's memory can hold."""

    memory: Memory
    sentence: str
    """The memory that each GPU needs."""
    warning: str
    """Why it may run out of memory all the same; empty if there is room."""


def check_fit(config: Config, ranks: int, capacity: float, card: str = "", per_node: int = 1) -> Fit:
    """The memory of a run on GPUs of `capacity` bytes. Raises UserError if the ranks do not divide the batch, and with
    the smallest change that helps if the run does not fit. `card`: the GPU's name, for people. `per_node`: GPUs of a
    node, which hold whole groups of tensor ranks."""
    config.check_ranks(ranks)
    wanted, config = config, resolved(config, ranks, capacity)
    memory = peak_memory(config, ranks)
    verdict = memory.verdict(capacity)
    needs = f"{gigabytes(memory.total)} GB at the peak, {memory.moment}"
    sentence = f"each GPU needs {needs}, and has {gigabytes(capacity)} GB"
    if verdict == "fits":
        return Fit(memory, sentence, "")
    found = way_out(wanted, ranks, capacity, per_node)
    if verdict == "tight":
        beside = f"CUDA and the allocator may need {gigabytes(memory.reserve)} GB besides"
        way = f"; if memory runs out: {found}" if found else ""
        return Fit(memory, sentence, f"memory is tight: {sentence}, and {beside}{way}")
    way = found or "no setting of this code makes it fit: take GPUs with more memory"
    parts = ", ".join(f"{name} {gigabytes(size)} GB" for name, size in memory.parts.items() if size)
    where = f"{ranks} GPU(s) of {gigabytes(capacity)} GB{f' ({card})' if card else ''}"
    raise UserError(f"{config.run.name} does not fit on {where}: each needs {needs} ({parts}); {way}")
