"""A node's report before a run, printed as lines of JSON, so that it needs no network but Slurm's."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megagpt
from megagpt.errors import first_line
from megagpt.launchers import SlurmNode, slurm_node

_COLLECTIVE_BYTES = {"cuda": 2**28, "cpu": 2**24}
# Timeout of the collective: the last node must have imported PyTorch by then. The pre-flight check gives up earlier.
_PATIENCE = datetime.timedelta(minutes=10)
_ROUNDS = 3


def print_report(folder: Path, port: int, on_gpu: bool) -> None:
    """Print this node's facts, then the time of one all-reduce over all nodes. Each node runs it once, under srun.
    Raises UserError outside of launch/multinode.sh."""
    task = slurm_node(os.environ)
    facts = {
        "head": _problem(lambda: socket.getaddrinfo(task.head, None)),
        "port": _problem(lambda: _bind(port)) if task.index == 0 else "",
        "folder": _problem(lambda: _exchange_files(folder, task.name)),
        "versions": versions(),
        "gpus": _gpu_facts() if on_gpu else None,
        "time": time.time(),
    }
    print(json.dumps({"node": task.name, "facts": facts}), flush=True)
    if task.nodes > 1 and not facts["head"]:
        print(json.dumps({"node": task.name, "collective": _time_all_reduce(task, port + 1, on_gpu)}), flush=True)


def versions() -> dict[str, str]:
    """Versions that must be the same on all nodes."""
    ours = {"python": platform.python_version(), "megagpt": megagpt.__version__, "cuda": str(torch.version.cuda)}
    return ours | {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "numpy")}


def _problem(work: Callable[[], object]) -> str:
    """Why some work fails; empty if it does not."""
    try:
        work()
        return ""
    except OSError as error:
        return first_line(error)


def _bind(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))


def _exchange_files(folder: Path, node: str) -> None:
    """Leave a file for the head node, and read the one that it left."""
    (folder / f"preflight.{node}").write_text(node)
    (folder / "preflight").read_text()


def _gpu_facts() -> dict[str, Any]:
    """`count`: GPUs that PyTorch sees; `used`: MiB of each that other processes use; `error`: of a GPU that fails."""
    found: dict[str, Any] = {"count": torch.cuda.device_count(), "used": [], "error": ""}
    try:
        for index in range(found["count"]):
            torch.ones(1, device=torch.device("cuda", index)).item()
        # PyTorch would count the memory that the line above has just taken.
        if shutil.which("nvidia-smi"):
            found["used"] = _used_by_others()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        found["error"] = first_line(error)
    return found


def _used_by_others() -> list[int]:
    """MiB of each GPU of this job that other processes use."""
    query = ["nvidia-smi", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")

    def ask(what: str) -> list[list[str]]:
        done = subprocess.run([*query, what], capture_output=True, text=True, check=False, timeout=60)
        return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]

    used = dict.fromkeys((row[0] for row in ask("--query-gpu=uuid")), 0)
    for row in ask("--query-compute-apps=gpu_uuid,pid,used_memory"):
        with contextlib.suppress(ValueError, KeyError):  # a process's memory may be unknown
            if int(row[1]) != os.getpid():
                used[row[0]] += int(row[2])
    return list(used.values())


def _time_all_reduce(task: SlurmNode, port: int, on_gpu: bool) -> dict[str, Any]:
    """`seconds` of the fastest of a few all-reduces, and their `bytes`; or the `error`."""
    device = "cuda" if on_gpu else "cpu"
    synchronize = torch.cuda.synchronize if on_gpu else torch.cpu.synchronize
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"tcp://{task.head}:{port}", rank=task.index,
            world_size=task.nodes, timeout=_PATIENCE,
        )  # fmt: skip
        data = torch.empty(_COLLECTIVE_BYTES[device] // 4, device=device)
        seconds = []
        for _ in range(_ROUNDS):
            data.fill_(1.0)
            synchronize()
            begin = time.monotonic()
            dist.all_reduce(data)
            synchronize()
            seconds.append(time.monotonic() - begin)
        if not bool((data == task.nodes).all()):
            return {"error": "its sum is wrong"}
        return {"seconds": min(seconds), "bytes": _COLLECTIVE_BYTES[device]}
    except (RuntimeError, ValueError) as error:
        return {"error": first_line(error)}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
