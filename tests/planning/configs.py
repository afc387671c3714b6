"""Configs of any shape and setting, as a plan meets them."""

from typing import Any

from megagpt.config import Config
from megagpt.config_file import build_config
from megagpt.models.presets import PRESETS


def config(
    shape: dict[str, Any], engine: dict[str, Any], ranks: int, micro_batch: int, accumulation: int = 2, **train: Any
) -> Config:
    """A run that takes that many micro-batches a step on each of its ranks, or on each group of tensor ranks."""
    context = shape.get("context") or PRESETS[shape["preset"]].model.context
    batch = ranks // engine.get("tensor_ranks", 1) * micro_batch * accumulation * context
    sizes = {"micro_batch": micro_batch, "batch_tokens": batch, "tokens": 10 * batch}
    return build_config({"model": shape, "engine": engine, "train": sizes | train}, "plan")
