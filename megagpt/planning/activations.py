"""Bytes that a block's forward pass keeps for its backward pass, by formula."""

from megagpt.config import Config

_RESIDUAL = {"fp32": 4, "bf16": 2}


def compute_bytes(config: Config) -> int:
    """Bytes of a number in the precision of matrix products."""
    return 4 if config.train.precision == "fp32" else 2


def saved_per_token(config: Config, mode: str) -> float:
    """Bytes a token that one block keeps. `mode`: none, selective or full."""
    c, h, a = config.model.width, config.model.heads, compute_bytes(config)
    stream = _RESIDUAL[config.train.residual]
    if mode == "full":
        return stream * c
    if mode == "selective":
        return c * (4 + 9 * a) + 4 * h
    return c * (8 + 14 * a) + 4 * h + 16


def saved_bytes(config: Config) -> float:
    """Bytes that all blocks of a micro-batch keep at the end of the forward pass."""
    mode, layers = config.train.activation_checkpointing, config.model.layers
    tokens = config.micro_batch * config.model.context
    if isinstance(mode, dict):
        full = -(-layers // mode["every"])
        return tokens * (full * saved_per_token(config, "full") + (layers - full) * saved_per_token(config, "none"))
    return tokens * layers * saved_per_token(config, mode)
