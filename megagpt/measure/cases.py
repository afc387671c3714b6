"""The compared cases: engines, micro-batches in a step, activation checkpointing, precision."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megagpt.config import Config
from megagpt.config_file import build_config
from megagpt.data.loader import Batch

STEPS = 20
# Steps before the save, in cases that save.
SAVED_AT = 10
_BATCH = 16
_MODEL = {"layers": 3, "width": 64, "heads": 4, "context": 32, "vocab_size": 500}
LR = 3e-3
CLIP = 0.2

Curve = list[tuple[float, float]]  # loss and gradient norm of each step


class EngineCase(NamedTuple):
    """An engine with its settings, and its number of ranks. Names of layouts: "2 x 2" is 2 copies of the model over 2
    ranks each, "2 x 2 tensor" is 2 groups of 2 tensor ranks."""

    name: str
    ranks: int
    engine: dict[str, Any]

    @property
    def fixed(self) -> bool:
        """Whether the settings are a layout of exactly that many ranks."""
        return "tensor_ranks" in self.engine


# Settings under which every parameter is partitioned, even the smallest bias.
_ALL_PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
_ENGINES = (
    EngineCase("ddp", 2, {"name": "ddp"}),
    EngineCase("fsdp", 2, {"name": "fsdp"}),
    EngineCase("fsdp hybrid 2 x 2", 4, {"name": "fsdp", "shard_ranks": 2}),
    EngineCase("fsdp 1 x 2 tensor", 2, {"name": "fsdp", "tensor_ranks": 2}),
    EngineCase("fsdp 1 x 4 tensor", 4, {"name": "fsdp", "tensor_ranks": 4}),
    EngineCase("fsdp 2 x 2 tensor", 4, {"name": "fsdp", "tensor_ranks": 2}),
    EngineCase("fsdp hybrid 2 x 2 tensor", 4, {"name": "fsdp", "shard_ranks": 2, "tensor_ranks": 2}),
    EngineCase("zero-1", 2, {"name": "zero", "stage": 1}),
    EngineCase("zero-2", 2, {"name": "zero", "stage": 2}),
    EngineCase("zero-3", 2, {"name": "zero", "stage": 3, "deepspeed": _ALL_PARTITIONED}),
    EngineCase(
        "zero-3 2 x 2 tensor", 4, {"name": "zero", "stage": 3, "tensor_ranks": 2, "deepspeed": _ALL_PARTITIONED}
    ),
)
ENGINE_CASES = {case.name: case for case in _ENGINES}
# Micro-batches in a step, and activation checkpointing.
WAYS = [(accumulation, mode) for accumulation in (1, 4) for mode in ("none", "full", "selective")]


@dataclasses.dataclass(frozen=True)
class Case:
    """One run."""

    engine: dict[str, Any]
    ranks: int
    accumulation: int = 1
    activation_checkpointing: str = "none"
    precision: str = "fp32"
    device: str = "cpu"
    compile: bool = False
    residual: str = "fp32"
    runs: tuple[str, ...] = ()
    """Folders of runs: where to save, or what to resume."""
    steps: int = STEPS
    """Steps that are compared; if it saves, those after the save."""
    saved_at: int = SAVED_AT
    """Steps before the save, if it saves or resumes."""
    timed: bool = False
    """Whether the time of a step is measured as well as the memory."""

    @property
    def shares(self) -> int:
        """Parts into which the batch is dealt, one for each group of tensor ranks."""
        return self.ranks // self.engine.get("tensor_ranks", 1)

    def config(self) -> Config:
        """The case's config, in which every step is clipped: the gradient's norm stays above `CLIP`."""
        keys = ("precision", "device", "activation_checkpointing", "compile", "residual")
        train = {key: getattr(self, key) for key in keys}
        batch_tokens = _BATCH * _MODEL["context"]
        train |= {"tokens": self.steps * batch_tokens, "batch_tokens": batch_tokens}
        train["micro_batch"] = _BATCH // self.shares // self.accumulation
        optimizer = {"lr": LR, "clip_norm": CLIP}
        return build_config({"model": _MODEL, "engine": self.engine, "optimizer": optimizer, "train": train}, "parity")


def rows(step: int) -> Tensor:
    """A step's whole batch, int64 (16, 33): each token is drawn, then repeated, so that there is something to learn."""
    drawn = np.random.default_rng([step]).integers(_MODEL["vocab_size"], size=(_BATCH, 17))
    return torch.from_numpy(drawn.repeat(2, axis=1)[:, :33])


def share(step: int, rank: int, case: Case) -> Batch:
    """A rank's share of a step's batch."""
    return share_of(rows(step), rank, case)


def share_of(whole: Tensor, rank: int, case: Case) -> Batch:
    """A rank's share of a whole batch, int64 (sequences, context + 1)."""
    mine = whole[rank * case.shares // case.ranks :: case.shares]
    pieces = mine.split(len(mine) // case.accumulation)
    return Batch([(p[:, :-1], p[:, 1:].contiguous()) for p in pieces], len(whole), whole[:, 1:].numel())


def difference(curve: Curve, reference: Curve) -> tuple[float, float]:
    """Largest absolute difference of the losses, and of the norms."""
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(curve, reference, strict=True)) for i in (0, 1))
    return loss, norm
