"""Flat ranges of parameters: their boxes, and their way through a distributed checkpoint."""

import math
import random
import tempfile
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagpt.engines.flat_shard import FlatShard, rectangles
from tests.processes import run_ranks

Shape = tuple[int, ...]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn, shapes: st.SearchStrategy[Shape] = SHAPES) -> tuple[Shape, int, int]:
    shape = draw(shapes)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


# --- the boxes ---


@given(ranges())
@settings(max_examples=300)
def test_boxes_tile_the_range_in_order_and_each_is_contiguous(case: tuple[Shape, int, int]) -> None:
    """Numbered elements count from start to stop, box after box."""
    shape, start, stop = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    elements: list[int] = []
    for box in rectangles(shape, start, stop):
        assert len(box.offsets) == len(box.sizes) == len(shape)
        assert all(size > 0 for size in box.sizes)
        assert all(o + s <= whole for o, s, whole in zip(box.offsets, box.sizes, shape, strict=True))
        part = numbers[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
        elements += part.flatten().tolist()
    assert elements == list(range(start, stop))


@given(ranges())
@settings(max_examples=300)
def test_a_range_of_a_matrix_is_at_most_three_boxes(case: tuple[Shape, int, int]) -> None:
    """The end of a row, whole rows, the start of a row; each further dimension adds two."""
    shape, start, stop = case
    assert len(list(rectangles(shape, start, stop))) <= 2 * len(shape) - 1


def test_a_range_of_a_matrix_is_the_expected_boxes() -> None:
    assert [tuple(box) for box in rectangles((4, 5), 3, 17)] == [
        ((0, 3), (1, 2)),
        ((1, 0), (2, 5)),
        ((3, 0), (1, 2)),
    ]
    assert [tuple(box) for box in rectangles((4, 5), 0, 20)] == [((0, 0), (4, 5))]
    assert list(rectangles((4, 5), 7, 7)) == []


# --- through a checkpoint ---


def whole_tensor(shape: Shape) -> Tensor:
    """Every element is a different number, exact in fp32."""
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + 1


def random_cases(ranks: int) -> list[tuple[Shape, list[int]]]:
    """Shapes, mostly of matrices, each with the edges of the ranks' ranges."""
    numbers = random.Random(ranks)
    cases: list[tuple[Shape, list[int]]] = []
    for dims in [2] * 16 + [1, 1, 3, 4]:
        shape = tuple(numbers.randint(1, 9) for _ in range(dims))
        size = math.prod(shape)
        cases.append((shape, [0, *sorted(numbers.randint(0, size) for _ in range(ranks - 1)), size]))
    cases.append(((3, 4), [0] * ranks + [12]))  # all ranks but the last hold nothing
    return cases


def save_pieces(folder: str, cases: list[tuple[Shape, list[int]]]) -> int:
    from megagpt.world import join

    with join("cpu") as world:
        state = {}
        for i, (shape, edges) in enumerate(cases):
            start, stop = edges[world.rank : world.rank + 2]
            state[f"w{i}"] = FlatShard(whole_tensor(shape).flatten()[start:stop].clone(), shape, start)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
        return world.size


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3], ids="{} ranks".format)
def test_pieces_of_several_ranks_are_read_as_whole_tensors(ranks: int, tmp_path: Path) -> None:
    cases = random_cases(ranks)
    assert run_ranks(ranks, save_pieces, str(tmp_path / "saved"), cases) == [ranks] * ranks

    metadata = dcp.FileSystemReader(tmp_path / "saved").read_metadata().state_dict_metadata
    state = {f"w{i}": torch.full(shape, math.nan) for i, (shape, _) in enumerate(cases)}
    for name, tensor in state.items():
        assert metadata[name].size == tensor.shape  # the file holds the true shape
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "saved"), no_dist=True)
    for i, (shape, _) in enumerate(cases):
        assert torch.equal(state[f"w{i}"], whole_tensor(shape)), shape

    # Another number of ranks reads its pieces, each of them written by several ranks.
    for other in (1, 4):
        held: dict[str, list[Tensor]] = {}
        for rank in range(other):
            loaded = {}
            for i, (shape, _) in enumerate(cases):
                size = math.prod(shape)
                start, stop = size * rank // other, size * (rank + 1) // other
                flat = torch.full((stop - start,), math.nan)
                held.setdefault(f"w{i}", []).append(flat)
                loaded[f"w{i}"] = FlatShard(flat, shape, start)
            dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / "saved"), no_dist=True)
        for i, (shape, _) in enumerate(cases):
            assert torch.equal(torch.cat(held[f"w{i}"]), whole_tensor(shape).flatten()), (other, shape)


@pytest.fixture(scope="module")
def plain() -> Iterator[Path]:
    """A checkpoint of whole tensors of every shape up to 6 x 6, saved by one process as they are."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        state = {f"{rows}x{columns}": whole_tensor((rows, columns)) for rows in range(1, 7) for columns in range(1, 7)}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
        yield Path(folder)


@given(data=st.data(), shape=st.tuples(st.integers(1, 6), st.integers(1, 6)), ranks=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_whole_tensors_are_read_into_the_pieces_of_any_ranks(
    plain: Path, data: st.DataObject, shape: Shape, ranks: int
) -> None:
    """Into the memory of which the pieces are views, and not a byte beside it."""
    size = math.prod(shape)
    cuts = data.draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1).map(sorted), label="cuts")
    expected = whole_tensor(shape).flatten()
    for start, stop in pairwise([0, *cuts, size]):
        memory = torch.full((stop - start + 4,), -1.0)
        flat = memory[2:-2]
        name = f"{shape[0]}x{shape[1]}"
        state = {name: FlatShard(flat, shape, start)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(plain), no_dist=True)
        assert memory[:2].tolist() == memory[-2:].tolist() == [-1.0, -1.0]
        assert torch.equal(memory[2:-2], expected[start:stop])
        loaded = state[name]
        assert isinstance(loaded, FlatShard)
        assert loaded.flat.data_ptr() == flat.data_ptr()


def test_a_tensor_of_another_shape_is_refused(plain: Path) -> None:
    state = {"2x3": FlatShard(torch.zeros(6), (3, 2), 0)}
    with pytest.raises((dcp.CheckpointException, ValueError, RuntimeError)):
        dcp.load(state, storage_reader=dcp.FileSystemReader(plain), no_dist=True)


# --- as a tensor ---


def test_a_flat_shard_has_the_whole_shape_and_refuses_to_compute() -> None:
    shard = FlatShard(torch.zeros(4, dtype=torch.bfloat16), (3, 4), 5)
    assert (shard.shape, shard.dtype, shard.device.type) == ((3, 4), torch.bfloat16, "cpu")
    with pytest.raises(TypeError, match="compute with its `flat`"):
        torch.add(shard, 1)
