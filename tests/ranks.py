"""Starts functions and programs on several gloo ranks of this machine, as a launcher would."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on each rank of a new world; its results by rank.

    A rank that raises fails the test with that rank's traceback, the first by time.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(rank, world, port, folder, function, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        failures = sorted(Path(folder).glob("*.failed"), key=lambda p: p.stat().st_mtime_ns)
        if failures:
            raise AssertionError(f"rank {failures[0].stem}:\n{failures[0].read_text()}")
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world, f"exit codes {codes}"
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def _rank(
    rank: int, world: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    if world > 1:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
        (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    except BaseException:
        (Path(folder) / f"{rank}.failed").write_text(traceback.format_exc())
        raise


def environment() -> dict[str, str]:
    """A child's environment: one thread, so that two children share two cores fairly."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start_ranks(world: int, arguments: Sequence[str], cwd: Path) -> list[subprocess.Popen[str]]:
    """Start `megagpt train` on each rank of a new world, without a launcher, so that a test may kill any of them.

    What they print goes to `rank_N.log` below `cwd`.
    """
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(world):
        variables = {**environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "megagpt", "train", *arguments]
        with (cwd / f"rank_{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=cwd, env=variables, stdout=log, stderr=log, text=True))
    return processes


def megagpt(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "megagpt", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, **options)


def torchrun(world: int, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run launch/train.py under torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(world),
        f"--master-port={free_port()}",
    ]
    command += [str(REPOSITORY / "launch" / "train.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=300)
