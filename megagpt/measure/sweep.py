"""`megagpt bench --sweep`: the settings of megagpt that are measured one after another, and the best of them."""

import argparse
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from megagpt.console import warn
from megagpt.errors import UserError
from megagpt.measure.report import Entry, Report
from megagpt.process_memory import free_memory

AXES = ("batch", "compile", "activation_checkpointing")
# Micro-batches of the smallest size in a step, if the user gives no number: batches then double three times.
ACCUMULATION = 8
_CHECKPOINTING = "train.activation_checkpointing"
_MODES = ("none", "selective", "full")


class Setting(NamedTuple):
    """Values of the axes; None: as bench's other arguments say."""

    batch: int
    compile: bool | None
    activation_checkpointing: str | None

    def __str__(self) -> str:
        compiled = None if self.compile is None else f"compile {'on' if self.compile else 'off'}"
        mode = self.activation_checkpointing
        checkpointing = None if mode is None else f"activation checkpointing {mode}"
        return ", ".join(filter(None, (f"batch {self.batch}", compiled, checkpointing)))

    def overrides(self) -> list[str]:
        """The setting as overrides of a config."""
        compiled = None if self.compile is None else f"train.compile={str(self.compile).lower()}"
        mode = self.activation_checkpointing
        checkpointing = None if mode is None else f"{_CHECKPOINTING}={mode}"
        return [text for text in (f"train.micro_batch={self.batch}", compiled, checkpointing) if text]

    def applied(self, arguments: argparse.Namespace) -> argparse.Namespace:
        """bench's arguments with the setting in them. Larger batches take fewer micro-batches, so that a step keeps its
        tokens, as in a run."""
        values = {**vars(arguments), "batch": self.batch}
        values["accumulation"] = arguments.accumulation * arguments.batch // self.batch
        if self.compile is not None:
            values["compile"] = self.compile
        if self.activation_checkpointing is not None:
            values["overrides"] = [*arguments.overrides, f"{_CHECKPOINTING}={self.activation_checkpointing}"]
        return argparse.Namespace(**values)


def chosen_axes(arguments: argparse.Namespace, overridden: Collection[str]) -> list[str]:
    """The axes that `--sweep` names, or all that no other argument decides. `overridden`: keys of the overrides.
    Raises UserError for an axis that does not exist, and for one that another argument decides."""
    decided = {}
    if arguments.compile is not None:
        decided["compile"] = "--compile or --no-compile"
    if _CHECKPOINTING in overridden:
        decided["activation_checkpointing"] = f"the override of {_CHECKPOINTING}"
    if not arguments.sweep:
        return [axis for axis in AXES if axis not in decided]
    axes = [name for name in arguments.sweep.split(",") if name]
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"--sweep {axis!r}: valid: {', '.join(AXES)}")
        if axis in decided:
            raise UserError(f"--sweep {axis} tries every value: leave out {decided[axis]}, or this axis")
    if not axes:
        raise UserError(f"--sweep {arguments.sweep!r} names no axis; valid: {', '.join(AXES)}")
    return axes


def check_batches(axes: Collection[str], arguments: argparse.Namespace) -> None:
    """Raises UserError if a step cannot be made of larger micro-batches."""
    if "batch" in axes and arguments.accumulation % 2:
        way = f"give an even number: with {ACCUMULATION}, batches go from {arguments.batch} to "
        way += f"{ACCUMULATION * arguments.batch}; or leave out the axis batch"
        reason = f"a step of {arguments.accumulation} micro-batches cannot be made of ones twice as large"
        raise UserError(f"--accumulation {arguments.accumulation}: {reason}; {way}")


def batches(axes: Collection[str], arguments: argparse.Namespace) -> list[int]:
    """Micro-batches of a line: they double as long as they make up a step of the same tokens."""
    sizes, left = [arguments.batch], arguments.accumulation
    while "batch" in axes and left % 2 == 0:
        sizes, left = [*sizes, 2 * sizes[-1]], left // 2
    return sizes


def describe(axes: Sequence[str], sizes: Sequence[int], device_type: str) -> str:
    """The sweep's plan, in one line."""
    parts = []
    if "batch" in axes:
        end = "memory is full" if device_type == "cuda" else "one is no faster than half of it, or would not fit"
        parts.append(f"batches of {', '.join(map(str, sizes))} in steps of the same tokens, or until {end}")
    if "compile" in axes:
        slow = "" if device_type == "cuda" else ", which takes a minute or more to start here"
        parts.append(f"without and with torch.compile{slow}")
    if "activation_checkpointing" in axes:
        parts.append(f"activation checkpointing {', '.join(_MODES)}")
    return f"sweep on the {'GPU' if device_type == 'cuda' else 'CPU'}: {'; '.join(parts)}"


def first_settings(axes: Sequence[str], batch: int) -> Iterator[Setting]:
    """The first setting of each line of growing batches."""
    compiled = (False, True) if "compile" in axes else (None,)
    for setting in itertools.product(compiled, _MODES if "activation_checkpointing" in axes else (None,)):
        yield Setting(batch, *setting)


def ends(line: Sequence[Entry], report: Report) -> bool:
    """Whether twice the last batch of a line is not worth a try, or not safe: a CPU's memory is everybody's, so it is
    not filled to the end."""
    last = line[-1]
    if last.failure:
        return True
    if report.device_type == "cuda":
        return False
    if len(line) > 1 and report.tokens_per_second(last) <= report.tokens_per_second(line[-2]):
        return True
    # The peak is a constant and a part that grows with the batch; the first row does not tell them apart.
    peaks = [0, *(max(measured.memory for measured in entry.rounds) for entry in line)]
    needed = peaks[-1] + (2 * (peaks[-1] - peaks[-2]) if len(line) > 1 else peaks[-1])
    free = free_memory()
    if needed > free:
        size = f"{needed / 2**30:.1f} GiB, of which {free / 2**30:.1f} are free"
        warn(f"  batch {2 * last.row.config.micro_batch} is left out: it would take about {size}")
    return needed > free
