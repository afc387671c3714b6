"""Accelerators by name: dense peak rates, memory and its bandwidth. Unknown hardware is None, never a guess."""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Peak(NamedTuple):
    """Dense peak rates (TFLOP/s, without sparsity) of matrix products, from the makers' data sheets."""

    half: float
    """bf16 and fp16 with fp32 sums: the same rate on every card here."""
    fp32: float
    """As PyTorch runs them by default: no TF32."""
    has_bf16: bool = True


# Words of the device's name -> its rates. The first entry whose words are all in the name counts, so a variant comes
# before the card that it is one of.
_PEAKS = {
    "GB300": Peak(2500, 80),
    "GB200": Peak(2500, 80),
    "B300": Peak(2250, 75),
    "B200": Peak(2250, 75),
    "GH200": Peak(989.4, 66.9),
    "H200 NVL": Peak(835, 60),
    "H200": Peak(989.4, 66.9),
    "H100 PCIe": Peak(756, 51.2),
    "H100 NVL": Peak(835, 60),
    "H100": Peak(989.4, 66.9),
    "H800 PCIe": Peak(756, 51.2),
    "H800": Peak(989.4, 66.9),
    "H20": Peak(148, 44),
    "A100": Peak(312, 19.5),
    "A800": Peak(312, 19.5),
    "A40": Peak(149.7, 37.4),
    "A30": Peak(165, 10.3),
    "A10": Peak(125, 31.2),
    "L40S": Peak(362, 91.6),
    "L40": Peak(181, 90.5),
    "L4": Peak(121, 30.3),
    "RTX A6000": Peak(154.8, 38.7),
    "RTX 4090": Peak(165.2, 82.6),
    "RTX 3090": Peak(71, 35.6),
    "V100 PCIE": Peak(112, 14, has_bf16=False),
    "V100": Peak(125, 15.7, has_bf16=False),
    "T4": Peak(65, 8.1, has_bf16=False),
    "MI300X": Peak(1307.4, 163.4),
    "MI325X": Peak(1307.4, 163.4),
}
# Words of the device's name -> the bandwidth of its memory (TB/s), from the makers' data sheets; read as above.
_BANDWIDTHS = {
    "GB300": 8.0, "GB200": 8.0, "B300": 8.0, "B200": 8.0,
    "GH200 144G": 4.9, "GH200": 4.0,
    "H200 NVL": 4.8, "H200": 4.8, "H100 PCIe": 2.0, "H100 NVL": 3.9, "H100": 3.35, "H800 PCIe": 2.0, "H800": 3.35,
    "H20 3e": 4.8, "H20": 4.0,
    "A100 80GB PCIe": 1.935, "A100 80GB": 2.039, "A100": 1.555,
    "A800 80GB PCIe": 1.935, "A800 80GB": 2.039, "A800": 1.555,
    "A40": 0.696, "A30": 0.933, "A10": 0.6,
    "L40S": 0.864, "L40": 0.864, "L4": 0.3,
    "RTX A6000": 0.768, "RTX 4090": 1.008, "RTX 3090": 0.936,
    "V100": 0.9, "T4": 0.32,
    "MI300X": 5.3, "MI325X": 6.0,
}  # fmt: skip
# Words of other variants, which have the name of a card above in their own: a slice of a card, a laptop's chip, a card
# made for one computer centre. A word that an entry has itself is none.
_VARIANT = re.compile(r"mig|grid|\d+[abcq]\d?|laptop|max|d|ti|nvl|fhhl|64gb")
# Memory of the largest of them, a B300 (GB).
LARGEST_GPU_GB = 288.0


@functools.cache
def device_name(device: torch.device) -> str:
    """The device's own name; for a CPU, just "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device, precision: str, given_tflops: float = 0) -> float | None:
    """Peak FLOP/s of the device in a precision ("fp32", "bf16", "fp16"); None if it is unknown. `given_tflops`: what
    the user knows of it (TFLOP/s); 0: nothing."""
    if given_tflops:
        return given_tflops * 1e12
    found = _entry(_PEAKS, device)
    if found is None or (precision == "bf16" and not found.has_bf16):
        return None
    return float(round(1e12 * (found.fp32 if precision == "fp32" else found.half)))


def memory_bandwidth(device: torch.device) -> float | None:
    """Peak bytes/s of the device's memory; None if it is unknown."""
    found = _entry(_BANDWIDTHS, device)
    return None if found is None else float(round(1e12 * found))


def _entry(table: Mapping[str, T], device: torch.device) -> T | None:
    """The device's entry, by the words of its name: an "NVIDIA RTX A1000" is no A100."""
    words = set(re.findall(r"\w+", device_name(device).lower()))
    for key, entry in table.items():
        if words.issuperset(own := key.lower().split()):
            return None if any(map(_VARIANT.fullmatch, words.difference(own))) else entry
    return None
