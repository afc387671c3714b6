"""Finds stragglers: ranks whose own work takes longer than that of the others."""

import statistics
from typing import NamedTuple

from megagpt.engines.clock import StepTimes
from megagpt.world import World

# Comparisons in a row in which a straggler is slow: one or two may be chance.
_IN_A_ROW = 3
# Share of the step beyond which a rank's wait for data counts: a shorter one hides behind other ranks' work.
_DATA_SHARE = 0.05


class Comparison(NamedTuple):
    """The ranks' own work over a few steps, side by side; seconds a step."""

    compute_median: float
    compute_slowest: float
    slowest_rank: int
    data_wait_longest: float
    communication_wait_median: float
    stragglers: list[str]
    """Sentences about ranks that were slow in several comparisons in a row."""


class Stragglers:
    """Sums up this rank's steps, and compares the ranks every `steps`. Every rank has one."""

    def __init__(self, world: World, hosts: list[str], steps: int, factor: float) -> None:
        self._world, self._hosts, self._steps, self._factor = world, hosts, steps, factor
        self._count, self._sums = 0, [0.0] * 4
        self._in_a_row: dict[int, int] = {}

    def add(self, step_seconds: float, data_wait: float, times: StepTimes) -> Comparison | None:
        """Count a step; returns a comparison if the step completes one."""
        if self._world.size == 1 or not self._steps:
            return None
        self._count += 1
        self._sums = [a + b for a, b in zip(self._sums, (step_seconds, data_wait, *times), strict=True)]
        if self._count < self._steps:
            return None
        ranks = self._world.gather([value / self._count for value in self._sums])
        self._count, self._sums = 0, [0.0] * 4
        return compare(ranks, self._factor, self._hosts, self._in_a_row)


def compare(ranks: list[list[float]], factor: float, hosts: list[str], in_a_row: dict[int, int]) -> Comparison:
    """Compare the ranks' rows of step, data wait, compute and communication wait, in seconds a step. A rank is slow if
    its own work takes `factor` times the median. `in_a_row`: comparisons in a row that each rank lost, updated."""
    step, data, compute, wait = (list(column) for column in zip(*ranks, strict=True))
    # The lower median: of two ranks, or of two nodes, the fast one is the reference.
    middle, middle_data = statistics.median_low(compute), statistics.median_low(data)
    sentences = []
    for rank in range(len(ranks)):
        computes_slowly = compute[rank] > factor * middle
        waits_for_data = data[rank] - middle_data > max((factor - 1) * middle_data, _DATA_SHARE * step[rank])
        in_a_row[rank] = in_a_row.get(rank, 0) + 1 if computes_slowly or waits_for_data else 0
        if in_a_row[rank] >= _IN_A_ROW:
            what = f"computes {compute[rank] / middle:.2f} times as long as the median of the ranks"
            if not computes_slowly:
                what = f"waits {1000 * data[rank]:.0f} ms a step for data, the median {1000 * middle_data:.0f} ms"
            sentences.append(f"rank {rank} on {hosts[rank]} is a straggler: it {what}")
    slowest = max(range(len(ranks)), key=compute.__getitem__)
    return Comparison(middle, compute[slowest], slowest, max(data), statistics.median(wait), sentences)
