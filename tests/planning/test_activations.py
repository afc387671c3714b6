"""Bytes that a block keeps, by formula, against the tensors that autograd saves in a real forward pass."""

from typing import Any

import pytest
import torch

from megagpt.engines.engine import build_engine
from megagpt.models.initialization import initialize
from megagpt.planning.activations import kept_per_token
from megagpt.world import World
from tests.planning.configs import config
from tests.saved_tensors import saved_storages

SHAPES = [
    {"layers": 3, "width": 128, "heads": 4, "context": 96, "vocab_size": 300},
    {"layers": 3, "width": 320, "heads": 5, "context": 64, "vocab_size": 300},
]
MICRO_BATCH = 3


def kept_by_blocks(shape: dict[str, Any], layers: int, **train: Any) -> int:
    """Bytes that one forward pass takes and does not give back, without copies of weights."""
    settings = config(shape | {"layers": layers}, {"name": "ddp"}, 1, MICRO_BATCH, compile=False, device="cpu", **train)
    engine = build_engine(settings, World.alone(), initialized=False)
    initialize(engine.model, settings.model, 0)
    tokens = torch.randint(settings.model.vocab_size, (MICRO_BATCH, settings.model.context))
    if train["activation_checkpointing"] != "selective":
        weights = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
        with saved_storages() as kept:
            engine.model(tokens, tokens)
        # Copies of the blocks' matrices, which autocast makes.
        copied = {2 * p.numel() for name, p in engine.model.named_parameters() if "blocks" in name}
        return sum(s.nbytes() for at, s in kept.items() if at not in weights and s.nbytes() not in copied)
    # What `selective` keeps is not behind autograd's hooks: counted as memory that the profiler sees taken.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = engine.model(tokens, tokens)
    assert loss.requires_grad  # the graph was alive until here
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"width {shape['width']}")
@pytest.mark.parametrize(("precision", "residual"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_block_keeps_what_the_formula_says(shape: dict[str, Any], precision: str, residual: str, mode: str) -> None:
    """Within 1%. The difference of two models with 2 and 5 blocks, so that only blocks count."""
    train = {"precision": precision, "residual": residual, "activation_checkpointing": mode}
    measured = (kept_by_blocks(shape, 5, **train) - kept_by_blocks(shape, 2, **train)) / 3
    settings = config(shape, {"name": "ddp"}, 1, MICRO_BATCH, compile=False, **train)
    formula = MICRO_BATCH * shape["context"] * kept_per_token(settings, (mode, False))
    assert measured == pytest.approx(formula, rel=0.01)
