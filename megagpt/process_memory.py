"""This process's memory: how much it may still take, how much it took at most, and how its allocator behaves."""

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

import psutil
import torch

# Parts of the messages with which allocators and libraries say that memory ran out, but not as torch.OutOfMemoryError.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "OutOfMemoryError")
# Memory of a GPU that this process itself may hold beside PyTorch's tensors when a run begins: CUDA's context (bytes).
_CONTEXT_BYTES = 1e9
# Names of the allocator's settings. PyTorch 2.11 to 2.13 read both.
_ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


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


def use_expandable_segments() -> None:
    """Let PyTorch's allocator on a GPU extend the segments that it has, instead of adding one that fits: tensors of
    other sizes, such as those of a validation between steps, then leave no gaps. To be called before the first use of a
    GPU. Does nothing if the user has configured the allocator, nor on systems that are known to have trouble with it:
    Windows, also below Linux (pytorch/pytorch#192330), and ROCm before 7.0 (pytorch/pytorch#179930)."""
    if sys.platform != "linux" or torch.version.hip is not None or "microsoft" in platform.release().lower():
        return
    if not _ALLOCATOR_VARIABLES & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


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


def gpu_memory(device: torch.device) -> float | None:
    """Bytes of a GPU that this process may use: all of them, but for what other programs hold; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return float(total - others if others > _CONTEXT_BYTES else total)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out. A compiler wraps the error in its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return says_out_of_memory(str(error)) or is_out_of_memory(error.__cause__)


def says_out_of_memory(text: str) -> bool:
    """Whether an error's message means that memory ran out."""
    return any(part in text for part in _OUT_OF_MEMORY)
