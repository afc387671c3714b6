"""The process's place among its peers. The only room that reads launchers' environment variables."""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megagpt.errors import Reported, UserError, disk_error
from megagpt.hardware import keep_freed_memory

# Sets the upper bound on how long a rank waits for peers that never come.
_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """One process's rank, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum over all ranks, on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank, on every rank."""
        return self.sum(float(flag)) > 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join(device: str = "auto", tune_allocator: bool = True) -> Iterator[World]:
    """Join the process group that the launcher describes, and leave it at the end.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them this is a world of one.
    `tune_allocator` lets a process on a CPU keep the memory that it frees.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = [name for name in names if name in os.environ]
    launched = "RANK" in found or "WORLD_SIZE" in found
    if launched and len(found) < len(names):
        missing = ", ".join(name for name in names if name not in found)
        raise UserError(f"the launcher set {', '.join(found)} but not {missing}: start with torchrun, or set them all")
    rank, size, local_rank = (
        int(os.environ[n]) if launched else d for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    world = World(rank, size, local_rank, _device(device, local_rank))
    if world.device.type == "cpu" and tune_allocator:
        keep_freed_memory()
    if size == 1:
        yield world
        return
    on_gpu = world.device.type == "cuda"
    store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=_TIMEOUT)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=_TIMEOUT,
        store=store,
        rank=rank,
        world_size=size,
        device_id=world.device if on_gpu else None,
    )
    try:
        yield world
    except (UserError, OSError, RuntimeError) as error:
        known = disk_error(error) if isinstance(error, OSError) else error
        if not isinstance(known, UserError):
            # A peer that has reported an error and left breaks this rank's collectives: that is no error of its own.
            if _peers_reported(store):
                raise Reported from None
            raise
        # Most errors are seen by every rank: the first to count itself reports, and does so before any rank leaves,
        # because launchers kill the rest as soon as one has left.
        if store.add("megagpt/errors", 1) == 1:
            print(f"megagpt: error: [rank {rank} of {size}] {known}", file=sys.stderr, flush=True)
        raise Reported from None
    finally:
        dist.destroy_process_group()
        # gloo's threads may still hold a tensor; if the last reference falls while Python exits, the process aborts.
        time.sleep(0.2)


def _peers_reported(store: dist.Store) -> bool:
    try:
        return store.add("megagpt/errors", 0) > 0
    except RuntimeError:
        return False  # the store went with the rank that held it


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device is cuda, but PyTorch sees no GPU here; use train.device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank}, but only {torch.cuda.device_count()} GPUs here: start fewer ranks")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
