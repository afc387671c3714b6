"""The ranks of a run: joining and leaving the process group, and small collectives."""

import contextlib
import datetime
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from megagpt import console, launchers
from megagpt.errors import Reported, UserError
from megagpt.failures import failure, follow_failed_peers, leave_record, report
from megagpt.launchers import RankInfo
from megagpt.process_memory import keep_freed_memory

# Longest time that a rank waits for peers.
_TIMEOUT = datetime.timedelta(minutes=30)
_REMEMBERED_COLLECTIVES = 2000
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process's rank, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None
    """Keys and values that all ranks share; None in a world of one that was not joined."""

    @property
    def host(self) -> str:
        """This machine's name."""
        return platform.node()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @staticmethod
    def alone(device: str = "cpu") -> "World":
        """One process that has joined nothing."""
        return World(0, 1, 0, torch.device(device))

    def sum(self, value: float) -> float:
        """The sum over all ranks, on every rank."""
        return self._reduce([value], dist.ReduceOp.SUM)[0]

    def _reduce(self, values: list[float], operation: Any) -> list[float]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def max(self, value: float) -> float:
        """The largest of all ranks' values, on every rank."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def any(self, flag: bool) -> bool:
        """Whether some rank sets the flag; every rank gets the same answer."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag, whether some rank sets it, in one exchange; every rank gets the same answers."""
        return [value > 0 for value in self._reduce(list(map(float, flags)), dist.ReduceOp.MAX)]

    def from_main(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Call the function on the main rank only; every rank returns its result, or raises its error."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, group=group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's values, by rank, on every rank."""
        if self.size == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        every = torch.empty(self.size * len(values), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(every, mine)
        return every.view(self.size, len(values)).tolist()

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def hosts(self) -> list[str]:
        """The machine of each rank."""
        return self.gather_objects(self.host)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join(device: str = "auto", tune_allocator: bool = True, hang_timeout: float = 0) -> Iterator[World]:
    """Join the process group that the launcher describes, and leave it at the end. `say` prints on the main rank only.
    `tune_allocator` lets a process on a CPU keep the memory that it frees. An error on any rank ends all of them within
    seconds, printed once, with the rank. `hang_timeout`: seconds after which a Watchdog ends ranks that hang; the
    process group waits longer than that. Raises UserError for an incomplete or impossible environment."""
    info = launchers.find_rank(os.environ)
    try:
        world = World(info.rank, info.size, info.local_rank, _device(device, info.local_rank))
    except UserError as error:
        fail_together(error)
    if world.device.type == "cpu" and tune_allocator:
        keep_freed_memory()
    store, watched = (_connect(info), None) if world.size == 1 else _meet(info)
    world = replace(world, store=store)
    timeout = max(_TIMEOUT, datetime.timedelta(seconds=hang_timeout + 60))
    left = threading.Event()
    if watched is not None:
        threading.Thread(target=follow_failed_peers, args=(watched, left), daemon=True).start()
    try:
        with console.voice(silent=not world.is_main):
            # The flight recorder shows which collective hangs.
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_REMEMBERED_COLLECTIVES))
            on_gpu = world.device.type == "cuda"
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout, store=store, rank=world.rank,
                world_size=world.size, device_id=world.device if on_gpu else None,
            )  # fmt: skip
            yield world
            # The rank that holds the store must not leave first: its peers would take its exit for a failure.
            world.barrier()
    except Exception as error:
        if world.size == 1:
            leave_record(failure(error, 0))
            raise
        report(error, info.rank, info.size, store)
        raise Reported from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # gloo's threads may still hold a tensor; if the last reference falls while Python exits, the process aborts.
        time.sleep(0.2)
        left.set()


def fail_together(error: UserError) -> NoReturn:
    """Raise an error that came before `join`, perhaps on every rank, so that it is printed once and ends them all."""
    info = launchers.find_rank(os.environ)
    if info.size == 1:
        leave_record(failure(error, 0))
        raise error
    report(error, info.rank, info.size, _connect(info))
    raise Reported from None


def _connect(info: RankInfo) -> dist.Store:
    if info.size == 1:
        return dist.HashStore()
    # torchrun's agents hold the store for their workers, and say so in the environment.
    url = "env://" if launchers.started_by_torchrun(os.environ) else f"tcp://{info.address}:{info.port}"
    store: dist.Store
    store, _, _ = next(iter(dist.rendezvous(url, info.rank, info.size, timeout=_TIMEOUT)))
    return store


def _meet(info: RankInfo) -> tuple[dist.Store, dist.Store]:
    """The ranks' store, and a second connection to it for the thread that watches for failed peers. A rank that waits
    for a peer blocks every user of its connection. The second connection is made before the ranks meet: the rank that
    holds the store may fail and leave right after that, and a later connection would wait until the timeout."""
    if info.rank == 0 or launchers.started_by_torchrun(os.environ):  # the holder outlives the connection
        store = _connect(info)
        return store, store.clone()  # type: ignore[attr-defined]
    watched = dist.TCPStore(info.address, info.port, is_master=False, timeout=_TIMEOUT, wait_for_workers=False)
    return _connect(info), watched


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device is cuda, but PyTorch sees no GPU here; use train.device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank}, but only {torch.cuda.device_count()} GPUs here: start fewer ranks")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
