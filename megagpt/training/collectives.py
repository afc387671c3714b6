"""The collectives of a rank by PyTorch's flight recorder, and the ranks for which others wait in one."""

import contextlib
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from megagpt.checkpoints.saving import SAVES

# Ranks that a sentence names.
_NAMED = 8


class Collectives(NamedTuple):
    """One rank's collectives in one process group."""

    joined: int
    """The number of the last one that this rank has joined; they are counted from 1, in each group by itself."""
    waits: int
    """The number of the first one that has not ended on this rank; 0 if all have."""
    name: str
    """Of that one, such as all_gather; empty if all have ended."""
    ranks: list[int]
    """The group's; empty if they are unknown."""


def flight_recorder(device: str) -> bytes:
    """PyTorch's record of this rank's last collectives, a pickle; empty if it has none. The functions' names and what
    they record differ between versions and builds."""
    names = ("_dump_nccl_trace", "_dump_fr_trace")
    for name in names if device == "cuda" else reversed(names):
        if dist.is_initialized() and hasattr(c10d, name):
            trace = bytes(getattr(c10d, name)())
            if trace and pickle.loads(trace).get("entries"):
                return trace
    return b""


def read_collectives(trace: bytes) -> dict[str, Collectives]:
    """This rank's collectives by the name of their process group, from a trace of `flight_recorder`. Those of saves in
    the background are left out: ranks come to them at any time."""
    found: dict[str, Collectives] = {}
    for entry in pickle.loads(trace)["entries"] if trace else ():
        group, description = entry["process_group"]
        if description == SAVES or entry["is_p2p"]:
            continue
        last, number = found.get(group) or Collectives(0, 0, "", _ranks_of(group)), entry["collective_seq_id"]
        if not last.waits and not entry["retired"]:
            last = last._replace(waits=number, name=entry["profiling_name"].rpartition(":")[2])
        found[group] = last._replace(joined=number)
    return found


def _ranks_of(group: str) -> list[int]:
    resolve: Any = c10d._resolve_process_group
    with contextlib.suppress(Exception):  # PyTorch may name it differently in its record
        return dist.get_process_group_ranks(resolve(group))
    return []


def say_who_is_missing(ranks: Mapping[int, Mapping[str, Collectives]]) -> list[str]:
    """Sentences about the ranks for which others wait in a collective, while they wait for nobody. `ranks`: the
    collectives of each rank, by process group."""
    missing: dict[int, Collectives] = {}
    waiting: set[int] = set()
    for rank, groups in ranks.items():
        for group, own in groups.items():
            late = [
                other for other in own.ranks
                if other in ranks and (ranks[other][group].joined if group in ranks[other] else 0) < own.waits
            ]  # fmt: skip
            if late:
                waiting.add(rank)
                # The smallest group says most about the place.
                missing |= {other: min(missing.get(other, own), own, key=lambda c: len(c.ranks)) for other in late}
    causes = sorted(missing.keys() - waiting) or sorted(missing)
    return [f"rank {rank} has not joined {_words(missing[rank])}" for rank in causes[:_NAMED]]


def _words(collective: Collectives) -> str:
    ranks = ", ".join(map(str, collective.ranks[:_NAMED])) + (", ..." if len(collective.ranks) > _NAMED else "")
    return f"{collective.name} {collective.waits} of ranks {ranks}"
