"""Starts functions, commands and launchers in processes of their own, waits for them and kills them.

Most of a process's start is imports. So all but the launchers' ranks are forked from one server that has imported them.
"""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagpt import cli
from megagpt.measure.processes import PRELOADED, enter, free_port, rank_environment

REPOSITORY = Path(__file__).resolve().parent.parent
# The server serves measurements, too: this comes before the first use of either.
PRELOADED += ["megagpt.training.loop", "tests.conftest", "tests.preloaded"]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads of a busy machine wait for each other
_started: list["Process"] = []


def environment() -> dict[str, str]:
    """A child's environment: one thread, so that two children share two cores fairly."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class Process:
    """A function in a process of its own, forked from the server; the part of subprocess.Popen that tests use.

    It exits with what the function returns, as a command does. `stdout`, `stderr`: files.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        cwd: Path,
        stdout: Path,
        stderr: Path,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        for path in (stdout, stderr):
            path.write_bytes(b"")
        surroundings = {**environment(), **(variables or {})}
        self._process = _context().Process(
            target=_in_child, args=(function, arguments, surroundings, cwd, stdout, stderr)
        )
        self._process.start()
        self.pid: int = self._process.pid
        _started.append(self)

    def poll(self) -> int | None:
        """The exit code, minus the signal's number if a signal killed it; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def end_all() -> None:
    """Kill whatever a test has started and left."""
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _in_child(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    variables: dict[str, str],
    cwd: Path,
    stdout: Path,
    stderr: Path,
) -> None:
    enter(variables, stdout, stderr, cwd)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


# --- functions ---


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on each rank of a new world; its results by rank.

    A rank that raises fails the test with that rank's traceback, the first by time.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = []
        for rank in range(world):
            variables = rank_environment(rank, world, port) if world > 1 else {}
            log = folder / f"{rank}.log"
            processes.append(
                Process(
                    _rank, folder / str(rank), function, arguments,
                    cwd=Path.cwd(), stdout=log, stderr=log, variables=variables,
                )
            )  # fmt: skip
        codes = [process.wait() for process in processes]
        for log in sorted(folder.glob("*.log")):
            print(log.read_text(), end="")
        failures = sorted(folder.glob("*.failed"), key=lambda p: p.stat().st_mtime_ns)
        if failures:
            raise AssertionError(f"rank {failures[0].stem}:\n{failures[0].read_text()}")
        assert codes == [0] * world, f"exit codes {codes}"
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world)]


def _rank(place: Path, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        place.with_suffix(".result").write_bytes(pickle.dumps(function(*arguments)))
    except BaseException:
        place.with_suffix(".failed").write_text(traceback.format_exc())
        raise


# --- the command line ---


def command(arguments: Sequence[str]) -> int:
    """`megagpt ARGUMENTS`, inside this process."""
    sys.argv = [str(REPOSITORY / "megagpt" / "__main__.py"), *arguments]
    return cli.main(arguments)


def megagpt(*arguments: str, cwd: Path, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = Process(command, arguments, cwd=cwd, stdout=files[0], stderr=files[1])
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(arguments), code, *(path.read_text() for path in files))


def start_ranks(world: int, arguments: Sequence[str], cwd: Path) -> list[Process]:
    """Start `megagpt train` on each rank of a new world, without a launcher, so that a test may kill any of them.

    What they print goes to `rank_N.log` below `cwd`.
    """
    port = free_port()
    return [
        start_train(arguments, cwd, cwd / f"rank_{rank}.log", rank_environment(rank, world, port))
        for rank in range(world)
    ]


def start_train(arguments: Sequence[str], cwd: Path, log: Path, variables: Mapping[str, str] | None = None) -> Process:
    """Start `megagpt train ARGUMENTS`; what it prints goes to the log."""
    return Process(command, ["train", *arguments], cwd=cwd, stdout=log, stderr=log, variables=variables)


# --- launchers: the real ones ---


def torchrun(world: int, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run launch/train.py under torchrun."""
    return run_launcher([*torchrun_command(world), str(REPOSITORY / "launch" / "train.py"), *arguments], cwd)


def torchrun_command(world: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    return [*launcher, f"--master-port={free_port()}"]


def run_launcher(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=300)
