"""Times work on a device, and decides which of several times counts."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

# Shortest time (s) of a block of equal calls: long enough that the clock's own cost and a wait for a GPU are nothing.
BLOCK_SECONDS = 0.03


class _Plan(NamedTuple):
    warmup_steps: int
    warmup_seconds: float
    """Least time of more steps to warm up, after these: the first ones compile."""
    call_warmup_seconds: float
    """Least time for which a call is repeated before it is timed."""
    steps: int
    blocks: int
    """Blocks of equal calls."""
    statistic: Literal["best", "median"]


# Numbers by kind of device. Other processes slow a CPU's steps down, so its best step is nearest to its own speed. A
# GPU is fastest in its first seconds, before its heat and its power limit lower the clock, so its best step is not that
# of a run. It is warm when the steps end; a product then needs only the time in which the power limit acts.
_PLANS = {"cpu": _Plan(2, 0, 0, 5, 3, "best"), "cuda": _Plan(10, 10, 0.5, 50, 10, "median")}


def statistic(device_type: str) -> Literal["best", "median"]:
    """The name of the time that counts on such a device."""
    return _PLANS[device_type].statistic


def typical(seconds: Sequence[float], device_type: str) -> float:
    """The time that counts of several times of the same work."""
    return min(seconds) if statistic(device_type) == "best" else statistics.median(seconds)


def time_steps(step: Callable[[], object], device: torch.device, steps: int | None = None) -> list[float]:
    """Seconds of each measured step, after steps to warm up. On a GPU they last from the end of one step to the end of
    the next, by the GPU's own clock: the host may run ahead, as it does in training. `steps`: measured ones; None: as
    many as the device needs."""
    plan = _PLANS[device.type]
    for _ in range(plan.warmup_steps):
        step()
    if plan.warmup_seconds:
        _repeat(step, plan.warmup_seconds, device)
        step()  # so that the GPU does not wait for the first measured one
    marks = [_mark(device)]
    for _ in range(steps or plan.steps):
        step()
        marks.append(_mark(device))
    _wait(device)
    return [_between(begin, end) for begin, end in itertools.pairwise(marks)]


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from blocks of many calls one after another."""
    call()
    _wait(device)
    _repeat(call, _PLANS[device.type].call_warmup_seconds, device)

    def block(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        return (time.perf_counter() - start) / calls

    calls = max(1, math.ceil(BLOCK_SECONDS / block(1)))
    return typical([block(calls) for _ in range(_PLANS[device.type].blocks)], device.type)


def _repeat(call: Callable[[], object], seconds: float, device: torch.device) -> None:
    """Call it again until the device has worked for that time."""
    if not seconds:
        return
    _wait(device)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        _wait(device)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
