"""Bytes of the tensors that are alive, counted as operators run on fake tensors."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# DTensor derives the shapes of results by running operators on whole tensors that nobody allocates.
_PROPAGATION = "_propagate_tensor_meta_non_cached"
_WAIT = torch.ops._c10d_functional.wait_tensor.default


class Counter(TorchDispatchMode):
    """Counts every storage once, from its first sight to its end, in any order of threads and passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.moment = ""
        """The operator at the peak."""
        self._operator = ""
        self._paused = 0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, operators are counted, and storages that are resized, as FSDP frees and refills gathered weights."""
        resize, propagate = torch.UntypedStorage.resize_, getattr(ShardingPropagator, _PROPAGATION)

        def resized(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._grow(storage._cdata, size - self._sizes[storage._cdata])
            return result

        def propagated(*arguments: Any, **named: Any) -> Any:
            with self.paused():
                return propagate(*arguments, **named)

        storages = mock.patch.object(torch.UntypedStorage, "resize_", resized)
        with storages, mock.patch.object(ShardingPropagator, _PROPAGATION, propagated), self:
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, results of operators are not counted; those counted before are followed to their end."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def add(self, tensor: Tensor, operator: str) -> None:
        """Count a tensor's storage, unless it is counted already."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        key = storage._cdata
        if local.device.type == "meta" or key in self._alive:
            return
        self._operator = operator
        self._alive[key] = weakref.ref(storage, lambda _: self._drop(key))
        self._sizes[key] = 0
        self._grow(key, storage.nbytes())

    def _grow(self, key: int, size: int) -> None:
        self._sizes[key] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.moment = self.now, self._operator

    def _drop(self, key: int) -> None:
        self._alive.pop(key, None)
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # It returns what it waits for; of a fake tensor it would make another one.
        result = args[0] if function is _WAIT else function(*args, **(kwargs or {}))
        if not self._paused:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                    self.add(leaf, str(function))
        return result
