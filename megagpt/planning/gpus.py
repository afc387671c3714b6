"""GPUs and clusters that a plan is made for."""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass

from megagpt.cards import CARDS, card_name
from megagpt.errors import UserError, did_you_mean

CPU = "cpu"
"""Name of a device for which only a run of its own tells a speed."""
_DATA_SHEET, _GIVEN, _ASSUMED = "data sheet", "given", "assumed"
# Names of a `megagpt.cards` entry in lower case that do not tell two cards apart -> the name here.
_RENAMED = {
    "a100": "a100-40gb",
    "a100-pcie": "a100-40gb-pcie",
    "a800": "a800-40gb",
    "v100": "v100-16gb",
    "v100-pcie": "v100-pcie-16gb",
}
# Other names in use. A bare "a100" or "v100" is the card that most clusters have.
_ALIASES = {
    "a100": "a100-80gb", "a100-80": "a100-80gb", "a100-40": "a100-40gb", "a800": "a800-80gb", "v100": "v100-32gb",
    "a6000": "rtx-a6000", "4090": "rtx-4090", "rtx4090": "rtx-4090", "3090": "rtx-3090", "rtx3090": "rtx-3090",
}  # fmt: skip
# Words of a driver's or a shop's name that tell no cards apart; 480 GB are of a GH200's host.
_NO_VARIANT = re.compile(r"nvidia|tesla|amd|instinct|geforce|gpu|oam|ac|480gb|sxm\d*|hbm\d\w*")
# A size in a name may differ by this share from the memory that CUDA reports.
_SIZE_TOLERANCE = 0.08
# Figures that an unknown GPU needs -> the option of `megagpt plan` that gives each.
_NEEDED = {
    "memory": "--gpu-memory", "half": "--gpu-tflops", "bandwidth": "--gpu-bandwidth", "link": "--gpu-link",
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A GPU's figures."""

    name: str
    memory: float
    """Bytes that a program can use, as CUDA reports them."""
    half: float
    """FLOP/s of dense products in bf16 and fp16."""
    fp32: float
    """FLOP/s of products in fp32, without TF32."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s to the other GPUs of its node, one way."""
    watts: float
    """Largest power; 0: unknown."""
    network: float
    """Usual network of its servers (Gbit/s a GPU): an assumption."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability; None: not of NVIDIA's, or unknown."""
    origins: tuple[tuple[str, str], ...] = ()
    """Origin of each figure, by its name: "data sheet", "given" or "assumed"."""

    @property
    def has_bf16(self) -> bool:
        return self.capability is None or self.capability >= (8, 0)

    def peak(self, precision: str) -> float:
        """FLOP/s of products in "fp32", "bf16" or "fp16"."""
        return self.fp32 if precision == "fp32" else self.half


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes."""

    gpu: Gpu
    gpus: int
    per_node: int = 8
    network: float = 0
    """Gbit/s a GPU between nodes; 0: that of the GPU's usual servers."""

    def __post_init__(self) -> None:
        for count, words in ((self.gpus, "GPUs"), (self.per_node, "GPUs of a node")):
            if count < 1:
                raise UserError(f"number of {words} {count}: give a whole number above 0")
        if not 0 <= self.network < math.inf:
            raise UserError(f"network of {self.network} Gbit/s a GPU: give a number above 0")
        if not self.network:
            object.__setattr__(self, "network", self.gpu.network)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


def find_gpu(name: str, **figures: float) -> Gpu:
    """The GPU of that name, in any common spelling or as its driver calls it; `figures`, fields of `Gpu` in its units,
    replace those of the data sheet. An unknown name needs memory, half, bandwidth and link. Raises UserError with the
    nearest names and the figures that are missing."""
    for field, value in figures.items():
        if not 0 < value < math.inf:
            raise UserError(f"{field} {value} of GPU {name}: give a number above 0")
    known, key = _known_gpus(), _known_name(name)
    origins = dict.fromkeys((*_NEEDED, "fp32", "watts"), _DATA_SHEET) | {"network": _ASSUMED}
    if key:
        found = known[key]
    else:
        missing = [option for field, option in _NEEDED.items() if field not in figures]
        if missing:
            near = did_you_mean(_spelled(name), known)
            raise UserError(f"unknown GPU {name!r}: {near}; for another GPU, give its figures: {', '.join(missing)}")
        # A sixteenth is the least share of fp32's rate in the table.
        found = Gpu(name, 0, 0, figures["half"] / 16, 0, 0, watts=0, network=100)
        origins |= {"fp32": _ASSUMED, "watts": _ASSUMED}
    origins |= dict.fromkeys(figures, _GIVEN)
    return dataclasses.replace(found, **figures, origins=tuple(origins.items()))  # type: ignore[arg-type]


def gpu_of_device(device: str, memory: float | None = None) -> Gpu | None:
    """The GPU that a driver calls `device`; None if its figures are unknown. `memory`: bytes that it reports."""
    entry = card_name(device)
    return None if entry is None else find_gpu(_name_of(entry), **({} if memory is None else {"memory": memory}))


def gpu_names() -> list[str]:
    """All names that need no figures."""
    return list(_known_gpus())


def _spelled(name: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def _known_name(name: str) -> str | None:
    key = _spelled(name)
    key = _ALIASES.get(key, key)
    if key in _known_gpus():
        return key
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    entry = card_name(" ".join(words))
    if entry is None:
        return None
    key = _name_of(entry)
    for word in words.difference(entry.lower().split()):
        size = re.fullmatch(r"(\d+)gb?", word)
        stated = float(size[1]) * 1e9 if size else 0.0
        is_its = abs(stated / _known_gpus()[key].memory - 1) < _SIZE_TOLERANCE
        if not (is_its or _NO_VARIANT.fullmatch(word)):
            return None
    return key


def _name_of(entry: str) -> str:
    """The name of an entry of `CARDS`."""
    key = entry.lower().replace(" ", "-")
    return _RENAMED.get(key, key)


@functools.cache
def _known_gpus() -> dict[str, Gpu]:
    found = {}
    for entry, card in CARDS.items():
        name = _name_of(entry)
        found[name] = Gpu(
            name, card.memory * 1e9, card.half * 1e12, card.fp32 * 1e12, card.bandwidth * 1e12, card.link * 1e9,
            card.watts, card.network, card.capability,
        )  # fmt: skip
    return found
