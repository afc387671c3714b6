"""The time that one rank itself spends on a step, measured in places where it waits for no other rank.

Ranks end each step together, so the time of a step does not show which rank is slow. No engine communicates inside a
block's forward pass, so the time of that pass does. Tensor ranks are the exception: they wait for each other there, so
their time is that of their group."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagpt.models.gpt import GPT

# Number of timed blocks: enough for a steady number. Each costs two events in each pass.
_BLOCKS = 4


class StepTimes(NamedTuple):
    """Seconds of one rank since the last reading."""

    compute: float
    """Inside the forward passes of a few blocks, up to four, the same on every rank. Of a tensor rank, this includes
    its waits for the others of its group."""
    wait: float
    """From the end of the last backward pass through the blocks to the arrival of the sums over all ranks: of the
    gradients and of the loss."""


class StepClock:
    """Times the forward passes of a few blocks, and the wait for the other ranks. On a GPU it uses events, which cost
    the host nothing and are read when the step is over."""

    def __init__(self, model: GPT, device: torch.device) -> None:
        self.on_pass: Callable[[], object] = lambda: None
        """Called at each timed pass, as a sign of life."""
        self._now: Callable[[], Any] = _event if device.type == "cuda" else time.perf_counter
        self._passes: list[tuple[Any, Any]] = []
        self._backward_end: Any = None
        self._waits: list[tuple[Any, Any]] = []
        for i in range(0, len(model.blocks), -(-len(model.blocks) // _BLOCKS)):
            block: Any = model.blocks[i]
            block.forward = self._timed(block.forward, first=i == 0)

    def _timed(self, forward: Callable[..., Tensor], first: bool) -> Callable[..., Tensor]:
        def timed(x: Tensor, *more: Any) -> Tensor:
            if not torch.is_grad_enabled():  # evaluation
                return forward(x, *more)
            if first and x.requires_grad:
                x.register_hook(self._backward_ended)
            self.on_pass()
            begin = self._now()
            y = forward(x, *more)
            self._passes.append((begin, self._now()))
            return y

        return timed

    def _backward_ended(self, gradient: Tensor) -> None:
        self._backward_end = self._now()

    def summed(self) -> None:
        """To be called when the gradients and the loss have been summed over the ranks."""
        if self._backward_end is not None:
            self._waits.append((self._backward_end, self._now()))

    def read(self) -> StepTimes:
        """The times since the last reading. The step must be over on the device."""
        times = StepTimes(sum(map(_seconds, self._passes)), sum(map(_seconds, self._waits)))
        self._passes, self._waits = [], []
        return times


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(span: tuple[Any, Any]) -> float:
    begin, end = span
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
