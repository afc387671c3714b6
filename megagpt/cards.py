"""GPUs by name: rates, memory and links. An unknown card is None, never a guess."""

import re
from typing import NamedTuple


class Card(NamedTuple):
    """A GPU's figures, from its maker's data sheet, but for `memory`."""

    half: float
    """Dense bf16 and fp16 products with fp32 sums, without sparsity (TFLOP/s)."""
    fp32: float
    """Products in fp32, as PyTorch runs them by default: no TF32 (TFLOP/s)."""
    bandwidth: float
    """Of its memory (TB/s)."""
    memory: float
    """Memory that a program can use, as CUDA and ROCm report it (GB of 1e9 bytes)."""
    link: float
    """To the other GPUs of its node, one way: NVLink, Infinity Fabric, or PCIe for cards that have neither (GB/s)."""
    watts: float
    """Largest power."""
    network: float
    """Usual network of its servers: an assumption, not a figure of the card (Gbit/s a GPU)."""
    capability: tuple[int, int] | None
    """CUDA's compute capability; None: not of NVIDIA's."""

    @property
    def has_bf16(self) -> bool:
        return self.capability is None or self.capability >= (8, 0)


# Smallest compute capability of products in float8, by their scaling: 8.9 is the first that has such products. torchao
# tests rowwise scaling from 9.0 on.
FLOAT8_CAPABILITIES = {"tensorwise": (8, 9), "rowwise": (9, 0)}

# Words of the device's name -> its figures. The first entry whose words are all in the name counts, so a variant comes
# before the card that it is one of.
CARDS = {
    "GB300": Card(2500, 80, 8.0, 288, 900, 1400, 800, (10, 3)),
    "GB200": Card(2500, 80, 8.0, 198, 900, 1200, 400, (10, 0)),
    "B300": Card(2250, 75, 8.0, 288, 900, 1100, 800, (10, 3)),
    "B200": Card(2250, 75, 8.0, 191, 900, 1000, 400, (10, 0)),
    "GH200 144G": Card(989.4, 66.9, 4.9, 150, 450, 900, 400, (9, 0)),
    "GH200": Card(989.4, 66.9, 4.0, 101, 450, 900, 400, (9, 0)),
    "H200 NVL": Card(835, 60, 4.8, 150, 450, 600, 200, (9, 0)),
    "H200": Card(989.4, 66.9, 4.8, 150, 450, 700, 400, (9, 0)),
    "H100 PCIe": Card(756, 51.2, 2.0, 85, 64, 350, 200, (9, 0)),
    "H100 NVL": Card(835, 60, 3.9, 100, 64, 400, 200, (9, 0)),
    "H100": Card(989.4, 66.9, 3.35, 85, 450, 700, 400, (9, 0)),
    "H800 PCIe": Card(756, 51.2, 2.0, 85, 64, 350, 200, (9, 0)),
    "H800": Card(989.4, 66.9, 3.35, 85, 200, 700, 400, (9, 0)),
    "H20 3e": Card(148, 44, 4.8, 150, 450, 500, 400, (9, 0)),
    "H20": Card(148, 44, 4.0, 102, 450, 400, 400, (9, 0)),
    "A100 80GB PCIe": Card(312, 19.5, 1.935, 85, 32, 300, 100, (8, 0)),
    "A100 80GB": Card(312, 19.5, 2.039, 85, 300, 400, 200, (8, 0)),
    "A100 PCIe": Card(312, 19.5, 1.555, 42.3, 32, 250, 100, (8, 0)),
    "A100": Card(312, 19.5, 1.555, 42.3, 300, 400, 200, (8, 0)),
    "A800 80GB PCIe": Card(312, 19.5, 1.935, 85, 32, 300, 100, (8, 0)),
    "A800 80GB": Card(312, 19.5, 2.039, 85, 200, 400, 200, (8, 0)),
    "A800": Card(312, 19.5, 1.555, 42.3, 200, 400, 200, (8, 0)),
    "A40": Card(149.7, 37.4, 0.696, 47.7, 32, 300, 100, (8, 6)),
    "A30": Card(165, 10.3, 0.933, 25.2, 32, 165, 100, (8, 0)),
    "A10": Card(125, 31.2, 0.6, 23.6, 32, 150, 25, (8, 6)),
    "L40S": Card(362, 91.6, 0.864, 47.7, 32, 350, 100, (8, 9)),
    "L40": Card(181, 90.5, 0.864, 47.7, 32, 300, 100, (8, 9)),
    "L4": Card(121, 30.3, 0.3, 23.6, 32, 72, 25, (8, 9)),
    "RTX A6000": Card(154.8, 38.7, 0.768, 51, 32, 300, 25, (8, 6)),
    "RTX 4090": Card(165.2, 82.6, 1.008, 25.3, 32, 450, 25, (8, 9)),
    "RTX 3090": Card(71, 35.6, 0.936, 25.3, 32, 350, 25, (8, 6)),
    "V100 PCIE 32GB": Card(112, 14, 0.9, 34, 16, 250, 25, (7, 0)),
    "V100 PCIE": Card(112, 14, 0.9, 16.9, 16, 250, 25, (7, 0)),
    "V100 32GB": Card(125, 15.7, 0.9, 34, 150, 300, 50, (7, 0)),
    "V100": Card(125, 15.7, 0.9, 16.9, 150, 300, 50, (7, 0)),
    "T4": Card(65, 8.1, 0.32, 15.6, 16, 70, 25, (7, 5)),
    "MI300X": Card(1307.4, 163.4, 5.3, 206, 448, 750, 400, None),
    "MI325X": Card(1307.4, 163.4, 6.0, 274, 448, 1000, 400, None),
}
# Words of other variants, which have the name of a card above in their own: a slice of a card, a laptop's chip, a card
# made for one computer centre. A word that an entry has itself is none.
_VARIANT = re.compile(r"mig|grid|\d+[abcq]\d?|laptop|max|d|ti|nvl|fhhl|64gb")


def card(device_name: str) -> Card | None:
    """The card that a driver calls `device_name`: an "NVIDIA RTX A1000" is no A100."""
    key = card_name(device_name)
    return None if key is None else CARDS[key]


def card_name(device_name: str) -> str | None:
    """Its key in `CARDS`."""
    words = set(re.findall(r"\w+", device_name.lower()))
    for key in CARDS:
        if words.issuperset(own := key.lower().split()):
            return None if any(map(_VARIANT.fullmatch, words.difference(own))) else key
    return None
