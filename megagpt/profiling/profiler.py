"""Profiles a few steps of an engine, inside a run or alone. Nothing that it does changes a number of the run, and its
errors do not end the run."""

import contextlib
import gzip
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from megagpt.console import say, warn
from megagpt.engines.engine import Engine
from megagpt.errors import UserError, first_line
from megagpt.hardware import device_name
from megagpt.profiling.breakdown import Collectives, breakdown, collectives
from megagpt.profiling.ranges import marked
from megagpt.profiling.rates import find_rates
from megagpt.profiling.report import write_report
from megagpt.profiling.table import make_table
from megagpt.profiling.trace import Trace, read_trace
from megagpt.world import World

# zlib's level: a trace shrinks to a tenth in a third of the time of the default level.
_COMPRESSION = 3
_NOT_COMPARED = "the ranks' traces differ: waiting for peers is counted as exchange"


def profile_folder(run: Path, name: str) -> Path:
    """The folder of a profile: of these steps of a run, or of `megagpt profile`."""
    return run / "profile" / name


class StepProfiler:
    """Profiles the steps with these numbers. Every rank has one and calls `begin` before and `end` after each step, and
    `write` when `end` says so: there, the ranks compare their collectives, and rank 0 writes the table."""

    def __init__(self, engine: Engine, steps: range, folder: Path, must_succeed: bool = False) -> None:
        """`steps`: empty for no profile. In the step before them, if there is one, the profiler runs already and keeps
        nothing, because its own start takes time. `must_succeed`: raise UserError if the profile fails."""
        self._engine, self._steps, self._folder, self._must_succeed = engine, steps, folder, must_succeed
        self._open = contextlib.ExitStack()
        self._profile: Any = None
        self.problem = ""
        """Why this rank's profile is incomplete."""

    @property
    def _on_gpu(self) -> bool:
        return self._engine.world.device.type == "cuda"

    def active(self, step: int) -> bool:
        """Whether the profiler runs in this step, which therefore takes longer than others."""
        return bool(self._steps) and self._steps[0] - 1 <= step <= self._steps[-1]

    def begin(self, step: int) -> None:
        """To be called before the step with this number."""
        if self._profile is None and not self.problem and self.active(step):
            with self._tolerating():
                self._start(warmup=self._steps[0] - step)

    def end(self, step: int) -> bool:
        """To be called after the step; True if it was the last one."""
        if not self.active(step):
            return False
        if self._profile is not None:
            with self._tolerating():
                if step in (self._steps[0] - 1, self._steps[-1]):
                    _synchronize(self._engine.world)
                self._profile.step()
        return step == self._steps[-1]

    def close(self) -> None:
        """End a profile whose last step was not taken; nothing of it is written."""
        if self._profile is not None:
            say(f"{self._folder}: no profile, because step {self._steps[-1]} was not reached")
        self._stop()

    def _stop(self) -> None:
        with self._tolerating():
            self._open.close()
        self._profile = None

    def _start(self, warmup: int) -> None:
        # Otherwise its C++ prints lines for its authors. It reads this when it first starts.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._open.enter_context(marked(self._engine))
        _synchronize(self._engine.world)
        # PyTorch warns of a profile without warm-up; 2.11 also of one that it starts a second time.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            plan = schedule(wait=0, warmup=warmup, active=len(self._steps), repeat=1)
            recording = profile(activities=activities, schedule=plan, profile_memory=True)
            self._profile = self._open.enter_context(recording)

    def write(self) -> None:
        """Write this rank's trace and, on rank 0, everything that follows from it. Every rank must call it."""
        trace = None
        with self._tolerating():
            trace = self._export()
        self._stop()
        shortest = self._shortest(collectives(trace) if trace is not None else None)
        if trace is not None and self._engine.world.is_main:
            notes = [] if shortest is not None else [_NOT_COMPARED]
            with self._tolerating():
                self._report(trace, shortest or {}, notes)

    def _shortest(self, found: Collectives | None) -> Collectives | None:
        """Of each collective, the least of all ranks' durations; None if some rank has not the same ones."""
        world, count = self._engine.world, -1 if found is None else len(found)
        fewest, most = world.min_of([count, -count])
        if found is None or fewest != -most:
            return None
        keys = sorted(found)
        if not keys:
            return {}
        return dict(zip(keys, map(int, world.min_of([found[key] for key in keys])), strict=True))

    def _export(self) -> Trace:
        """Write the trace into the folder. Raises OSError; ValueError if it is incomplete."""
        if self._profile is None:
            raise ValueError("the profiler did not start")
        name = f"rank_{self._engine.world.rank}.json"
        with tempfile.TemporaryDirectory() as scratch:
            written = Path(scratch, name)
            self._profile.export_chrome_trace(str(written))
            trace = read_trace(written)
            if self._on_gpu and not trace.on_gpu:
                raise ValueError("the trace has no kernels; set KINETO_LOG_LEVEL=0 to see why")
            self._folder.mkdir(parents=True, exist_ok=True)
            packed = self._folder / f"{name}.gz"
            unfinished = packed.with_name(packed.name + ".tmp")
            with written.open("rb") as source, gzip.open(unfinished, "wb", compresslevel=_COMPRESSION) as target:
                shutil.copyfileobj(source, target)
            unfinished.replace(packed)
        return trace

    def _report(self, trace: Trace, shortest: Collectives, notes: list[str]) -> None:
        config, world = self._engine.config, self._engine.world
        first, last = self._steps[0], self._steps[-1]
        which = f"steps {first} to {last}" if last > first else f"step {first}"
        title = f"{config.run.name}: {which}, rank 0 of {world.size}, {self._engine.describe()}"
        rates = find_rates(config, world.device)
        table = make_table(config, world.size, breakdown(trace, shortest), rates, title, notes)
        memory = f"{config.run.name}: memory of {device_name(world.device)}, rank 0, {which}"
        write_report(self._folder, table, trace, memory, last)
        say(table.as_text())
        say(f"profile written to {self._folder}; open its traces at https://ui.perfetto.dev")

    @contextlib.contextmanager
    def _tolerating(self) -> Any:
        """Says in one line why the profile fails, and lets the run continue."""
        try:
            yield
        except Exception as error:  # whatever it is: the run matters more
            self.problem = f"{self._folder}: no complete profile: {first_line(error)}"
            if self._must_succeed:
                raise UserError(self.problem) from error
            warn(f"[rank {self._engine.world.rank}] {self.problem}")


def _synchronize(world: World) -> None:
    """Wait for the device, so that a trace begins and ends with a step's own kernels."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
