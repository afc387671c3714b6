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

from megagpt.errors import first_line

_COLLECTIVE_BYTES = {"cuda": 2**28, "cpu": 2**24}
_COLLECTIVE_SECONDS = 60.0
_ROUNDS = 3


def report(folder: Path, port: int, on_gpu: bool) -> None:
    """Print this node's facts, then what one all-reduce over all nodes took. Run by each node, once, under srun."""
    node, index, nodes = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    head = os.environ["MASTER_ADDR"]
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
    """How many PyTorch sees, their names, and how much of each one's memory is in use, in MiB."""
    found: dict[str, Any] = {"count": torch.cuda.device_count(), "names": [], "used": []}
    found["names"] = sorted({torch.cuda.get_device_name(i) for i in range(found["count"])})
    # Not by PyTorch: it would take half a GiB of each GPU in order to ask.
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        if os.environ.get("CUDA_VISIBLE_DEVICES"):
            query.append(f"--id={os.environ['CUDA_VISIBLE_DEVICES']}")
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        with contextlib.suppress(ValueError):
            found["used"] = [int(line) for line in done.stdout.split()]
    return found


def _collective(index: int, nodes: int, head: str, port: int, on_gpu: bool) -> dict[str, Any]:
    """Seconds of the quickest of a few all-reduces, and their bytes; or the error."""
    device = "cuda" if on_gpu else "cpu"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"tcp://{head}:{port}", rank=index, world_size=nodes,
            timeout=datetime.timedelta(seconds=_COLLECTIVE_SECONDS),
        )  # fmt: skip
        data = torch.ones(_COLLECTIVE_BYTES[device] // 4, device=device)
        seconds = []
        for _ in range(_ROUNDS):
            begin = time.monotonic()
            dist.all_reduce(data)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - begin)
        if data[0] != nodes**_ROUNDS:
            return {"error": f"its sum is wrong: {data[0].item()} instead of {nodes**_ROUNDS}"}
        return {"seconds": min(seconds), "bytes": _COLLECTIVE_BYTES[device]}
    except (RuntimeError, ValueError) as error:
        return {"error": first_line(error)}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
