"""Finds stragglers: ranks, or groups of tensor ranks, whose own work takes longer than that of the others."""

import statistics
from typing import NamedTuple

from megagpt.config_occasions import LogConfig
from megagpt.engines.clock import StepTimes
from megagpt.world import World

# Comparisons in a row in which a straggler is slow: one or two may be chance.
_IN_A_ROW = 3
# Share of the step beyond which a rank's wait for data counts: a shorter one hides behind other ranks' work.
_DATA_SHARE = 0.05


class Comparison(NamedTuple):
    """The ranks' own work over a few steps, side by side; seconds a step. Tensor ranks compute in step with their
    group, so compute is compared by groups."""

    compute_median: float
    compute_slowest: float
    slowest_rank: int
    """The first rank of the slowest group, if there are tensor ranks."""
    data_wait_longest: float
    communication_wait_median: float
    stragglers: list[str]
    """Sentences about ranks or groups that were slow in several comparisons in a row."""


class Stragglers:
    """Sums up this rank's steps, and compares the ranks every `log.straggler_every_steps`. Every rank has one."""

    def __init__(self, world: World, hosts: list[str], log: LogConfig, tensor_ranks: int) -> None:
        self._world, self._hosts, self._group = world, hosts, tensor_ranks
        self._steps, self._factor = log.straggler_every_steps, log.straggler_factor
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
        return compare(ranks, self._factor, self._hosts, self._in_a_row, self._group)


def compare(
    ranks: list[list[float]], factor: float, hosts: list[str], in_a_row: dict[int, int], group: int = 1
) -> Comparison:
    """Compare the ranks' rows of step, data wait, compute and communication wait, in seconds a step. A rank is slow if
    its own work takes `factor` times the median. `in_a_row`: comparisons in a row that each rank lost, updated.
    `group`: tensor ranks of a group, whose first rank counts the comparisons that the group lost."""
    step, data, each, wait = (list(column) for column in zip(*ranks, strict=True))
    compute = [max(each[first : first + group]) for first in range(0, len(each), group)]
    # The lower median: of two ranks, or of two nodes, the fast one is the reference.
    middle, middle_data = statistics.median_low(compute), statistics.median_low(data)
    sentences = []
    for rank in range(len(ranks)):
        computing = compute[rank // group]
        computes_slowly = rank % group == 0 and computing > factor * middle
        waits_for_data = data[rank] - middle_data > max((factor - 1) * middle_data, _DATA_SHARE * step[rank])
        in_a_row[rank] = in_a_row.get(rank, 0) + 1 if computes_slowly or waits_for_data else 0
        if in_a_row[rank] >= _IN_A_ROW:
            who, what = f"rank {rank}", f"it waits {1000 * data[rank]:.0f} ms a step for data"
            what += f", the median {1000 * middle_data:.0f} ms"
            if computes_slowly:
                what = f"it computes {computing / middle:.2f} times as long as the median of the ranks"
            if computes_slowly and group > 1:
                who = f"one of tensor ranks {rank} to {rank + group - 1}"
                what = f"their group computes {computing / middle:.2f} times as long as the median of the groups"
            sentences.append(f"{who} on {hosts[rank]} is a straggler: {what}")
    slowest = max(range(len(compute)), key=compute.__getitem__)
    return Comparison(middle, compute[slowest], slowest * group, max(data), statistics.median(wait), sentences)
