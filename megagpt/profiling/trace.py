"""Reads a Chrome trace of PyTorch's profiler: each moment of its threads and of the GPU, with the part it belongs to.

On a GPU, its own work counts: kernels have the place of the operator that launched them. On a CPU, each moment of the
main thread belongs to the innermost operator."""

import bisect
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.profiling import ranges
from megagpt.profiling.parts import Kind, Part, Place, Region, kind_of, region_of_range

STEP = "ProfilerStep#"
"""Name of the range of a step, before its number: PyTorch's own, which other tools know."""
_NODE = "autograd::engine::evaluate_function: "
_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
# Launches of kernels, by CUDA's and HIP's names for them.
_LAUNCH = "LaunchKernel"
# Largest share of launches without a kernel in a complete trace: a few lie at the ends of the recording.
_TOLERATED = 0.01
Event = dict[str, Any]


class Span(NamedTuple):
    """A stretch of time. Of spans that overlap, the one with the highest level counts."""

    begin: int
    """Time (ns), as is `end`."""
    end: int
    level: int
    part: Part
    name: str


class _Launch(NamedTuple):
    """A call on the host that starts work on the GPU."""

    name: str
    begin: int
    place: Place


class Level:
    """Levels of spans: whatever computes hides an exchange that goes on at the same time."""

    DATA = 1
    CONTAINER = 2
    """Code around operators: it may wait for an exchange."""
    EXCHANGE = 3
    OPERATOR = 4


@dataclass
class Trace:
    """One rank's trace of some steps."""

    steps: list[tuple[int, int]]
    """Start of each step and its end, or that of its last kernel (ns), in order of time. Between two of them, a run may
    have done something else, such as a validation."""
    spans: list[Span]
    on_gpu: bool
    phases: list[tuple[int, int, str]] = field(default_factory=list)
    """Start and end (ns) and name of each range of `ranges.py` on the host."""
    memory: list[tuple[int, int, int]] = field(default_factory=list)
    """Time (ns), and bytes that PyTorch had then allocated and reserved on the device."""

    @property
    def begin(self) -> int:
        """Start of the first step (ns)."""
        return self.steps[0][0]

    @property
    def end(self) -> int:
        """End of the last step (ns)."""
        return self.steps[-1][1]

    def in_a_step(self, time: int) -> bool:
        """Whether a step was going on at this time (ns)."""
        return _index(self.steps, time) is not None


def read_trace(path: Path) -> Trace:
    """Raises OSError; ValueError if the file is incomplete, has no steps, or lacks kernels of its steps."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        events: list[Event] = [e for e in json.load(file, strict=False)["traceEvents"] if e.get("ph") in ("X", "i")]
    ranged = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(STEP)]
    if not ranged:
        raise ValueError("the trace has no steps")
    main = ranged[0]["tid"]
    steps = sorted((_begin(e), _end(e)) for e in ranged)
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event.get("cat") in _HOST:
            threads[event["tid"]].append(event)
    kernels = [e for e in events if e.get("cat") in _GPU]
    phases = [(_begin(e), _end(e), e["name"]) for e in threads[main] if e["name"].startswith("megagpt: ")]
    reader = _Reader(threads[main])
    spans = list(reader.thread(threads.pop(main), is_main=True))
    spans += [span for thread in threads.values() for span in reader.thread(thread, is_main=False)]
    if kernels:
        # Of the host's spans, those count in which it keeps the GPU waiting.
        waits = [s for s in spans if s.level == Level.DATA or s.name.startswith("gloo:")]
        spans = waits + [reader.kernel(event) for event in kernels]
        _check_kernels(steps, kernels, reader.launches)
        steps = _until_last_kernels(steps, kernels, reader.launches)
    return Trace(steps, spans, bool(kernels), phases, sorted(_memory(events, bool(kernels))))


def _index(steps: list[tuple[int, int]], time: int) -> int | None:
    """The number of the step, from 0, that was going on at this time (ns)."""
    index = bisect.bisect_right(steps, (time, sys.maxsize)) - 1
    return index if index >= 0 and time < steps[index][1] else None


def _check_kernels(steps: list[tuple[int, int]], kernels: list[Event], launches: dict[int, "_Launch"]) -> None:
    """Raise ValueError if kernels that the steps launched were not recorded: the GPU would seem to have been idle."""
    recorded = {event["args"].get("correlation") for event in kernels}
    of_kernels = [n for n, (name, at, _) in launches.items() if _LAUNCH in name and _index(steps, at) is not None]
    lost = sum(number not in recorded for number in of_kernels)
    if lost > _TOLERATED * len(of_kernels):
        counts = f"the trace lacks {lost:,} of the {len(of_kernels):,} kernels that the steps launched"
        raise ValueError(f"{counts}: the profiler's buffers were full; profile fewer steps")


def _until_last_kernels(
    steps: list[tuple[int, int]], kernels: list[Event], launches: dict[int, "_Launch"]
) -> list[tuple[int, int]]:
    """Each step until its last kernel ends, but no longer than until the next one begins."""
    ends = [end for _, end in steps]
    for event in kernels:
        launch = launches.get(event["args"].get("correlation"))
        index = _index(steps, launch.begin) if launch is not None else None
        if index is not None:
            ends[index] = max(ends[index], _end(event))
    starts = [begin for begin, _ in steps]
    return [(a, min(b, after)) for a, b, after in zip(starts, ends, [*starts[1:], sys.maxsize], strict=True)]


def _begin(event: Event) -> int:
    return round(float(event["ts"]) * 1000)


def _end(event: Event) -> int:
    return _begin(event) + round(float(event["dur"]) * 1000)


def _memory(events: list[Event], on_gpu: bool) -> Iterator[tuple[int, int, int]]:
    for event in events:
        values = event.get("args", {})
        if event["name"] == "[memory]" and (values["Device Type"] != 0) == on_gpu:
            yield _begin(event), values["Total Allocated"], values["Total Reserved"]


class _Reader:
    """Follows each thread's calls. The main thread comes first: the others' operators refer to its forward pass."""

    def __init__(self, main: list[Event]) -> None:
        named = [(e["name"], _begin(e), _end(e)) for e in main if e.get("cat") == "user_annotation"]
        self._blocks = sorted((begin, end) for name, begin, end in named if name == ranges.BLOCK)
        self._forwards = sorted((begin, end) for name, begin, end in named if name == ranges.FORWARD)
        # Autograd's numbers of forward operators, in order of time, and the place of each.
        self._numbers: list[int] = []
        self._places: list[Place] = []
        self.launches: dict[int, _Launch] = {}
        """By the number that a launch shares with its kernel."""

    def thread(self, events: list[Event], is_main: bool) -> Iterator[Span]:
        """The stretches of the main thread, each with its innermost call; of another thread, its exchanges: on a CPU,
        no other thread computes while the main one waits."""
        calls: list[tuple[int, Event, Place]] = []
        cursor = 0

        def until(time: int) -> Iterator[Span]:
            nonlocal cursor
            if calls and time > cursor and is_main:
                yield from _span(cursor, time, calls[-1][1], calls[-1][2])
            cursor = time

        for event in sorted(events, key=lambda e: (_begin(e), -_end(e))):
            begin, end = _begin(event), _end(event)
            while calls and calls[-1][0] <= begin:
                yield from until(calls[-1][0])
                calls.pop()
            yield from until(begin)
            outer = calls[-1][2] if calls else Place()
            place = self._place(event, outer, begin)
            if place.kind is Kind.EXCHANGE is not outer.kind and not is_main:
                yield from _span(begin, end, event, place)
            if calls:
                end = min(end, calls[-1][0])
            calls.append((end, event, place))
            if is_main and not any(call["name"].startswith(_NODE) for _, call, _ in calls):
                self._remember(event, place)
            if "correlation" in event.get("args", {}):
                self.launches[event["args"]["correlation"]] = _Launch(event["name"], begin, place)
        while calls:
            yield from until(calls[-1][0])
            calls.pop()

    def kernel(self, event: Event) -> Span:
        """Work of the GPU, at the place of its launch; within a graph, its own name tells more."""
        launch = self.launches.get(event["args"].get("correlation", -1))
        place = launch.place if launch is not None else Place()
        kind = kind_of(event["name"])
        if kind is Kind.EXCHANGE or (place.kind is Kind.OTHER and place.region is Region.BLOCK):
            place = place._replace(kind=kind)
        level = Level.EXCHANGE if place.part is Part.EXCHANGE else Level.OPERATOR
        return Span(_begin(event), _end(event), level, place.part, event["name"])

    def _place(self, event: Event, outer: Place, begin: int) -> Place:
        name = event["name"]
        if event["cat"] == "user_annotation":
            region = region_of_range(name)
            if region is not None:
                return Place(region)
            return outer._replace(kind=Kind.EXCHANGE) if kind_of(name) is Kind.EXCHANGE else outer
        if outer.region is Region.FORWARD:
            outer = outer._replace(region=self._within_forward(begin))
        if event["cat"] != "cpu_op":
            return outer
        if name.startswith(_NODE):
            return self._forward_place(event["args"].get("Sequence number"), outer)
        # An operator that is made of others keeps its kind: some attention is made of matrix products.
        return outer._replace(kind=kind_of(name)) if outer.kind is Kind.OTHER else outer

    def _within_forward(self, time: int) -> Region:
        begin, end = self._forwards[bisect.bisect_right(self._forwards, (time, float("inf"))) - 1]
        inside = self._blocks[bisect.bisect_left(self._blocks, (begin, 0)) : bisect.bisect_left(self._blocks, (end, 0))]
        if not inside or time < inside[0][0]:
            return Region.EMBEDDING
        return Region.HEAD if time >= inside[-1][1] else Region.NONE

    def _remember(self, event: Event, place: Place) -> None:
        number = event.get("args", {}).get("Sequence number", -1)
        if number >= (self._numbers[-1] if self._numbers else 0):
            self._numbers.append(number)
            self._places.append(place)

    def _forward_place(self, number: int | None, outer: Place) -> Place:
        """The place of the forward operator that has made a backward one. It has the same number, or one less if it has
        made several."""
        if number is None or not self._numbers or not self._numbers[0] <= number < 2**62:
            return outer
        place = self._places[bisect.bisect_right(self._numbers, number) - 1]
        return place if place.kind is Kind.ATTENTION else place._replace(kind=Kind.OTHER)


def _span(begin: int, end: int, event: Event, place: Place) -> Iterator[Span]:
    name = event["name"]
    if event["cat"] == "cpu_op":
        is_operator = ("::" in name and not name.startswith(_NODE)) or "Compiled" in name
        level = Level.OPERATOR if is_operator else Level.CONTAINER
        yield Span(begin, end, Level.EXCHANGE if place.kind is Kind.EXCHANGE else level, place.part, name)
    elif place.kind is Kind.EXCHANGE:
        yield Span(begin, end, Level.EXCHANGE, Part.EXCHANGE, name)
    elif place.region is Region.DATA:
        yield Span(begin, end, Level.DATA, Part.DATA, name)
