"""The rates that floors are computed with: from the data sheet or the config, else measured."""

from typing import NamedTuple

import torch
from torch import Tensor

from megagpt.config import Config
from megagpt.engines.engine import DTYPES
from megagpt.hardware import memory_bandwidth, peak_flops
from megagpt.timing import time_call

DATA_SHEET, _MEASURED = "data sheet", "measured"
# Rows of the square matrices that are multiplied, by device: large enough to reach the full rate.
_ROWS = {"cpu": 1024, "cuda": 8192}
# Bytes of the tensor that is copied; it and its copy are more than a cache holds.
_COPIED = 2**27


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
    """Takes about a second if a rate must be measured. To be called before the model is built: measuring needs memory,
    and on a GPU it sets the peak of PyTorch's memory back."""
    precision, given = config.train.precision, config.log.peak_tflops
    flops, source = peak_flops(device, precision, given), "log.peak_tflops" if given else DATA_SHEET
    bandwidth, other = memory_bandwidth(device), DATA_SHEET
    is_measured = None in (flops, bandwidth)
    if flops is None:
        flops, source = _product_rate(DTYPES[precision], device), _MEASURED
    if bandwidth is None:
        bandwidth, other = _copy_rate(device), _MEASURED
    if is_measured and device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Rates(flops, source, bandwidth, other)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    rows = _ROWS[device.type]
    one, two = _normal((rows, rows), dtype, device), _normal((rows, rows), dtype, device)
    product = torch.empty_like(one)
    return 2 * rows**3 / time_call(lambda: torch.mm(one, two, out=product), device)


def _copy_rate(device: torch.device) -> float:
    origin = _normal((_COPIED // 4,), torch.float32, device)
    copy = torch.empty_like(origin)
    return 2 * _COPIED / time_call(lambda: copy.copy_(origin), device)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal values: constant ones cost a GPU less power, so its clock would be higher than in training. They come from
    a generator of their own, so that a run draws the same numbers as without a profile."""
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(0))
