"""The papers' sizes: name -> shape, with parameter and FLOP counts computed from the shape alone.

Sources: GPT-2 (Radford et al. 2019, Table 2), GPT-3 (Brown et al. 2020, Tables 2.1 and D.1).
Two rows of GPT-3's Table 2.1 contradict themselves; Table D.1's parameter totals decide:
XL has 16 heads of 128 (printed: 24), 13B has width 5120 (printed: 5140).
"""

import dataclasses
import math
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from megagpt.config_marks import Free, Recipe, Shape
from megagpt.divisors import near_divisors
from megagpt.errors import UserError, did_you_mean

SECTION = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True, config=SECTION)
class ModelConfig:
    """The shape of a GPT. Every count below follows from these fields alone."""

    layers: Shape[int] = Field(gt=0)
    """Transformer blocks."""
    width: Shape[int] = Field(gt=0)
    """Width of the residual stream, d_model. The MLP is 4 times as wide."""
    heads: Shape[int] = Field(gt=0)
    """Attention heads, each width / heads wide."""
    context: Shape[int] = Field(gt=0)
    """Longest sequence in tokens, n_ctx."""
    vocab_size: Shape[int] = Field(default=50257, gt=0)
    """Token ids in use: GPT-2's 50,000 merges, 256 bytes and the end-of-text token."""
    dropout: Recipe[float] = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout rate at the embedding, the attention weights and both residual branches. The GPT-3 paper gives none."""
    attention: Shape[Literal["dense", "banded"]] = "dense"
    """dense: every layer sees the whole past. banded: odd layers see the last `window` tokens only. The GPT-3 paper
    alternates the two, but names neither the layers nor the band's width: both are this project's choice."""
    window: Shape[int] = Field(default=256, gt=0)
    """Width of the band of banded layers in tokens, with the token itself."""
    preset: Free[str] = ""
    """Preset from which the fields above were taken; empty for a custom shape."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            near = near_divisors(self.width, self.heads)
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; heads {near} divide it")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: a multiple of 128, so that matrix kernels see aligned rows."""
        return -(-self.vocab_size // 128) * 128

    def is_banded(self, layer: int) -> bool:
        return self.attention == "banded" and layer % 2 == 1

    def ways_to_split(self) -> list[int]:
        """The numbers of tensor ranks that can share this model: each gets as many heads, tokens of the context and
        rows of the token embedding as the others."""
        common = math.gcd(self.heads, self.context, self.padded_vocab_size)
        return [size for size in range(1, common + 1) if common % size == 0]

    @property
    def block_parameters(self) -> int:
        """Exact number of parameters of one block, with biases and LayerNorms."""
        c = self.width
        layer_norm = 2 * c
        attention = (c * 3 * c + 3 * c) + (c * c + c)
        mlp = (c * 4 * c + 4 * c) + (4 * c * c + c)
        return 2 * layer_norm + attention + mlp

    @property
    def parameters(self) -> int:
        """Exact number with biases, LayerNorms and the tied head, without the vocabulary's padding rows."""
        final_norm = 2 * self.width
        return (self.vocab_size + self.context) * self.width + self.layers * self.block_parameters + final_norm

    @property
    def stored_parameters(self) -> int:
        """Parameters in memory: `parameters` and the vocabulary's padding rows."""
        return self.parameters + (self.padded_vocab_size - self.vocab_size) * self.width

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint's tensors: fp32 weights and both Adam moments."""
        return 12 * self.stored_parameters

    @property
    def flops_per_token(self) -> int:
        """Forward and backward FLOPs per token: 6 per multiplied parameter, plus attention over the full context. The
        convention of PaLM's appendix B: 12 L C T for the two attention products, no discount for causality. The
        embedding is looked up, not multiplied, so the tied table counts once. A banded layer counts its window."""
        multiplied = self.parameters - self.context * self.width
        banded = self.layers // 2 if self.attention == "banded" else 0
        seen = banded * min(self.window, self.context) + (self.layers - banded) * self.context
        return 6 * multiplied + 12 * self.width * seen


@dataclass(frozen=True)
class Preset:
    """One row of the papers' tables."""

    model: ModelConfig
    batch_tokens: int
    """Tokens in the global batch: the papers' 0.5M, 1M, 2M and 3.2M as whole numbers of sequences."""
    peak_lr: float | None
    """None if the paper does not publish it (GPT-2)."""
    paper_tokens: float | None
    """Tokens that the paper trained on; None if it does not publish them (GPT-2)."""

    @property
    def paper_flops(self) -> float | None:
        """6 N D, the convention of GPT-3's Table D.1."""
        return None if self.paper_tokens is None else 6.0 * self.model.parameters * self.paper_tokens


def _preset(name: str, layers: int, width: int, heads: int, batch_tokens: int, peak_lr: float | None) -> Preset:
    gpt3 = name.startswith("gpt3")
    model = ModelConfig(layers, width, heads, context=2048 if gpt3 else 1024, preset=name)
    return Preset(model, batch_tokens, peak_lr, 300e9 if gpt3 else None)


# Tokens in a batch. 3.2M is 1,536 sequences of 2,048: the multiple of 512 sequences nearest to the paper's number.
_HALF_M, _1M, _2M, _3M2 = 2**19, 2**20, 2**21, 1536 * 2048

_ROWS = [
    # name, layers, width, heads, batch tokens, peak learning rate
    _preset("gpt2-124m", 12, 768, 12, _HALF_M, None),
    _preset("gpt2-355m", 24, 1024, 16, _HALF_M, None),
    _preset("gpt2-774m", 36, 1280, 20, _HALF_M, None),
    _preset("gpt2-1558m", 48, 1600, 25, _HALF_M, None),
    _preset("gpt3-125m", 12, 768, 12, _HALF_M, 6.0e-4),
    _preset("gpt3-350m", 24, 1024, 16, _HALF_M, 3.0e-4),
    _preset("gpt3-760m", 24, 1536, 16, _HALF_M, 2.5e-4),
    _preset("gpt3-xl", 24, 2048, 16, _1M, 2.0e-4),
    _preset("gpt3-2.7b", 32, 2560, 32, _1M, 1.6e-4),
    _preset("gpt3-6.7b", 32, 4096, 32, _2M, 1.2e-4),
    _preset("gpt3-13b", 40, 5120, 40, _2M, 1.0e-4),
    _preset("gpt3-175b", 96, 12288, 96, _3M2, 0.6e-4),
]
PRESETS = {row.model.preset: row for row in _ROWS}


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises UserError with the nearest names if there is none."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: {did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def preset_fields(name: str) -> dict[str, object]:
    """A preset's shape as plain fields, which a config may override."""
    return dataclasses.asdict(get_preset(name).model)
