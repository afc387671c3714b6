"""Initial values of any range of a flattened parameter."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.models import initialization
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initial_values, initialize
from megagpt.models.presets import ModelConfig

CONFIG = ModelConfig(layers=2, width=24, heads=2, context=12, vocab_size=130)
SHAPES = {name: tuple(p.shape) for name, p in GPT(CONFIG).named_parameters()}


def flattened(seed: int) -> dict[str, torch.Tensor]:
    model = GPT(CONFIG)
    initialize(model, CONFIG, seed)
    return {name: p.detach().flatten() for name, p in model.named_parameters()}


@given(data=st.data(), seed=st.integers(0, 2**40), block=st.sampled_from([1, 50, 1000, 2**20]))
@settings(max_examples=25, deadline=None)
def test_any_range_of_every_parameter_is_a_slice_of_the_whole(data: st.DataObject, seed: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialization, "_BLOCK_NUMEL", block)  # many blocks in few numbers
        for name, whole in flattened(seed).items():
            start = data.draw(st.integers(0, whole.numel()), label=f"start in {name}")
            stop = data.draw(st.integers(start, whole.numel()), label=f"stop in {name}")
            part = initial_values(name, SHAPES[name], CONFIG, seed, start, stop)
            assert part.dtype == torch.float32
            assert part.shape == (stop - start,), name
            assert torch.equal(part, whole[start:stop]), name


@given(data=st.data(), name=st.sampled_from(list(SHAPES)), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_the_ranges_of_any_number_of_ranks_make_the_whole(data: st.DataObject, name: str, seed: int) -> None:
    whole = math.prod(SHAPES[name])
    cuts = sorted(data.draw(st.lists(st.integers(0, whole), max_size=6), label="cuts"))
    edges = [0, *cuts, whole]
    pieces = [initial_values(name, SHAPES[name], CONFIG, seed, a, b) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(pieces), initial_values(name, SHAPES[name], CONFIG, seed, 0, whole))


def test_only_rows_of_the_range_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's cost is its own share of a parameter, not the whole of it."""
    asked = []
    original = initialization.normal_rows

    def counting(seed: int, name: str, columns: int, start: int, stop: int) -> object:
        asked.append((start, stop))
        return original(seed, name, columns, start, stop)

    monkeypatch.setattr(initialization, "normal_rows", counting)
    initial_values("blocks.0.mlp.up.weight", (96, 24), CONFIG, 0, 24 * 5 + 1, 24 * 7)
    assert asked == [(5, 7)]
