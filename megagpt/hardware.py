"""Accelerators by name: dense peak rates and memory. Unknown hardware is None, never a guess."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Accelerator:
    """Vendor data-sheet numbers, dense (without sparsity)."""

    bf16_flops: float
    """FLOP/s of bf16 matrix products with fp32 accumulation."""
    fp32_flops: float
    """FLOP/s of fp32 products as PyTorch runs them by default (no TF32)."""


# From NVIDIA's data sheets. The first key that is part of the device's name counts.
_ACCELERATORS = {
    "H200": Accelerator(989.4e12, 66.9e12),  # GH200 too: the same chip
    "H100 PCIe": Accelerator(756e12, 51.2e12),
    "H100 NVL": Accelerator(835e12, 60e12),
    "H100": Accelerator(989.4e12, 66.9e12),
    "A100": Accelerator(312e12, 19.5e12),
    "L40S": Accelerator(362e12, 91.6e12),
}
# Memory of the largest of them, an H200 (GB).
LARGEST_GPU_GB = 141.0


@functools.cache
def device_name(device: torch.device) -> str:
    """The device's own name; for a CPU, just "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device in a precision ("fp32", "bf16"); None if it is unknown."""
    name = device_name(device)
    for key, accelerator in _ACCELERATORS.items():
        if key in name:
            return accelerator.bf16_flops if precision == "bf16" else accelerator.fp32_flops
    return None
