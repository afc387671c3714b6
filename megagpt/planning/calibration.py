"""The constants of the speed formulas, each with its origin, and the settings for which speeds have been published.

"Rows" are the 188 published speeds of tests/planning/published_speeds.csv. `python -m tests.planning.fit_speed` fits
the constants to them again."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from megagpt.planning.gpus import Gpu

ASSUMED = "assumed"


@dataclass(frozen=True)
class Calibration:
    """Constants of `speed.py`, for one GPU."""

    products: float
    """Share of the GPU's peak that large matrix products reach."""
    attention: float
    """Share of the peak that attention kernels reach, counting the causal half."""
    products_origin: str = ASSUMED
    half_tokens: float = 136
    """Tokens in a micro-batch with which products reach half of their rate."""
    other_bytes: float = 261
    """Bytes moved a token, block and width, by all that is neither product nor attention."""
    logit_bytes: float = 47.0
    """Bytes moved a logit."""
    weight_bytes: float = 11.5
    """Bytes moved a parameter in each micro-batch: casts, copies of gathered weights, sums of gradients."""
    update_bytes: float = 30
    """Bytes moved a parameter by the norm and AdamW."""
    link_share: float = 0.885
    """Share of the link's data sheet that an exchange in a node reaches."""
    network_share: float = 0.85
    """Share of the node's network that an exchange between nodes reaches."""
    hop: float = 6.42e-6
    """Seconds for each rank beyond the node that a gather or scatter has to pass."""
    call: float = 2e-5
    """Seconds of an exchange of tensor ranks that carries nothing."""
    overlap: float = 0.445
    """Share of the shorter one of computation and exchange that the longer one does not hide (FSDP, DDP)."""
    zero_overlap: float = 1.0
    """The same under ZeRO: nothing is hidden."""
    float8: float = 1.54
    """Speed of a block's products in float8, over that in bf16, scaled by tensor; by row, half of the gain."""
    bf16_residual: float = 0.93
    """Share of `other_bytes` that is left if the residual stream is bf16."""
    fp32_values: float = 1.6
    """`other_bytes` in fp32, over those in bf16."""
    dropout: float = 1.15
    """`other_bytes` with dropout, over those without: masks of both branches."""
    launch: float = 5e-4
    """Seconds in which the host launches a block's forward and backward pass."""
    pcie: float = 2.5e10
    """Bytes/s between a GPU and its host."""
    host_memory: float = 2e10
    """Bytes/s of a host's memory, for each of its GPUs."""
    disk: float = 2e9
    """Bytes/s of a node's disks, for each of its GPUs."""
    factor: float = 1.0
    """Seconds of a run's own step, measured over predicted."""
    run: str = ""
    """Name of that run; empty: not calibrated with one."""


_ROWS, _COUNTED = "rows", "counted"
ORIGINS = {
    "half_tokens": _ROWS,
    "other_bytes": _ROWS,
    "logit_bytes": _ROWS,
    "weight_bytes": _ROWS,
    "update_bytes": "counted: AdamW reads 16 and writes 12; the norm reads 4, of which half are cached",
    "link_share": "rows on one node",
    "network_share": "ZeRO++'s 20 rows with 6 and 25 Gbit/s a GPU, whose shapes are unknown: 0.75 to 1.0",
    "hop": "rows on 16 to 1,024 GPUs",
    "overlap": "rows of FSDP",
    "zero_overlap": "DeepSpeed's Azure rows, and its default outside stage 3",
    "float8": "5 rows of llm-foundry in float8",
    "bf16_residual": "counted; rows with a bf16 residual stream give 0.94 to 0.97",
    "fp32_values": "counted",
    "dropout": "counted",
    "call": ASSUMED, "launch": ASSUMED, "pcie": ASSUMED, "host_memory": ASSUMED, "disk": ASSUMED,
}  # fmt: skip

# Shares of the peak, by GPU: of products and of attention (FlashAttention of 2023; newer kernels are faster).
_SHARES = {
    "a100-40gb": (0.755, 0.314, "91 rows of llm-foundry on A100"),
    "a100-80gb": (0.755, 0.314, "91 rows of llm-foundry on A100"),
    "h100": (0.628, 0.179, "46 rows of llm-foundry on H100"),
}
# The same for GPUs without rows: 0.8 of the fastest product that was measured on the GPU itself, which is 0.78 on H100
# and 0.88 on A100. MI300X: AMD's blog on max-achievable FLOPs; the others: stas00/ml-engineering, compute/accelerator.
_FASTEST = {"h200": 794.5, "gh200": 821, "b200": 1745, "mi300x": 708}
_OF_FASTEST = 0.8
# Shares of the peak for all other GPUs.
_PRODUCTS, _ATTENTION = 0.6, 0.2


def calibration_of(gpu: Gpu) -> Calibration:
    """The constants for a GPU: by its own rows if it has any, else assumed."""
    if gpu.name in _SHARES:
        return Calibration(*_SHARES[gpu.name])
    if gpu.name in _FASTEST:
        fastest = _FASTEST[gpu.name]
        origin = f"{ASSUMED}: {_OF_FASTEST:g} of {fastest:,.0f} TFLOP/s, the fastest product measured on this GPU"
        return Calibration(_OF_FASTEST * fastest * 1e12 / gpu.half, _ATTENTION, origin)
    return Calibration(_PRODUCTS, _ATTENTION)


def calibrated(calibration: Calibration, factor: float, run: str) -> Calibration:
    """The same constants after a run: every part takes `factor` times as long, its measured over its predicted time."""
    return dataclasses.replace(calibration, factor=calibration.factor * factor, run=run)


class Evidence(NamedTuple):
    """Settings for which speeds have been published, as ranges over the rows, and how well the formulas met them when
    they had not seen them."""

    gpu: str
    engine: str
    parameters: tuple[float, float]
    gpus: tuple[int, int]
    context: tuple[int, int]
    tokens: tuple[int, int]
    """Tokens in a micro-batch."""
    network: float
    """Gbit/s a GPU."""
    rows: int
    range: tuple[float, float]
    """Measured over predicted tokens/s: 80% of the rows lie between these."""
    source: str


_FOUNDRY, _AZURE = "llm-foundry", "DeepSpeed's measurements on Azure"
EVIDENCE = (
    Evidence(
        "a100-40gb", "fsdp", (1.2e8, 6.5e10), (8, 128), (512, 32768), (4096, 53248), 200, 51, (0.95, 1.05), _FOUNDRY
    ),
    Evidence(
        "a100-80gb", "fsdp", (1.2e8, 6.5e10), (8, 32), (512, 65536), (4096, 98304), 200, 40, (0.95, 1.08), _FOUNDRY
    ),
    Evidence("h100", "fsdp", (7.5e8, 6.5e10), (8, 512), (512, 65536), (4096, 98304), 400, 46, (0.95, 1.05), _FOUNDRY),
    Evidence(
        "a100-80gb", "zero-3", (1.7e11, 1.8e11), (128, 1024), (512, 1024), (512, 16384), 200, 37, (0.9, 1.1), _AZURE
    ),
)
