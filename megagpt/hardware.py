"""This machine's devices: names, and rates of those that are known. Unknown hardware is None, never a guess."""

import functools

import torch

from megagpt.cards import CARDS, card

# Memory of the largest known card (GB).
LARGEST_GPU_GB = max(entry.memory for entry in CARDS.values())


@functools.cache
def device_name(device: torch.device) -> str:
    """The device's own name; for a CPU, just "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device, precision: str, given_tflops: float = 0) -> float | None:
    """Peak FLOP/s of the device in a precision ("fp32", "bf16", "fp16"); None if it is unknown. `given_tflops`: what
    the user knows of it (TFLOP/s); 0: nothing."""
    if given_tflops:
        return given_tflops * 1e12
    found = card(device_name(device))
    if found is None or (precision == "bf16" and not found.has_bf16):
        return None
    return float(round(1e12 * (found.fp32 if precision == "fp32" else found.half)))


def memory_bandwidth(device: torch.device) -> float | None:
    """Peak bytes/s of the device's memory; None if it is unknown."""
    found = card(device_name(device))
    return None if found is None else float(round(1e12 * found.bandwidth))
