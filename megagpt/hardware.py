"""Accelerators by name: dense peak rates and memory. Unknown hardware is None, never a guess."""

import ctypes
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class Accelerator:
    """Vendor data-sheet numbers, dense (without sparsity)."""

    bf16_flops: float
    """FLOP/s of bf16 matrix products with fp32 accumulation."""
    fp32_flops: float
    """FLOP/s of fp32 products as PyTorch runs them by default (no TF32)."""


# From NVIDIA's data sheets. The first that is part of the device's name wins.
_ACCELERATORS = {
    "H200": Accelerator(989.4e12, 66.9e12),  # GH200 too: the same chip
    "H100 PCIe": Accelerator(756e12, 51.2e12),
    "H100 NVL": Accelerator(835e12, 60e12),
    "H100": Accelerator(989.4e12, 66.9e12),
    "A100": Accelerator(312e12, 19.5e12),
    "L40S": Accelerator(362e12, 91.6e12),
}
# GB of memory of the largest of them, an H200.
LARGEST_GPU_GB = 141.0


@functools.cache
def device_name(device: torch.device) -> str:
    """The device's own name; for a CPU, just "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device in a precision ("fp32", "bf16"); None where it is not known."""
    name = device_name(device)
    for key, accelerator in _ACCELERATORS.items():
        if key in name:
            return accelerator.bf16_flops if precision == "bf16" else accelerator.fp32_flops
    return None


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next step instead of returning them to the kernel.

    A training step on a CPU frees and allocates the same hundreds of MB again and again; fresh pages, which the kernel
    must zero, cost up to a third of the step. The peak stays what it was. Does nothing outside Linux with glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def free_memory() -> int:
    """Bytes that this process may still take of the host: what is available, or what its cgroups leave of it."""
    free = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
        for folder in (group, *group.parents):
            if (folder / "memory.max").exists() and (limit := (folder / "memory.max").read_text().strip()) != "max":
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(statistics["inactive_file"])
                free = min(free, int(limit) - used)
    except (OSError, ValueError, KeyError):
        pass  # no cgroups of version 2 here
    return max(0, free)
