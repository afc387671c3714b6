"""Finds the rank that holds the others up."""

import statistics
from typing import NamedTuple

from megagpt.engines.clock import Spent
from megagpt.world import World

# So many comparisons in a row make a rank slow, not just unlucky.
_IN_A_ROW = 3
# Waiting for data is a rank's own affair only beyond this share of the step.
_DATA_SHARE = 0.05


class Comparison(NamedTuple):
    """The ranks' own work over a few steps, side by side; seconds a step."""

    compute_median: float
    compute_slowest: float
    slowest_rank: int
    data_wait_longest: float
    communication_wait_median: float
    slow: list[str]
    """Sentences about ranks that were slow in several comparisons in a row."""


class Pace:
    """Sums up this rank's steps, and compares the ranks every `steps`. Every rank has one."""

    def __init__(self, world: World, hosts: list[str], steps: int, slow: float) -> None:
        self._world, self._hosts, self._steps, self._slow = world, hosts, steps, slow
        self._count = 0
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._in_a_row: dict[int, int] = {}

    def add(self, step_seconds: float, data_wait: float, spent: Spent) -> Comparison | None:
        """Count a step; where it was the last of a comparison, what that found."""
        if self._world.size == 1 or not self._steps:
            return None
        self._count += 1
        self._sums = [a + b for a, b in zip(self._sums, (step_seconds, data_wait, *spent), strict=True)]
        if self._count < self._steps:
            return None
        ranks = self._world.gather([value / self._count for value in self._sums])
        self._count, self._sums = 0, [0.0, 0.0, 0.0, 0.0]
        return compare(ranks, self._slow, self._hosts, self._in_a_row)


def compare(ranks: list[list[float]], slow: float, hosts: list[str], in_a_row: dict[int, int]) -> Comparison:
    """Each rank's step, data wait, compute and communication wait, seconds a step, beside the others'. `in_a_row`
    counts how often each rank was slow; it is brought up to date."""
    step, data, compute, wait = (list(column) for column in zip(*ranks, strict=True))
    # The lower one of an even number: of two ranks, or two nodes, the quick one is the measure.
    middle, middle_data = statistics.median_low(compute), statistics.median_low(data)
    sentences = []
    for rank in range(len(ranks)):
        computes_slowly = compute[rank] > slow * middle
        waits_for_data = data[rank] - middle_data > max((slow - 1) * middle_data, _DATA_SHARE * step[rank])
        in_a_row[rank] = in_a_row.get(rank, 0) + 1 if computes_slowly or waits_for_data else 0
        if in_a_row[rank] >= _IN_A_ROW:
            what = f"computes {compute[rank] / middle:.2f} times as long as the median of the ranks"
            if not computes_slowly:
                what = f"waits {1000 * data[rank]:.0f} ms a step for data, the median {1000 * middle_data:.0f} ms"
            sentences.append(f"rank {rank} on {hosts[rank]} holds the others up: it {what}")
    slowest = max(range(len(ranks)), key=compute.__getitem__)
    return Comparison(middle, compute[slowest], slowest, max(data), statistics.median(wait), sentences)
