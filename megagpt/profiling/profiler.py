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
from torch.profiler import ProfilerActivity, profile, record_function

from megagpt.console import say, warn
from megagpt.engines.engine import Engine
from megagpt.errors import UserError, first_line
from megagpt.hardware import device_name
from megagpt.profiling.breakdown import Collectives, breakdown, collectives
from megagpt.profiling.memory_picture import memory_picture
from megagpt.profiling.ranges import marked
from megagpt.profiling.rates import Rates
from megagpt.profiling.report import circumstances, remove_report, write_report
from megagpt.profiling.table import make_table
from megagpt.profiling.trace import STEP, Trace, read_trace
from megagpt.world import World

# zlib's level: a trace shrinks to a tenth in a third of the time of the default level.
_COMPRESSION = 3
# Most ranks whose traces are kept: more of them look alike, and would be many GB.
_KEPT = 64
_UNLIKE = "the ranks' traces differ: waiting for peers is counted as exchange"
_SEVERAL_GROUPS = "ranks exchange in several groups: waiting for peers is counted as exchange"


def profile_folder(run: Path, name: str) -> Path:
    """The folder of a profile: of these steps of a run, or of `megagpt profile`."""
    return run / "profile" / name


class StepProfiler:
    """Profiles the steps with these numbers. Every rank has one and calls `begin` before and `end` after each step, and
    `write` when `end` says so: there, the ranks compare their collectives, and rank 0 writes the table."""

    def __init__(
        self, engine: Engine, steps: range, folder: Path, rates: Rates | None = None, must_succeed: bool = False
    ) -> None:
        """`steps`: empty for no profile. In the step before them, if there is one, the profiler warms up: its own start
        takes time. `rates`: needed if there are steps. `must_succeed`: `write` raises UserError on every rank if the
        profile of one failed."""
        self._engine, self._steps, self._folder, self._must_succeed = engine, steps, folder, must_succeed
        self._rates = rates
        self._open = contextlib.ExitStack()
        self._profile: Any = None
        self._recording: Any = None
        self._step: Any = None
        self._batches: list[int] = []
        self.problem = ""
        """The first reason why this rank's profile is incomplete."""

    @property
    def _on_gpu(self) -> bool:
        return self._engine.world.device.type == "cuda"

    def active(self, step: int) -> bool:
        """Whether the profiler runs in this step, which therefore takes longer than others."""
        return bool(self._steps) and self._steps[0] - 1 <= step <= self._steps[-1]

    def begin(self, step: int) -> None:
        """To be called right before the step with this number: what a run does between steps is in none of them."""
        if self.problem or not self.active(step):
            return
        with self._tolerating():
            if self._profile is None:
                self._prepare()
            if step in self._steps:
                if self._recording is None:
                    self._start()
                self._step = record_function(f"{STEP}{step}")
                self._step.__enter__()

    def end(self, step: int, sequences: int) -> bool:
        """To be called right after the step; True if it was the last one. `sequences`: those of its global batch."""
        if step not in self._steps:
            return False
        self._batches.append(sequences)
        if self._step is not None:
            with self._tolerating():
                _synchronize(self._engine.world)
                self._step.__exit__(None, None, None)
                self._step = None
        return step == self._steps[-1]

    def close(self) -> None:
        """End a profile that was not written; nothing of it is kept."""
        if self._profile is not None:
            say(f"{self._folder}: no profile, because the run ended before it was complete")
        self._stop()

    def _prepare(self) -> None:
        # Otherwise its C++ prints lines for its authors. It reads this when it first starts.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._open.enter_context(marked(self._engine))
        # PyTorch 2.11 warns of a profiler that starts a second time.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.prepare_trace()

    def _start(self) -> None:
        _synchronize(self._engine.world)
        self._profile.start_trace()
        self._recording = self._profile

    def _stop(self) -> None:
        with self._tolerating():
            if self._profile is not None and self._recording is None:
                self._start()  # PyTorch knows no other end of a warm-up
            if self._recording is not None:
                self._recording.stop_trace()
        with self._tolerating():
            self._open.close()
        self._profile = self._recording = None

    def write(self) -> None:
        """Write this rank's trace and, on rank 0, everything that follows from it. Every rank must call it, and all
        wait until it is done."""
        world, trace = self._engine.world, None
        finished = self._profile
        self._stop()
        if world.is_main:
            with self._tolerating():
                remove_report(self._folder)
        world.barrier()
        with self._tolerating():
            trace = self._export(finished)
        one_group = self._one_group()
        shortest = self._shortest(collectives(trace) if trace is not None else None) if one_group else None
        if trace is not None and world.is_main:
            notes = [] if shortest is not None else [_UNLIKE if one_group else _SEVERAL_GROUPS]
            with self._tolerating():
                self._report(trace, shortest or {}, notes)
        problems = [problem for problem in world.gather_objects(self.problem) if problem]
        if problems and self._must_succeed:
            raise UserError(problems[0])

    def _one_group(self) -> bool:
        """Whether each collective is one of all ranks: the traces do not say whose it is."""
        engine, ranks = self._engine.config.engine, self._engine.world.size
        return engine.tensor_ranks == 1 and engine.shard_ranks in (0, ranks)

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

    def _export(self, finished: Any) -> Trace:
        """Read the trace and write it into the folder. Raises OSError; ValueError if it is incomplete."""
        if finished is None:
            raise ValueError("the profiler did not start")
        rank = self._engine.world.rank
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_scratch_folder(), prefix="megagpt_profile_") as scratch:
            written = Path(scratch, "trace.json")
            finished.export_chrome_trace(str(written))
            trace = read_trace(written)
            if self._on_gpu and not trace.on_gpu:
                raise ValueError("the trace has no kernels; set KINETO_LOG_LEVEL=0 to see why")
            if len(trace.steps) != len(self._steps):
                counts = f"the trace has {len(trace.steps)} of {len(self._steps)} steps"
                raise ValueError(f"{counts}: the profiler's buffers were full; profile fewer steps")
            if rank < _KEPT:
                packed = self._folder / f"rank_{rank}.json.gz"
                unfinished = packed.with_name(packed.name + ".tmp")
                with written.open("rb") as source, gzip.open(unfinished, "wb", compresslevel=_COMPRESSION) as target:
                    shutil.copyfileobj(source, target)
                unfinished.replace(packed)
        return trace

    def _report(self, trace: Trace, shortest: Collectives, notes: list[str]) -> None:
        assert self._rates is not None
        config, world = self._engine.config, self._engine.world
        first, last = self._steps[0], self._steps[-1]
        which = f"steps {first} to {last}" if last > first else f"step {first}"
        least, most = min(self._batches), max(self._batches)
        batch = f"{least} sequences" if least == most else f"{least} to {most} sequences"
        title = f"{config.run.name}: {which} of {batch}, rank 0 of {world.size}, {self._engine.describe()}"
        found = breakdown(trace, shortest)
        cuts = [self._engine.share.cut(sequences) for sequences in self._batches]
        table = make_table(config, world.size, cuts, found, self._rates, title, notes)
        memory = f"{config.run.name}: memory of {device_name(world.device)}, rank 0, {which}"
        numbers = circumstances(config, world, self._steps, self._batches) | table.as_json()
        write_report(self._folder, table, numbers, memory_picture(trace, memory), last)
        say(table.as_text())
        say(f"profile written to {self._folder}; open its traces at https://ui.perfetto.dev")

    @contextlib.contextmanager
    def _tolerating(self) -> Any:
        """Says in one line why the profile fails, and lets the run continue. Later reasons follow from the first."""
        try:
            yield
        except Exception as error:  # whatever it is: the run matters more
            if self.problem:
                return
            self.problem = f"{self._folder}: no complete profile: {first_line(error)}"
            if not self._must_succeed:
                warn(f"[rank {self._engine.world.rank}] {self.problem}")


def _scratch_folder() -> str | None:
    """A folder of this node for an uncompressed trace: TMPDIR if it is set, else /var/tmp, because /tmp is often in
    memory, and traces of many ranks would load a shared file system; None: tempfile's choice."""
    return "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else None


def _synchronize(world: World) -> None:
    """Wait for the device, so that a trace begins and ends with a step's own kernels."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
