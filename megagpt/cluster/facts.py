"""What one node says of itself before a run: printed as a line of JSON, so that it needs no network but Slurm's."""

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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagpt.errors import UserError, first_line

_COLLECTIVE_BYTES = {"cuda": 2**28, "cpu": 2**24}
# Until the last node has imported what it needs; whoever asks gives up earlier.
_PATIENCE = datetime.timedelta(minutes=10)
_ROUNDS = 3


def report(folder: Path, port: int, on_gpu: bool) -> None:
    """Print this node's facts, then what one all-reduce over all nodes took. Run by each node, once, under srun."""
    try:
        node, index = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_NODEID"])
        nodes, head = int(os.environ["SLURM_NNODES"]), os.environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        raise UserError(f"launch/multinode.sh asks this of each node of a Slurm job ({first_line(error)})") from None
    facts = {
        "head": _resolves(head),
        "port": _taken(port) if index == 0 else "",
        "folder": _writable(folder, node),
        "versions": versions(),
        "gpus": _gpus() if on_gpu else None,
        "time": time.time(),
    }
    print(json.dumps({"node": node, "facts": facts}), flush=True)
    if nodes > 1 and not facts["head"]:
        print(json.dumps({"node": node, "collective": _collective(index, nodes, head, port + 1, on_gpu)}), flush=True)


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "numpy", "megagpt")}
    return {"python": platform.python_version(), **found, "cuda": str(torch.version.cuda)}


def _resolves(host: str) -> str:
    """Why a host's name leads nowhere; empty where it does."""
    try:
        socket.getaddrinfo(host, None)
        return ""
    except OSError as error:
        return first_line(error)


def _taken(port: int) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return ""
        except OSError as error:
            return first_line(error)


def _writable(folder: Path, node: str) -> str:
    """Leave a file for the head node to find, and look for the one that it left."""
    try:
        (folder / f"preflight.{node}").write_text(node)
        (folder / "preflight").read_text()
        return ""
    except OSError as error:
        return first_line(error)


def _gpus() -> dict[str, Any]:
    """How many PyTorch sees, and how much of each one's memory is in use, in MiB; `error` where one does not answer."""
    found: dict[str, Any] = {"count": torch.cuda.device_count(), "used": [], "error": ""}
    try:
        for index in range(found["count"]):
            torch.ones(1, device=torch.device("cuda", index)).item()
        # Not by PyTorch: it would count what it has just taken.
        if shutil.which("nvidia-smi"):
            found["used"] = _used_by_others()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        found["error"] = first_line(error)
    return found


def _used_by_others() -> list[int]:
    """MiB that other processes use of each GPU of this job."""
    query = ["nvidia-smi", "--format=csv,noheader,nounits"]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={os.environ['CUDA_VISIBLE_DEVICES']}")

    def ask(what: str) -> list[list[str]]:
        done = subprocess.run([*query, what], capture_output=True, text=True, check=False, timeout=60)
        return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]

    used = dict.fromkeys((row[0] for row in ask("--query-gpu=uuid")), 0)
    for row in ask("--query-compute-apps=gpu_uuid,pid,used_memory"):
        with contextlib.suppress(ValueError, KeyError):  # its memory may be unknown
            if int(row[1]) != os.getpid():
                used[row[0]] += int(row[2])
    return list(used.values())


def _collective(index: int, nodes: int, head: str, port: int, on_gpu: bool) -> dict[str, Any]:
    """Seconds of the quickest of a few all-reduces, and their bytes; or the error."""
    device = "cuda" if on_gpu else "cpu"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"tcp://{head}:{port}", rank=index, world_size=nodes,
            timeout=_PATIENCE,
        )  # fmt: skip
        data = torch.empty(_COLLECTIVE_BYTES[device] // 4, device=device)
        seconds = []
        for _ in range(_ROUNDS):
            data.fill_(1.0)
            if on_gpu:
                torch.cuda.synchronize()
            begin = time.monotonic()
            dist.all_reduce(data)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - begin)
        if not bool((data == nodes).all()):
            return {"error": "its sum is wrong"}
        return {"seconds": min(seconds), "bytes": _COLLECTIVE_BYTES[device]}
    except (RuntimeError, ValueError) as error:
        return {"error": first_line(error)}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
