"""The process's place among its peers. The only room that reads launchers' environment variables."""

import contextlib
import dataclasses
import datetime
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from megagpt.errors import Reported, UserError, disk_error, first_line
from megagpt.hardware import keep_freed_memory

# Sets the upper bound on how long a rank waits for peers that never come.
_TIMEOUT = datetime.timedelta(minutes=30)
_REMEMBERED_COLLECTIVES = 2000
# Where ranks that failed count themselves, how often the others look, and how long they then wait for a clean end.
_FAILURES = "megagpt/failures"
_WATCH_SECONDS = 1.0
_GRACE_SECONDS = 5.0
EXIT_FAILED = 2
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process's rank, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None
    """Where the ranks can leave each other notes; None in a world of one that was not joined."""

    @property
    def host(self) -> str:
        """This machine's name."""
        return platform.node()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def torchrun_passes_sigterm_on(self) -> bool:
        """Whether torchrun started this rank and handles SIGTERM: it then kills the rank some time later."""
        handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM")
        return "TORCHELASTIC_RUN_ID" in os.environ and "SIGTERM" in handled

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
        """Whether the flag is set on some rank, on every rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set on some rank, on every rank, in one exchange."""
        return [value > 0 for value in self._reduce(list(map(float, flags)), dist.ReduceOp.MAX)]

    def from_main(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What the function gives on the main rank, on every rank; or raises on every rank what it raises there."""
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
def join(device: str = "auto", tune_allocator: bool = True, collective_timeout: float = 0) -> Iterator[World]:
    """Join the process group that the launcher describes, and leave it at the end.

    torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; for the tasks of
    an `srun` they follow from SLURM_*; with neither this is a world of one. `tune_allocator` lets a process on a CPU
    keep the memory that it frees. An error on any rank ends all of them within seconds, printed once, with the rank.
    `collective_timeout`: seconds after which someone else (a Watchdog) ends ranks that hang; the process group waits
    longer than that.
    Raises UserError for an incomplete or impossible environment.
    """
    place = find_place(os.environ)
    try:
        world = World(place.rank, place.size, place.local_rank, _device(device, place.local_rank))
    except UserError as error:
        fail_together(error)
    if world.device.type == "cpu" and tune_allocator:
        keep_freed_memory()
    store = _connect(place)
    world = dataclasses.replace(world, store=store)
    timeout = max(_TIMEOUT, datetime.timedelta(seconds=collective_timeout + 60))
    if world.size == 1:
        _init_group(world, store, timeout)
        try:
            yield world
        finally:
            _leave()
        return
    left = threading.Event()
    # Over a connection of its own: one that waits for a peer blocks all who share it.
    watch = threading.Thread(target=_follow_failed_peers, args=(store.clone(), left), daemon=True)  # type: ignore[attr-defined]
    watch.start()
    try:
        _init_group(world, store, timeout)
        yield world
        # The rank that holds the store leaves with the others: its going means a failure to those who watch.
        dist.barrier()
    except Exception as error:
        _report(error, place, store)
        raise Reported from None
    finally:
        _leave()
        left.set()


def _init_group(world: World, store: dist.Store, timeout: datetime.timedelta) -> None:
    on_gpu = world.device.type == "cuda"
    # The last collectives, for whoever has to find out why one hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_REMEMBERED_COLLECTIVES))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timeout,
        store=store,
        rank=world.rank,
        world_size=world.size,
        device_id=world.device if on_gpu else None,
    )


def fail_together(error: UserError) -> NoReturn:
    """Raise an error that came before `join`, perhaps on every rank, so that it is printed once and ends them all."""
    place = find_place(os.environ)
    if place.size == 1:
        raise error
    _report(error, place, _connect(place))
    raise Reported from None


def _connect(place: "Place") -> dist.Store:
    if place.size == 1:
        return dist.HashStore()
    # torchrun's agents hold the store for their workers, and say so in the environment.
    url = "env://" if "TORCHELASTIC_RUN_ID" in os.environ else f"tcp://{place.address}:{place.port}"
    store: dist.Store
    store, _, _ = next(iter(dist.rendezvous(url, place.rank, place.size, timeout=_TIMEOUT)))
    return store


def _report(error: Exception, place: "Place", store: dist.Store) -> None:
    known = disk_error(error) if isinstance(error, OSError) else error
    # Most errors are seen by every rank, and a peer that left breaks this rank's collectives: the first to count itself
    # speaks, and does so before any rank leaves, because launchers kill the rest as soon as one has left.
    if _count_failure(store) != 1:
        return
    if not isinstance(known, UserError):
        traceback.print_exception(error)
    text = known if isinstance(known, UserError) else first_line(error)
    print(f"megagpt: error: [rank {place.rank} of {place.size}] {text}", file=sys.stderr, flush=True)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # gloo's threads may still hold a tensor; if the last reference falls while Python exits, the process aborts.
    time.sleep(0.2)


def _count_failure(store: dist.Store) -> int:
    try:
        return store.add(_FAILURES, 1)
    except RuntimeError:
        return 0  # the store went with the rank that held it, which has reported


def _follow_failed_peers(store: dist.Store, left: threading.Event) -> None:
    """End this process where it still waits, in a collective that no peer will join, seconds after a failure."""
    while not left.wait(_WATCH_SECONDS):
        try:
            failed = store.check([_FAILURES])
        except RuntimeError:
            failed = True
        if failed and not left.wait(_GRACE_SECONDS):
            os._exit(EXIT_FAILED)


@dataclass(frozen=True)
class Place:
    """Where a launcher put this process."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


def find_place(environment: Mapping[str, str]) -> Place:
    """This process's place by its environment variables. Raises UserError naming what is missing or no number."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names, hint = _LAUNCHER, "start with torchrun or deepspeed, or set them all"
    elif "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        # The tasks of an srun. In a batch script itself there is no step: a process there is alone.
        names, hint = _SLURM, "start with srun or torchrun"
    else:
        return Place(0, 1, 0, "localhost", 0)
    missing = [name for name in names if not environment.get(name)]
    if missing:
        found = ", ".join(name for name in names if name not in missing) or "none"
        raise UserError(f"looked for {', '.join(names)}; found {found}, not {', '.join(missing)}: {hint}")

    def number(name: str) -> int:
        try:
            return int(environment[name])
        except ValueError:
            raise UserError(f"{name}={environment[name]!r} is not a whole number: {hint}") from None

    rank, size, local_rank = (number(name) for name in names[:3])
    if not 0 <= rank < size:
        raise UserError(f"{names[0]}={rank} is not below {names[1]}={size}: {hint}")
    if names is _LAUNCHER:
        return Place(rank, size, local_rank, environment["MASTER_ADDR"], number("MASTER_PORT"))
    # One port per step, so that steps of one job, and jobs that share a node, rarely meet.
    port = 20_000 + (number("SLURM_JOB_ID") * 31 + number("SLURM_STEP_ID")) % 20_000
    return Place(
        rank,
        size,
        local_rank,
        environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        number("MASTER_PORT") if environment.get("MASTER_PORT") else port,
    )


def launched_by(environment: Mapping[str, str]) -> str | None:
    """The Slurm job, and how often it was requeued: 4711.2; None outside of Slurm."""
    job = environment.get("SLURM_JOB_ID")
    return f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}" if job else None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: n007 of `n[007-012,020]-ib,login`."""
    depth, end = 0, len(nodes)
    for i, letter in enumerate(nodes):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            end = i
            break
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", nodes[:end])


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
