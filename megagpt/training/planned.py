"""Compares a run with its plan: predicted beside measured memory and speed, at the tenth step of an incarnation and at
its end."""

import statistics
from collections import deque
from typing import Any

from megagpt.planning.forecast import Forecast, beside
from megagpt.position import Position

# Steps of an incarnation before the first comparison, and those of them that are left out: they compile, and a GPU's
# clock falls under full load.
_FIRST, _WARMUP = 10, 3
# Steps whose median speed is compared: enough for any number, few enough to follow a change.
_STEPS = 1000


class Planned:
    """Takes note of an incarnation's steps. Every rank has one."""

    def __init__(self, forecast: Forecast | None, start: Position, batch_tokens: int) -> None:
        """`forecast`: None on a CPU, for which there is no plan. `batch_tokens`: those of a full batch."""
        self._forecast, self._start, self._batch_tokens = forecast, start, batch_tokens
        self._speeds: deque[float] = deque(maxlen=_STEPS)

    def step(self, at: Position, tokens: int, seconds: float, profiled: bool) -> None:
        """A step has ended. The plan is about full batches, so others do not count, and recording takes time, too."""
        if at.step > self._start.step + _WARMUP and tokens == self._batch_tokens and not profiled:
            self._speeds.append(tokens / seconds)

    def is_due(self, at: Position) -> bool:
        return self._forecast is not None and (at.last or at.step == self._start.step + _FIRST)

    def compare(self, memory: int) -> tuple[dict[str, Any], str]:
        """Numbers for the log and TensorBoard, and a line for people. `memory`: this rank's peak in bytes."""
        assert self._forecast is not None
        planned = self._forecast
        speed = statistics.median(self._speeds) if self._speeds else None
        values = {
            "predicted_memory_bytes": planned.memory_bytes, "measured_memory_bytes": memory,
            "predicted_tokens_per_second": planned.tokens_per_second, "measured_tokens_per_second": speed,
            "predicted_tokens_per_second_low": planned.tokens_per_second_low,
            "predicted_tokens_per_second_high": planned.tokens_per_second_high,
            "predicted_run_seconds": planned.run_seconds,
        }  # fmt: skip
        return values, f"plan: {'; '.join(beside(planned, memory, speed))}"
