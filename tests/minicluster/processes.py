"""Processes of a cluster: their environment, their end, and waiting for them."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def end_processes(variable: str, value: str) -> None:
    """Kill every process with this variable in its environment, such as all that a launcher started, in any session."""
    deadline = time.monotonic() + 30
    while pids := _pids(f"{variable}={value}"):  # repeated, because a process may start another meanwhile
        assert time.monotonic() < deadline, f"processes {pids} do not end"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _pids(setting: str) -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        # A process that has just ended, and a zombie, have no environment.
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and setting.encode() in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
    return pids


def outer_environment() -> dict[str, str]:
    """This process's environment without an outer Slurm job's variables, and with the daemons' folder in the path."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    return {**variables, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def absent_programs(packages: Mapping[str, str]) -> str:
    """A sentence about the programs that are missing here; empty if there is none. `packages`: program -> package."""
    path = outer_environment()["PATH"]
    absent = [name for name in packages if shutil.which(name, path=path) is None]
    needed = " ".join(dict.fromkeys(packages[name] for name in absent))
    return f"no {', '.join(absent)}: install the Debian packages {needed}" if absent else ""


def wait_until(ready: Callable[[], T], message: str, timeout: float = 30.0, report: Callable[[], str] = str) -> T:
    """The first true result. Fails with the message and the report after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (result := ready()):
        assert time.monotonic() < deadline, f"{message} in {timeout} s\n{report()}"
        time.sleep(0.05)
    return result


def last_lines(path: Path) -> str:
    """The end of a log with its path; empty if there is no such file."""
    if not path.is_file():
        return ""
    return f"--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-30:])
