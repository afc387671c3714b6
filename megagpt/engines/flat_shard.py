"""A rank's contiguous range of a flattened parameter, in the form of PyTorch's distributed checkpoints.

Under every engine, a rank holds such a range of a parameter: all of it, some rows, or a range that DeepSpeed chooses. A
range of a row-major matrix is at most three rectangles: the end of a row, whole rows, the start of a row. A tensor rank
holds a range of its own part of the parameter: of some columns, or of three stacks of rows, one below the other. A
checkpoint takes several rectangles of one tensor from one rank, so nothing is gathered, and the file keeps the tensor's
shape."""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megagpt.models.tensor_parallel import TensorRanks, split_of


class Rectangle(NamedTuple):
    """A box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        """The index of the box in its tensor."""
        return tuple(slice(start, start + size) for start, size in zip(*self, strict=True))


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Rectangle]:
    """Elements [start, stop) of the flattened tensor as boxes, in order."""
    inner = prod(shape[1:])
    while start < stop:
        row, column = divmod(start, inner)
        rows = (stop - start) // inner
        if column == 0 and rows:
            yield Rectangle((row, *(0 for _ in shape[1:])), (rows, *shape[1:]))
            start += rows * inner
        else:
            end = min(inner, column + stop - start)
            for box in rectangles(shape[1:], column, end):
                yield Rectangle((row, *box.offsets), (1, *box.sizes))
            start += end - column


def parts_of(name: str, shape: tuple[int, ...], ranks: TensorRanks) -> tuple[tuple[int, ...], list[Rectangle]]:
    """The shape of a whole parameter, and the boxes of it that one of the tensor ranks has: laid end to end, they are
    its own part, of that `shape`."""
    cut = split_of(name)
    if cut is None or ranks.size == 1:
        return shape, [Rectangle((0,) * len(shape), shape)]

    def with_cut(lengths: Iterable[int], length: int) -> tuple[int, ...]:
        return tuple(length if d == cut.dimension else n for d, n in enumerate(lengths))

    own = shape[cut.dimension] // cut.stacked
    starts = [(matrix * ranks.size + ranks.rank) * own for matrix in range(cut.stacked)]
    boxes = [Rectangle(with_cut((0,) * len(shape), start), with_cut(shape, own)) for start in starts]
    return with_cut(shape, shape[cut.dimension] * ranks.size), boxes


class FlatShard(Tensor):
    """A tensor with the shape of the whole parameter that holds only `flat`: of `parts`, boxes of the tensor that are
    laid end to end, the elements from `start` on. `flat` is a view of the engine's memory, so a checkpoint is loaded
    straight into it."""

    flat: Tensor
    start: int
    parts: list[Rectangle]

    @staticmethod
    def __new__(
        cls, flat: Tensor, shape: tuple[int, ...], start: int, parts: list[Rectangle] | None = None
    ) -> "FlatShard":
        """`parts`: the whole tensor if None."""
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=flat.dtype, device=flat.device)
        shard.flat, shard.start = flat, start
        shard.parts = [Rectangle((0,) * len(shape), tuple(shape))] if parts is None else parts
        return shard

    def range(self, start: int, stop: int) -> "FlatShard":
        """Elements [start, stop) of what this rank holds."""
        return FlatShard(self.flat[start:stop], tuple(self.shape), self.start + start, self.parts)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{function}: a FlatShard holds only a part of its tensor; compute with its `flat`")

    def boxes(self) -> list[Rectangle]:
        """The rectangles that this rank holds, whose elements lie end to end in `flat`."""
        found, first, stop = [], 0, self.start + self.flat.numel()
        for part in self.parts:
            last = first + prod(part.sizes)
            for box in rectangles(part.sizes, max(self.start, first) - first, min(stop, last) - first):
                moved = tuple(a + b for a, b in zip(part.offsets, box.offsets, strict=True))
                found.append(Rectangle(moved, box.sizes))
            first = last
        return found

    def pieces(self) -> Iterator[tuple[Rectangle, Tensor]]:
        """Each rectangle that this rank holds, and the memory of it, in the rectangle's shape."""
        first = 0
        for box in self.boxes():
            yield box, self.flat.narrow(0, first, prod(box.sizes)).view(box.sizes)
            first += prod(box.sizes)

    # --- the protocol of torch.distributed.checkpoint ---

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.flat.dtype)
        data = [TensorWriteData(chunk, properties, size=self.shape) for chunk in self.__create_chunk_list__()]
        return [WriteItem(MetadataIndex(name, d.chunk.offsets), WriteItemType.SHARD, tensor_data=d) for d in data]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in self.boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box, piece in self.pieces():
            if torch.Size(box.offsets) == index.offset:
                return piece
        raise KeyError(f"{index}: not on this rank")
