"""Counts of a step, against the operators that PyTorch runs."""

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config_file import build_config
from megagpt.engines.activation_checkpointing import checkpoint_activations
from megagpt.models.gpt import GPT
from megagpt.planning.work import count_work

SHAPE = {"layers": 5, "width": 64, "heads": 2, "context": 32, "vocab_size": 300}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


@pytest.mark.parametrize("mode", ["none", "selective", "full", {"every": 2}], ids=json.dumps)
def test_products_are_as_many_as_a_step_runs(mode: Any) -> None:
    train = {
        "tokens": 1024,
        "batch_tokens": 256,
        "micro_batch": 4,
        "precision": "fp32",
        "activation_checkpointing": mode,
    }
    config = build_config({"model": SHAPE, "train": train}, "test")
    model = GPT(config.model)
    checkpoint_activations(model, config.train.activation_checkpointing)
    tokens = torch.randint(300, (4, 32))
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.roll(tokens, -1, 1)).sum().backward()
    counted = sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in PRODUCTS
    )
    work = count_work(config, 1)
    assert work.micro_batches == 2
    assert counted == pytest.approx(work.block_flops + work.head_flops)
