"""Initial values of any box of a parameter."""

import functools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.engines.flat_shard import FlatShard, Rectangle, parts_of
from megagpt.models import initialization
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initial_values, initialize
from megagpt.models.presets import ModelConfig
from megagpt.models.tensor_parallel import TensorRanks, split_of

CONFIG = ModelConfig(layers=2, width=24, heads=8, context=16, vocab_size=130)
SHAPES = {name: tuple(p.shape) for name, p in GPT(CONFIG).named_parameters()}


def initialized(seed: int) -> dict[str, torch.Tensor]:
    model = GPT(CONFIG)
    initialize(model, CONFIG, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def draw_box(data: st.DataObject, shape: tuple[int, ...], what: str) -> Rectangle:
    starts = [data.draw(st.integers(0, length), label=f"start in {what}") for length in shape]
    sizes = [data.draw(st.integers(0, length - s), label="size") for length, s in zip(shape, starts, strict=True)]
    return Rectangle(tuple(starts), tuple(sizes))


@given(data=st.data(), seed=st.integers(0, 2**40), block=st.sampled_from([1, 50, 1000, 2**20]))
@settings(max_examples=25, deadline=None)
def test_any_box_of_every_parameter_is_a_slice_of_the_whole(data: st.DataObject, seed: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialization, "_BLOCK_NUMEL", block)  # many blocks in few numbers
        for name, whole in initialized(seed).items():
            box = draw_box(data, SHAPES[name], name)
            part = initial_values(name, SHAPES[name], CONFIG, seed, *box)
            assert part.dtype == torch.float32
            assert torch.equal(part, whole[box.place]), name


@given(data=st.data(), size=st.sampled_from([1, 2, 4, 8]), ranks=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_any_ranks_make_the_whole_of_every_parameter(data: st.DataObject, size: int, ranks: int, seed: int) -> None:
    """Tensor ranks, and ranges of each one's part that other ranks take: every element once, those that tensor ranks
    have in common once on each."""
    for name, whole in initialized(seed).items():
        copies = 1 if split_of(name) else size
        count, found = torch.zeros(SHAPES[name]), torch.full(SHAPES[name], math.nan)
        local = {n: tuple(p.shape) for n, p in parts(size).items()}[name]
        cuts = sorted(data.draw(st.lists(st.integers(0, math.prod(local)), min_size=ranks - 1, max_size=ranks - 1)))
        for rank in range(size):
            shape, boxes = parts_of(name, local, TensorRanks(rank, size))
            assert shape == SHAPES[name]
            for start, stop in pairwise([0, *cuts, math.prod(local)]):
                shard = FlatShard(torch.full((stop - start,), math.nan), shape, start, boxes)
                for box, piece in shard.pieces():
                    piece.copy_(initial_values(name, shape, CONFIG, seed, *box))
                    found[box.place] = piece
                    count[box.place] += 1
        assert (count == copies).all(), name
        assert torch.equal(found, whole), name


@functools.cache
def parts(size: int) -> dict[str, torch.Tensor]:
    """The parameters of one of several tensor ranks, without memory."""
    with torch.device("meta"):
        return dict(GPT(CONFIG, TensorRanks(0, size)).named_parameters())


def test_only_rows_of_the_range_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's cost is its own share of a parameter, not the whole of it."""
    asked = []
    original = initialization.normal_rows

    def counting(seed: int, name: str, columns: int, start: int, stop: int, kept: slice) -> object:
        asked.append((start, stop))
        return original(seed, name, columns, start, stop, kept)

    monkeypatch.setattr(initialization, "normal_rows", counting)
    initial_values("blocks.0.mlp.up.weight", (96, 24), CONFIG, 0, (5, 1), (2, 20))
    assert asked == [(5, 7)]
