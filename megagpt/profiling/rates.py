"""The rates that floors are computed with: from the data sheet or the config, else measured."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from megagpt.config import Config
from megagpt.engines.engine import DTYPES
from megagpt.hardware import memory_bandwidth, peak_flops

_TRIES = 5
# Rows of the square matrices that are multiplied, by device: large enough to reach the full rate.
_ROWS = {"cpu": 1024, "cuda": 8192}
# Bytes of the tensor that is copied: more than any cache holds.
_COPIED = 2**28


class Rates(NamedTuple):
    """The most that a device can do."""

    flops: float
    """FLOP/s of matrix products in the run's precision."""
    flops_source: str
    bandwidth: float
    """Bytes/s that the device reads from its memory and writes to it."""
    bandwidth_source: str

    def __str__(self) -> str:
        products = f"{self.flops / 1e12:,.4g} TFLOP/s ({self.flops_source})"
        return f"{products}, {self.bandwidth / 1e9:,.4g} GB/s ({self.bandwidth_source})"


def find_rates(config: Config, device: torch.device) -> Rates:
    """Takes about a second if a rate must be measured."""
    precision, given = config.train.precision, config.log.peak_tflops
    flops, source = peak_flops(device, precision, given), "log.peak_tflops" if given else "data sheet"
    if flops is None:
        matrix = torch.full((_ROWS[device.type],) * 2, 0.5, dtype=DTYPES[precision], device=device)
        product = torch.empty_like(matrix)
        flops, source = 2 * len(matrix) ** 3 / _best(lambda: torch.mm(matrix, matrix, out=product), device), "measured"
    bandwidth, other = memory_bandwidth(device), "data sheet"
    if bandwidth is None:
        one = torch.zeros(_COPIED // 4, device=device)
        two = torch.zeros_like(one)
        bandwidth, other = 2 * _COPIED / _best(lambda: two.copy_(one), device), "measured"
    return Rates(flops, source, bandwidth, other)


def _best(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call, after one to warm up."""
    seconds = []
    for _ in range(_TRIES + 1):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
