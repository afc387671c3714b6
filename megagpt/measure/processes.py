"""Starts the ranks of a measurement on this machine, and collects the results of rank 0."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megagpt.errors import Killed, Reported, UserError
from megagpt.failures import failure, leave_record, read_record
from megagpt.measure.cases import Case

# Modules imported once, before the ranks are forked: imports take most of a rank's start. deepspeed is not among them,
# because it chooses its accelerator when it is imported.
PRELOADED = ["megagpt.measure.worker", "megagpt.engines.fsdp", "torch._dynamo"]
Function = Callable[..., Iterator[Any]]


def run_cases(kind: str, cases: Sequence[Case], progress: Callable[[], object] = lambda: None) -> list[Any]:
    """The results of the cases, in order. Consecutive cases with the same number of ranks share one start of ranks.
    Raises UserError if a rank fails."""
    from megagpt.measure.worker import run

    results: list[Any] = []
    for ranks, group in itertools.groupby(cases, lambda case: case.ranks):
        started, waiting = len(results), list(group)
        try:
            for result in run_ranks(ranks, run, kind, waiting):
                results.append(result)
                progress()
        except UserError as error:
            failed = waiting[min(len(results) - started, len(waiting) - 1)]
            raise UserError(f"{kind} {failed}: {error}") from None
    return results


def run_ranks(ranks: int, function: Function, *arguments: Any, method: str = "forkserver") -> Iterator[Any]:
    """Call `function(*arguments)` on every rank of a new world; yields what rank 0's call yields. `method`:
    "forkserver" starts fast, from a process that has imported everything; "spawn" gives fresh processes, which share no
    memory with it. Raises UserError with the reason of the rank that failed first: Killed if it died of SIGKILL."""
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        processes = []
        for rank in range(ranks):
            place = (rank_environment(rank, ranks, port), Path(folder, str(rank)), sender if rank == 0 else None)
            processes.append(context.Process(target=_rank, args=(*place, function, *arguments), daemon=True))
        try:
            for process in processes:
                process.start()
            sender.close()
            with contextlib.suppress(EOFError):  # rank 0 has closed its end
                while True:
                    yield receiver.recv()
            for process in processes:
                process.join()
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise _error(Path(folder), codes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of one of several ranks on this machine, as a launcher sets it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in place.items()}}


def enter(environment: dict[str, str], stdout: Path, stderr: Path, cwd: Path | None = None) -> None:
    """Give a process that was forked from a server its own environment, working folder, stdout and stderr, like a
    process that was started separately. `stdout`, `stderr`: files to append to."""
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        stream.flush()
        with path.open("ab") as file:
            os.dup2(file.fileno(), stream.fileno())


def _rank(variables: dict[str, str], log: Path, sender: Connection | None, function: Function, *arguments: Any) -> None:
    enter({**variables, "TORCHELASTIC_ERROR_FILE": f"{log}.error.json"}, log, log)
    gc.freeze()  # imports live as long as the process
    try:
        for value in function(*arguments):
            if sender is not None:
                sender.send(value)
    except Exception as error:
        if not isinstance(error, Reported):
            leave_record(failure(error, int(variables["RANK"])))
        sys.exit(1)


def _error(folder: Path, codes: Sequence[int | None]) -> UserError:
    """The reason why the ranks failed: the record of the first rank that failed, else the kernel, which kills one that
    takes too much memory, else the last line that a rank printed."""
    records = [record for path in sorted(folder.glob("*.error.json")) if (record := read_record(path)) is not None]
    for record in sorted(records, key=lambda record: not record.first):
        return UserError(f"[rank {record.rank} of {len(codes)}] {record.reason}")
    if -signal.SIGKILL in codes:
        rank = codes.index(-signal.SIGKILL)
        return Killed(f"[rank {rank} of {len(codes)}] died of SIGKILL (out of memory, if nobody sent it)")
    for rank in range(len(codes)):
        path = folder / str(rank)
        if path.exists() and (lines := path.read_text(errors="replace").split("\n")[:-1]):
            return UserError(lines[-1])
    return UserError(f"exit codes {codes}")
