"""Accelerators by name: dense peak rates and memory. Unknown hardware is None, never a guess."""

import functools

import torch

# Dense FLOP/s (without sparsity) from NVIDIA's data sheets: of bf16 matrix products with fp32 accumulation, and of fp32
# products as PyTorch runs them by default (no TF32). The first key that is part of the device's name counts.
_PEAK_FLOPS = {
    "H200": (989.4e12, 66.9e12),  # GH200 too: the same chip
    "H100 PCIe": (756e12, 51.2e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989.4e12, 66.9e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
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
    for key, (bf16, fp32) in _PEAK_FLOPS.items():
        if key in name:
            return bf16 if precision == "bf16" else fp32
    return None
