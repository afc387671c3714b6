"""Adds up a trace by part. Every moment of the steps belongs to exactly one part, so the parts add up to the steps."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from megagpt.profiling.parts import Part
from megagpt.profiling.trace import Level, Span, Trace

# Collectives by their ranges on gloo's threads, and by their kernels.
_COLLECTIVES = ("gloo:", "nccl")
# Levels between those of operators and of code that only waits.
_PEERS = Level.EXCHANGE - 0.5

Collectives = dict[tuple[str, int], int]
"""(name, how many of this name came before it) -> duration on one rank (ns)."""


@dataclass(frozen=True)
class Breakdown:
    """The time of one rank's steps, by part."""

    step_seconds: float
    """Mean of the steps."""
    seconds: dict[Part, float]
    """Mean of the steps; the values add up to `step_seconds`."""
    largest: dict[Part, list[tuple[str, float]]]
    """The operators that take most of each part: name, seconds in a step."""


def collectives(trace: Trace) -> Collectives:
    """This rank's collectives, by a key that is the same on every rank."""
    return dict(zip(_keys(trace), (span.end - span.begin for span in _found(trace)), strict=True))


def breakdown(trace: Trace, shortest: Collectives, top: int = 3) -> Breakdown:
    """`shortest`: of each collective, the least of all ranks' durations. A rank that takes longer has waited for the
    last peer to arrive: it takes part in an exchange only from then on."""
    arrived = {
        span: max(span.begin, span.end - shortest.get(key, span.end - span.begin))
        for key, span in zip(_keys(trace), _found(trace), strict=True)
    }
    pieces = [
        piece
        for span in trace.spans
        for piece in (
            (span.begin, arrived.get(span, span.begin), _PEERS, Part.PEERS),
            (arrived.get(span, span.begin), span.end, float(span.level), span.part),
        )
    ]
    whole = sum(end - begin for begin, end in trace.steps)
    claimed: Counter[Part] = Counter()
    for begin, end in trace.steps:
        claimed.update(_claim(pieces, begin, end))
    claimed[Part.HOST] = whole - sum(claimed.values())
    scale = 1e9 * len(trace.steps)
    seconds = {part: claimed[part] / scale for part in Part}
    return Breakdown(whole / scale, seconds, _largest(trace, scale, top))


def _found(trace: Trace) -> list[Span]:
    found = [span for span in trace.spans if span.level == Level.EXCHANGE and span.name.startswith(_COLLECTIVES)]
    return sorted(span for span in found if trace.in_a_step(span.begin))


def _keys(trace: Trace) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    keys = []
    for span in _found(trace):
        keys.append((span.name, seen[span.name]))
        seen[span.name] += 1
    return keys


def _claim(pieces: list[tuple[int, int, float, Part]], begin: int, end: int) -> Counter[Part]:
    """Nanoseconds of each part between `begin` and `end`. Of pieces that overlap, the one of the highest level claims
    the time."""
    bounds: dict[tuple[float, Part], list[tuple[int, int]]] = defaultdict(list)
    for first, last, level, part in pieces:
        if max(first, begin) < min(last, end):
            bounds[level, part].append((max(first, begin), min(last, end)))
    times = np.unique([time for pairs in bounds.values() for pair in pairs for time in pair])
    free = np.ones(max(0, len(times) - 1), dtype=bool)
    claimed: Counter[Part] = Counter()
    for level, part in sorted(bounds, key=lambda key: -key[0]):
        change = np.zeros(len(times), dtype=np.int64)
        first, last = np.searchsorted(times, np.array(bounds[level, part]).T)
        np.add.at(change, first, 1)
        np.add.at(change, last, -1)
        mine = free & (np.cumsum(change)[:-1] > 0)
        claimed[part] += int(np.diff(times)[mine].sum())
        free &= ~mine
    return claimed


def _largest(trace: Trace, scale: float, top: int) -> dict[Part, list[tuple[str, float]]]:
    taken: dict[Part, Counter[str]] = defaultdict(Counter)
    for span in trace.spans:
        if trace.in_a_step(span.begin):
            taken[span.part][span.name] += span.end - span.begin
    return {part: [(name, time / scale) for name, time in found.most_common(top)] for part, found in taken.items()}
