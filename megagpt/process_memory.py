"""This process's memory: how much it may still take, how much it took at most, and how its allocator behaves."""

import ctypes
import resource
import sys
from pathlib import Path

import psutil
import torch


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next step instead of returning them to the kernel. A training step on a
    CPU frees and allocates the same hundreds of MB again and again; fresh pages, which the kernel must zero, cost up to
    a third of the step. The peak does not change. Does nothing outside Linux with glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def free_memory() -> int:
    """Bytes of the host's memory that this process may still take, within the limits of its cgroups."""
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


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: allocated by PyTorch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
