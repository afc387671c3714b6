"""GPUs and clusters that a plan is made for."""

import dataclasses
from dataclasses import dataclass

from megagpt import cards
from megagpt.cards import CARDS
from megagpt.errors import UserError, did_you_mean

CPU = "cpu"
"""Name of a device for which only a run of its own tells a speed."""
_DATA_SHEET, _GIVEN = "data sheet", "given"
# Names in use that are no card's own -> the card's.
_ALIASES = {
    "h100-80gb": "h100", "h100-sxm": "h100", "h100-sxm5": "h100", "h200-141gb": "h200", "h200-sxm": "h200",
    "a100-sxm": "a100-80gb", "a100-80": "a100-80gb", "a100-40": "a100-40gb", "v100": "v100-32gb", "4090": "rtx-4090",
    "3090": "rtx-3090", "a6000": "rtx-a6000", "mi300": "mi300x", "mi325": "mi325x",
}  # fmt: skip
# Two cards have the name "A100"; their users call them by their memory.
_RENAMED = {"a100": "a100-40gb", "v100": "v100-16gb", "a800": "a800-40gb"}


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
    network: float
    """Usual network of its servers (Gbit/s a GPU): an assumption."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability; None: not of NVIDIA's, or unknown."""
    origins: tuple[tuple[str, str], ...] = ()
    """Origin of each figure, by its name: "data sheet" or "given"."""

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
        for name in ("gpus", "per_node"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')} {getattr(self, name)}: give a whole number above 0")
        if not self.network:
            object.__setattr__(self, "network", self.gpu.network)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


def gpu_names() -> list[str]:
    return list(_cards())


def find_gpu(name: str, **figures: float) -> Gpu:
    """The GPU of that name, in any common spelling; `figures` (fields of Gpu, in its units) replace the data sheet's.
    An unknown name needs all of memory, half, bandwidth and link. Raises UserError with the nearest names, or with the
    figures that are missing."""
    key = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-").removeprefix("amd-")
    key = _ALIASES.get(key, key)
    known = _cards().get("a100-80gb" if key == "a100" else key)
    if known is None:
        missing = [field for field in ("memory", "half", "bandwidth", "link") if field not in figures]
        if missing:
            near = did_you_mean(key, [*_cards(), *_ALIASES])
            raise UserError(f"unknown GPU {name!r}: {near}; for another GPU, give its {', '.join(missing)}")
        known = Gpu(name, 0, 0, 0, 0, 0, 0, 100)
        figures.setdefault("fp32", figures["half"] / 16)
    origins = tuple(
        (field.name, _GIVEN if field.name in figures else _DATA_SHEET)
        for field in dataclasses.fields(Gpu)
        if field.name not in ("name", "origins")
    )
    return dataclasses.replace(known, **figures, origins=origins)  # type: ignore[arg-type]


def _cards() -> dict[str, Gpu]:
    found = {}
    for words, card in CARDS.items():
        key = words.lower().replace(" ", "-")
        gb, tera, giga = 1e9, 1e12, 1e9
        found[_RENAMED.get(key, key)] = Gpu(
            _RENAMED.get(key, key), card.memory * gb, card.half * tera, card.fp32 * tera, card.bandwidth * tera,
            card.link * giga, card.watts, card.network, card.capability,
        )  # fmt: skip
    return found


def gpu_of_device(device: str, memory: float | None = None) -> Gpu | None:
    """The GPU that a driver calls `device`; None if its figures are unknown. `memory`: bytes that it reports."""
    found = cards.card(device)
    if found is None:
        return None
    key = next(words for words, entry in CARDS.items() if entry is found).lower().replace(" ", "-")
    return find_gpu(_RENAMED.get(key, key), **({} if memory is None else {"memory": memory}))
