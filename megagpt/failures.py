"""Why a rank failed. The rank that failed first prints it, once per job. Every failed rank also leaves a record in the
file that torchrun names in TORCHELASTIC_ERROR_FILE, in torchrun's own form with ours beside it. So a job's verdict
reads what the rank knew, instead of guessing from its log."""

import contextlib
import json
import os
import platform
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.console import warn
from megagpt.errors import ExitCode, Reported, expected, first_line
from megagpt.files import read_json, write_atomic
from megagpt.launchers import error_file

if TYPE_CHECKING:
    import torch.distributed as dist

# The store's key under which failed ranks count themselves; how often the others look at it; their time to end cleanly.
_FAILURES = "megagpt/failures"
_WATCH_SECONDS = 1.0
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Failure:
    """Why a rank failed, or the launcher that should have started it."""

    reason: str
    rank: int | None
    """None if no rank is known to have failed."""
    host: str
    """Empty if it is unknown."""
    retry: bool
    """Whether the same command may succeed later although nobody changed anything."""
    first: bool = True
    """No other rank had failed before it."""

    @property
    def where(self) -> str:
        if self.rank is None:
            return self.host or "an unknown rank"
        return f"rank {self.rank} on {self.host or 'an unknown host'}"


def failure(error: BaseException, rank: int | None, first: bool = True) -> Failure:
    """The record of an error. An unexpected one is a fault of a program or a machine: a retry may succeed."""
    known = expected(error)
    retry = known.retry if known is not None else True
    return Failure(str(known) if known is not None else first_line(error), rank, platform.node(), retry, first)


def leave_record(found: Failure) -> None:
    """Write the record where the launcher looks, if it names a place. Never raises."""
    if not (path := error_file(os.environ)):
        return
    # torchrun reads `message` and its timestamp, and shows them in its own summary.
    message = {"message": found.reason, "extraInfo": {"timestamp": str(int(time.time())), "py_callstack": ""}}
    with contextlib.suppress(OSError):
        write_atomic(Path(path), json.dumps({"message": message, "megagpt": asdict(found)}).encode())


def read_record(path: Path) -> Failure | None:
    """A record that `leave_record` wrote; None for any other file."""
    values: Any = read_json(path).get("megagpt")
    with contextlib.suppress(TypeError):
        return Failure(**values)
    return None


def report(error: Exception, rank: int, ranks: int, store: "dist.Store") -> None:
    """Print the error and leave its record. Only the rank that counts itself first prints: most errors are seen by
    every rank, and a peer that left breaks the other ranks' collectives. It prints before it leaves, because launchers
    kill the other ranks as soon as one has left."""
    if isinstance(error, Reported):
        return
    first = False
    with contextlib.suppress(RuntimeError):  # the store went with the rank that held it, which has reported
        first = store.add(_FAILURES, 1) == 1
    found = failure(error, rank, first)
    leave_record(found)
    if not first:
        return
    if expected(error) is None:
        warn("".join(traceback.format_exception(error)).rstrip("\n"))
    warn(f"megagpt: error: [rank {rank} of {ranks}] {found.reason}")


def has_failed(store: "dist.Store") -> bool:
    """Whether some rank has reported an error. Raises RuntimeError if the process that holds the store has ended."""
    return bool(store.check([_FAILURES]))


def follow_failed_peers(store: "dist.Store", left: threading.Event) -> None:
    """End this process seconds after a peer failed, if it still waits in a collective that the peer will never join.
    Returns when `left` is set."""
    while not left.wait(_WATCH_SECONDS):
        try:
            failed = has_failed(store)
        except RuntimeError:
            failed = True
        if failed and not left.wait(_GRACE_SECONDS):
            os._exit(ExitCode.FAILED)
