"""A rank's contiguous range of a flattened parameter, in the form of PyTorch's distributed checkpoints.

Under every engine, a rank holds such a range of a parameter: all of it, some rows, or a range that DeepSpeed chooses. A
range of a row-major matrix is at most three rectangles: the end of a row, whole rows, the start of a row. A checkpoint
takes several rectangles of one tensor from one rank, so nothing is gathered, and the file keeps the tensor's shape."""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Rectangle(NamedTuple):
    """A box of a tensor whose elements are contiguous in the flattened tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


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


class FlatShard(Tensor):
    """A tensor with the shape of the whole parameter that holds only `flat`, its elements from `start` on. `flat` is a
    view of the engine's memory, so a checkpoint is loaded straight into it."""

    flat: Tensor
    start: int

    @staticmethod
    def __new__(cls, flat: Tensor, shape: tuple[int, ...], start: int) -> "FlatShard":
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=flat.dtype, device=flat.device)
        shard.flat, shard.start = flat, start
        return shard

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{function}: a FlatShard holds only a part of its tensor; compute with its `flat`")

    def boxes(self) -> list[Rectangle]:
        """The rectangles that this rank holds."""
        return list(rectangles(tuple(self.shape), self.start, self.start + self.flat.numel()))

    # --- the protocol of torch.distributed.checkpoint ---

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.flat.dtype)
        data = [TensorWriteData(chunk, properties, size=self.shape) for chunk in self.__create_chunk_list__()]
        return [WriteItem(MetadataIndex(name, d.chunk.offsets), WriteItemType.SHARD, tensor_data=d) for d in data]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in self.boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        first = 0
        for box in self.boxes():
            if torch.Size(box.offsets) == index.offset:
                return self.flat.narrow(0, first, prod(box.sizes)).view(box.sizes)
            first += prod(box.sizes)
        raise KeyError(f"{index}: not on this rank")
