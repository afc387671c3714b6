"""The ranks of a run: joining and leaving the process group, and small collectives."""

import contextlib
import datetime
import itertools
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from megagpt import console, launchers
from megagpt.errors import ExitCode, ExpectedError, Reported, UserError, expected
from megagpt.failures import failure, follow_failed_peers, leave_record, report
from megagpt.launchers import RankInfo
from megagpt.process_memory import keep_freed_memory, use_expandable_segments
from megagpt.rendezvous import FIND_SECONDS, TIMEOUT, Asked, arrive, connect, count_in, keep, never, raise_file_limit

_REMEMBERED_COLLECTIVES = 2000
# Seconds between two looks for peers that work alone, and between two lines about them.
_LOOK_SECONDS, _SILENT_SECONDS = 0.5, 30.0
_calls = itertools.count()  # of `once_per_host`, in the same order on every rank
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process's rank, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None
    """Keys and values that all ranks share, on a connection for threads that watch the others: the main thread waits on
    its own. None in a world of one that was not joined."""

    @property
    def host(self) -> str:
        """This machine's name."""
        return platform.node()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @staticmethod
    def alone(device: str = "cpu") -> "World":
        """One process that has joined nothing, whatever a launcher has set, on the device that `train.device` would
        mean by this name. Raises UserError if there is none."""
        return World(0, 1, 0, choose_device(device, 0))

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

    def min_of(self, values: list[float]) -> list[float]:
        """The smallest of all ranks' values at each place, on every rank. Every rank gives equally many."""
        return self._reduce(values, dist.ReduceOp.MIN)

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

    def differing(self, value: T) -> tuple[str, T, dict[str, T]]:
        """The main rank's machine and value, and the values of the machines where a rank has another one, on every
        rank: `{}` if all have the same."""
        (main, expected), *others = self.gather_objects((self.host, value))
        return main, expected, {host: theirs for host, theirs in others if theirs != expected}

    def hosts(self) -> list[str]:
        """The machine of each rank."""
        return self.gather_objects(self.host)

    def once_per_host(self, function: Callable[[], T], what: str) -> T:
        """Call the function on the first rank of each machine; every rank returns its machine's result. It may take
        longer than a collective: the main rank says for whom the others wait. `what`: a verb with its object, such as
        "fetches a file". An error is raised on the rank that has it, and `join` ends its peers."""
        if self.size == 1:
            return function()
        assert self.store is not None, "a world of several ranks has been joined"
        hosts = self.hosts()
        firsts = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
        key, result, last_line = f"megagpt/once/{next(_calls)}", None, time.monotonic()
        if firsts[self.host] == self.rank:
            result = function()
            self.store.set(f"{key}/{self.rank}", "")
            if self.store.add(key, 1) == len(firsts):
                self.store.set(f"{key}/all", "")
        while not self.store.check([f"{key}/all"]):
            if self.is_main and time.monotonic() - last_line > _SILENT_SECONDS:
                late = [rank for rank in firsts.values() if not self.store.check([f"{key}/{rank}"])]
                for rank in late[:1]:  # none, if the last one has just ended
                    console.say(f"waiting for rank {rank} on {hosts[rank]}, which {what}")
                last_line = time.monotonic()
            time.sleep(_LOOK_SECONDS)
        return self.gather_objects(result)[firsts[self.host]]  # type: ignore[return-value]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join(
    device: str = "auto", tune_allocator: bool = True, hang_timeout: float = 0, asked: Asked = never
) -> Iterator[World]:
    """Join the process group that the launcher describes, and leave it at the end. `say` prints on the main rank only.
    `tune_allocator`: a process on a CPU keeps the memory that it frees, and a GPU's allocator extends its segments. An
    error on any rank ends all of them within seconds, printed once, with the rank. `hang_timeout`: seconds after which
    a Watchdog ends ranks that hang; the process group waits longer than that. `asked` ends the wait for peers. Raises
    UserError for an incomplete or impossible environment; Interrupted or Stopped if a signal came before the peers."""
    info = launchers.find_rank(os.environ)
    raise_file_limit()
    try:
        world = World(info.rank, info.size, info.local_rank, choose_device(device, info.local_rank, tune_allocator))
    except UserError as error:
        fail_together(error, asked)
    if world.device.type == "cpu" and tune_allocator:
        keep_freed_memory()
    store, watched = _connect(info, asked)
    world = replace(world, store=watched)
    left = threading.Event()
    try:
        with console.voice(silent=not world.is_main):
            if world.size > 1:
                arrive(info, store, asked, gpu=_gpu_id(world.device))
                threading.Thread(target=follow_failed_peers, args=(watched, left), daemon=True).start()
            _start_process_group(world, store, max(TIMEOUT, datetime.timedelta(seconds=hang_timeout + 60)))
            yield world
            # The rank that holds the store must not leave first: its peers would take its exit for a failure.
            world.barrier()
    except Exception as error:
        if world.size == 1:
            leave_record(failure(error, 0))
            raise
        _report(error, info, store, asked)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # gloo's threads may still hold a tensor; if the last reference falls while Python exits, the process aborts.
        time.sleep(0.2)
        left.set()


def fail_together(error: UserError, asked: Asked = never) -> NoReturn:
    """Raise an error that came before `join`, perhaps on every rank, so that it is printed once and ends them all."""
    info = launchers.find_rank(os.environ)
    try:
        if info.size == 1:
            raise error
        store, _ = connect(info, asked, seconds=FIND_SECONDS)
    except ExpectedError:  # the ranks cannot meet: each prints it
        leave_record(failure(error, info.rank))
        raise error from None
    count_in(info, store)
    _report(error, info, store, asked)


def _report(error: Exception, info: RankInfo, store: dist.Store, asked: Asked) -> NoReturn:
    report(error, info.rank, info.size, store)
    keep(info, store, asked)
    known = expected(error)
    raise Reported(known.code if known is not None else ExitCode.FAILED) from None


def _connect(info: RankInfo, asked: Asked) -> tuple[dist.Store, dist.Store]:
    if info.size == 1:
        return dist.HashStore(), dist.HashStore()
    try:
        return connect(info, asked)
    except ExpectedError as error:
        leave_record(failure(error, info.rank))
        raise


def _start_process_group(world: World, store: dist.Store, timeout: datetime.timedelta) -> None:
    # Otherwise gloo connects each rank to every other one, with each group that is made: a thousand ranks with three
    # groups would need more sockets than the usual limit of open files.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # The flight recorder: if a collective hangs, it tells which one. PyTorch warns if its old name is set, too.
    size = os.environ.pop("TORCH_NCCL_TRACE_BUFFER_SIZE", str(_REMEMBERED_COLLECTIVES))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", size)
    # PyTorch 2.13 renames collectives, and warns at each call of an old name; 2.11 has the old ones only.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    on_gpu = world.device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout, store=store, rank=world.rank,
        world_size=world.size, device_id=world.device if on_gpu else None,
    )  # fmt: skip


def check_device(name: str, option: str) -> None:
    """Raises UserError if the device, which was chosen with that config key or option, is not here."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{option} is cuda, but PyTorch sees no GPU here; use {option}=cpu")


def choose_device(name: str, local_rank: int, tune_allocator: bool = True) -> torch.device:
    """The device that `train.device` means for a rank, set up for this process. `tune_allocator`: whether a GPU's
    allocator extends its segments. Raises UserError if there is no device for the rank."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if tune_allocator:
        use_expandable_segments()
    check_device(name, "train.device")
    count = torch.cuda.device_count()
    index = 0 if count == 1 and launchers.sees_one_gpu(os.environ) else local_rank
    if index >= count:
        raise UserError(f"local rank {local_rank}, but only {count} GPU(s) here: start fewer ranks")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # Matrix kernels that cut a long sum into parts would otherwise round the parts to 16 bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return device


def _gpu_id(device: torch.device) -> str:
    """The GPU by its number in the world, empty for a CPU: by it, two ranks find that they share one."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
