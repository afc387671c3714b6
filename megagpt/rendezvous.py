"""How the ranks of a job meet: in a store that rank 0 or torchrun's agent holds. A rank that waits says for whom, where
and by which variables, and ends if it is asked to. PyTorch's own wait is silent, and deaf to Ctrl-C, for half an hour.
"""

import contextlib
import datetime
import itertools
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from megagpt import launchers
from megagpt.console import duration, warn
from megagpt.errors import ExpectedError, Interrupted, Reported, Stopped, TransientError, UserError, first_line
from megagpt.failures import has_failed
from megagpt.launchers import RankInfo

# Upper bound on how long a rank waits for peers that never come.
TIMEOUT = datetime.timedelta(minutes=30)
# Seconds until a rank says that it waits, and between two such lines at most; each pause is twice as long as the last.
_FIRST_NOTICE, _LONGEST_SILENCE = 3.0, 300.0
_LOOK_SECONDS = 0.2
# Seconds for which a name may have no address yet: in Kubernetes, rank 0's pod has none before it runs.
_NAME_SECONDS = 60.0
# The answers of name servers that may change by themselves: no answer, no such name, no address for it.
_UNKNOWN_YET = (socket.EAI_AGAIN, socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
# Seconds for which a rank that fails before the ranks have met looks for the store, and for which the one that holds
# the store keeps it for peers that are still starting.
FIND_SECONDS, _KEEP_SECONDS = 15.0, 60.0
# Peers that a line names.
_NAMED = 8
# Keys of the store: ranks that have come, their number by rank 0, the rank that speaks for a machine, that has a GPU.
_ARRIVED, _SIZE, _SPEAKS, _GPU = "megagpt/arrived", "megagpt/size", "megagpt/speaks/", "megagpt/gpu/"

Asked = Callable[[], str | None]
"""Gives the name of a signal that asked this process to end; None if none has."""


def never() -> None:
    """No signal asks this process to end: Ctrl-C raises KeyboardInterrupt in it."""


def raise_file_limit() -> None:
    """Let this process open as many files and sockets as it may. The usual soft limit of 1,024 is for programs that use
    select(), and less than what rank 0 of a large job needs. Never raises."""
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connect(info: RankInfo, asked: Asked, seconds: float = TIMEOUT.total_seconds()) -> tuple[dist.Store, dist.Store]:
    """The job's store on two connections, because a rank that waits for a key blocks all who share its connection. The
    rank that holds the store may fail and leave right after the ranks have met: a second connection that was made later
    would wait for it until the timeout. Raises UserError for a port that is taken, and TransientError for a name that
    nobody comes to know, and after `seconds`."""
    holds = _holds_store(info)
    found: list[tuple[dist.Store, dist.Store] | Exception] = []
    resolved = threading.Event()

    def missing() -> Missing:
        peer = f"{_holder(info)} ({_answer(info)})" if resolved.is_set() else f"an address of {_named(info)}"
        return Missing(peer)

    def work() -> None:
        try:
            _resolve(info)
            resolved.set()
            store = dist.TCPStore(
                info.address, info.port, is_master=holds, timeout=TIMEOUT, wait_for_workers=False, multi_tenant=holds
            )
            found.append((_of_attempt(store), _of_attempt(store.clone())))  # type: ignore[attr-defined]
        except Exception as error:
            found.append(error)

    wait = _Wait(info, asked, seconds)
    # In a thread, because PyTorch lets no signal be handled while it connects.
    worker = threading.Thread(target=work, name="connect", daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(_LOOK_SECONDS)
        if worker.is_alive():
            wait.look(missing)
    (result,) = found
    if isinstance(result, ExpectedError):
        raise result
    if isinstance(result, Exception):
        raise _refused(info, result) from None
    return result


def arrive(info: RankInfo, store: dist.Store, asked: Asked, gpu: str = "") -> None:
    """Return once all ranks have come. `gpu`: this rank's, by a name that no other GPU has; empty on a CPU. Raises
    UserError if rank 0 expects another number of ranks, or if another process has this rank or its GPU; Reported if a
    peer fails before all have come; TransientError after the timeout, and if the store ends."""
    rank_variable, size_variable = info.variables.split(" and ")
    host = socket.gethostname()
    wait, pause = _Wait(info, asked, TIMEOUT.total_seconds()), _LOOK_SECONDS / 10
    try:
        store.set(_GPU + gpu, str(info.rank))
        first = count_in(info, store)
        if not launchers.started_by_torchrun(os.environ):  # it numbers its ranks
            if (size := int(store.get(_SIZE))) != info.size:
                here = f"{size_variable}={info.size} on rank {info.rank}"
                raise UserError(f"{here}, and {size} on rank 0: set it alike on all")
            if not first:
                raise UserError(f"{rank_variable}={info.rank} is set for two processes of this job: give each its own")
        while True:
            if has_failed(store):
                raise Reported
            if store.add(_ARRIVED, 0) >= info.size:
                break
            wait.look(lambda: _missing(info, store))
            time.sleep(pause)
            pause = min(1.5 * pause, 2 * _LOOK_SECONDS)
        other = int(store.get(_GPU + gpu)) if gpu else info.rank
    except RuntimeError:
        raise TransientError(f"{_holder(info)} has ended before all {info.size} ranks had come") from None
    if other != info.rank:
        ways = "start one rank for each GPU, or let CUDA_VISIBLE_DEVICES show each rank another one"
        raise UserError(f"ranks {info.rank} and {other} share one GPU of {host}: {ways}")


def count_in(info: RankInfo, store: dist.Store) -> bool:
    """Let nobody wait for this rank; returns whether no other process has come as this rank."""
    if info.rank == 0:
        store.set(_SIZE, str(info.size))
        store.compare_set(_SPEAKS + socket.gethostname(), "", "0")
    first = store.add(f"{_ARRIVED}/{info.rank}", 1) == 1
    store.add(_ARRIVED, 1)
    return first


def keep(info: RankInfo, store: dist.Store, asked: Asked) -> None:
    """After a failure before the ranks have met: keep the store, if this rank holds it, for peers that are still
    starting, so that they learn of the failure instead of waiting for this rank."""
    if not _holds_store(info):
        return
    wait = _Wait(info, asked, _KEEP_SECONDS)
    with contextlib.suppress(RuntimeError, TransientError, Interrupted, Stopped):
        while store.add(_ARRIVED, 0) < info.size:
            wait.look(lambda: _missing(info, store))
            time.sleep(_LOOK_SECONDS)


class Missing(NamedTuple):
    """The peers that a rank waits for."""

    peers: str
    ranks: str = ""
    """Their ranks, as the end of a line."""
    silent: bool = False
    """Whether another rank of this machine says it."""


class _Wait:
    """One wait: says what for from time to time, and ends if a signal asks for it or time is up."""

    def __init__(self, info: RankInfo, asked: Asked, seconds: float) -> None:
        self._info, self._asked, self._seconds = info, asked, seconds
        self._began, self._next, self._pause = time.monotonic(), _FIRST_NOTICE, _FIRST_NOTICE

    def look(self, what: Callable[[], Missing]) -> None:
        """Called again and again. Raises Interrupted, Stopped and TransientError."""
        info, waited = self._info, time.monotonic() - self._began
        who, why = f"rank {info.rank} of {info.size}", f"by {info.variables} in the environment"
        if (signal := self._asked()) is not None:
            text = f"stopped by {signal} while this rank waited for {what().peers}, {why}; nothing was begun"
            raise Interrupted(text) if signal == "SIGINT" else Stopped(text)
        if waited > self._seconds:
            raise TransientError(f"this rank waited {duration(waited)} in vain for {what().peers}, {why}")
        if waited > self._next:
            self._pause = min(2 * self._pause, _LONGEST_SILENCE)
            self._next = waited + self._pause
            peers, ranks, silent = what()
            if not silent:
                first = self._pause == 2 * _FIRST_NOTICE
                warn(f"{who} {'waits' if first else f'has waited {duration(waited)}'} for {peers}, {why}{ranks}")


def _missing(info: RankInfo, store: dist.Store) -> Missing:
    """The ranks that have not come. One rank on each machine says it, and rank 0."""
    speaker = store.compare_set(_SPEAKS + socket.gethostname(), "", str(info.rank)).decode()
    count = info.size - store.add(_ARRIVED, 0)
    peers = f"{'1 other' if count == 1 else f'{count} others'} at {info.address}:{info.port}"
    if info.rank and speaker != str(info.rank):
        return Missing(peers, silent=True)
    ranks = (rank for rank in range(info.size) if not store.check([f"{_ARRIVED}/{rank}"]))
    names = ", ".join(map(str, itertools.islice(ranks, _NAMED))) + (", ..." if count > _NAMED else "")
    return Missing(peers, f": {'rank' if count == 1 else 'ranks'} {names}")


def _of_attempt(store: dist.Store) -> dist.Store:
    """The store without the keys of earlier attempts: torchrun starts failed ranks again with the same store, in which
    they would find that a rank has failed, and the process group's old addresses."""
    attempt = launchers.torchrun_attempt(os.environ)
    return store if attempt is None else dist.PrefixStore(f"megagpt/attempt_{attempt}", store)


def _holds_store(info: RankInfo) -> bool:
    return info.rank == 0 and not launchers.agent_holds_store(os.environ)


def _holder(info: RankInfo) -> str:
    """The process that holds the store, and where."""
    where = f"{info.address}:{info.port}"
    if launchers.agent_holds_store(os.environ):
        return f"torchrun's agent at {where}"
    return f"rank 0 at {where}" if info.rank else f"itself at {where}, an address of another machine"


def _answer(info: RankInfo) -> str:
    """The state of the place where the store should be."""
    try:
        socket.create_connection((info.address, info.port), timeout=1).close()
    except OSError as error:
        return error.strerror or str(error)
    return "something else answers there"


def _named(info: RankInfo) -> str:
    return f"rank 0's host {info.address!r} (MASTER_ADDR)"


def _resolve(info: RankInfo) -> None:
    """Return once the name has an address. Raises UserError if it cannot have one, TransientError if time is up."""
    deadline = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(info.address, info.port)
            return
        except (OSError, UnicodeError) as error:
            may_change = getattr(error, "errno", None) in _UNKNOWN_YET
            if not may_change or time.monotonic() > deadline:
                reason = getattr(error, "strerror", None) or str(error)
                text = f"{_named(info)} cannot be resolved on this machine ({reason})"
                text += ": set MASTER_ADDR to the name or the IP address of rank 0's machine"
                raise (TransientError if may_change else UserError)(text) from None
        time.sleep(1)


def _refused(info: RankInfo, error: Exception) -> UserError | TransientError:
    reason = re.sub(r".*message: ", "", first_line(error))
    if not _holds_store(info):
        return TransientError(f"rank {info.rank} of {info.size} cannot reach {_holder(info)}: {reason}")
    if "EADDRINUSE" in str(error):
        reason = "is taken on this machine: another program or another job listens there"
        return UserError(f"port {info.port} {reason}; set MASTER_PORT to a free port, on all ranks alike")
    way = "set MASTER_PORT to another port, on all ranks alike"
    return UserError(f"rank 0 cannot listen at port {info.port}: {reason}; {way}")
