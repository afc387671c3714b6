"""Saves, validations and samples that a stop or a kill interrupted are done after the resume, at their own tokens."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.cli import main
from megagpt.engines.engine import Engine
from megagpt.errors import ExitCode
from megagpt.position import Position
from megagpt.training import loop, occasions
from megagpt.training.occasions import Occasion, crossed
from megagpt.training.run import Run
from megagpt.training.safety import StopRequest
from tests.conftest import Tiny, metrics, write_tiny


class Killed(BaseException):
    """The process is gone."""


class Simulated:
    """A run without a model: what the loop asks of one, and the log and the checkpoints that it leaves.

    `fate` is asked wherever a process may be stopped or killed.
    """

    def __init__(self, steps: list[int], intervals: list[int], fate: Callable[[], str | None]) -> None:
        self.steps, self.intervals, self.fate = steps, intervals, fate
        self.log: list[list[int]] = [[] for _ in intervals]
        self.start = Position(0, 0, 1, sum(steps))
        self.ending, self.world, self.reporter, self.config = (MagicMock() for _ in range(4))
        self.guard = MagicMock(in_a_row=0)
        self.profiler = MagicMock(**{"end.return_value": False})
        self.folder, self.last_held = Path("run"), dict[str, int]()

    def resume(self) -> None:
        """From the last save; the log's lines past it are dropped."""
        saved = max(self.log[0], default=0)
        self.log = [[tokens for tokens in lines if tokens <= saved] for lines in self.log]
        taken = sum(1 for i in range(len(self.steps)) if sum(self.steps[: i + 1]) <= saved)
        self.start = Position(saved, taken, 1, sum(self.steps))

    def occasions(self) -> tuple[Occasion, ...]:
        """The saves, with the first interval, and one for each other interval."""

        def work(kind: int) -> Callable[[Position, StopRequest], bool]:
            def hold(at: Position, stop: StopRequest) -> bool:
                if self._happens() == "stop" and kind > 0:
                    return False
                self.log[kind].append(at.tokens)
                return True

            return hold

        held = [max(lines, default=0) for lines in self.log]
        return tuple(Occasion(work(kind), (every,), held[kind]) for kind, every in enumerate(self.intervals))

    def _happens(self) -> str | None:
        fate = self.fate()
        if fate == "kill":
            raise Killed
        return fate

    def step(self, at: Position) -> Position:
        self._happens()
        return at.after(self.steps[at.step])

    def between_steps(self, at: Position) -> bool:
        return self._happens() == "stop"

    def batches(self) -> Any:
        return MagicMock()

    def finish_saves(self, at: Position) -> None:
        pass


def run_to_the_end(run: Simulated) -> list[list[int]]:
    """Resume the run after each stop and each kill, in the real loop; returns the tokens of each occasion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "occasions", Simulated.occasions)
        patch.setattr(loop, "_step", lambda run, at, *_: run.step(at))
        patch.setattr(loop, "say", lambda text: None)
        while True:
            with contextlib.suppress(Killed):
                if loop.loop(run, StopRequest()).name == "finished":  # type: ignore[arg-type]
                    return run.log
            run.resume()


@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    intervals=st.lists(st.integers(0, 25), min_size=2, max_size=4),
    fates=st.lists(st.sampled_from([None, None, None, "stop", "kill"]), max_size=80),
)
def test_every_occasion_is_held_where_the_whole_run_has_it(
    steps: list[int], intervals: list[int], fates: list[str | None]
) -> None:
    """Each fate happens once; after the last of them the run is left alone."""
    left = iter(fates)
    whole = run_to_the_end(Simulated(steps, intervals, lambda: None))
    cut = run_to_the_end(Simulated(steps, intervals, lambda: next(left, None)))
    assert cut[1:] == whole[1:]
    assert set(whole[0]) <= set(cut[0]), "saves at stops come on top"


@given(every=st.integers(1, 50), before=st.integers(0, 500), more=st.integers(0, 100))
def test_crossed_is_a_multiple_in_between(every: int, before: int, more: int) -> None:
    now = before + more
    assert crossed(every, before, now) == any(before < n <= now for n in range(0, now + 1, every))


# SIGTERM comes where all of them are due for the second time, after six of ten steps.
DUE = {"every_tokens": 384}
SHORT: dict[str, dict[str, int]] = {
    "train": {"tokens": 1280}, "validation": DUE, "sampling": DUE, "checkpoint": {**DUE, "keep_last": 9},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", str(write_tiny(folder, corpus, **SHORT))]) == 0
    return folder / "runs" / "tiny"


@pytest.mark.slow
@pytest.mark.xdist_group("occasions")
@pytest.mark.parametrize("where", ["step", "save", "validation", "samples"])
def test_a_stop_loses_no_validation_and_no_samples(
    where: str, whole_run: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM at the position where all three are due; the resumed run has the uninterrupted one's values."""
    config = str(tiny(**SHORT))
    targets: dict[str, tuple[object, str]] = {
        "step": (Engine, "train_step"), "save": (Run, "save"),
        "validation": (occasions, "validation_loss"), "samples": (occasions, "generate"),
    }  # fmt: skip
    owner, name = targets[where]
    call, calls = getattr(owner, name), [0]

    def signalled(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == (6 if where == "step" else 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return call(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        assert main(["train", config, "run.name=cut"]) == ExitCode.STOPPED
    assert main(["train", "--resume", str(tmp_path / "runs" / "cut")]) == 0
    for event in ("step", "validation", "samples"):
        whole, cut = (
            [{k: line.get(k) for k in ("tokens_seen", "step", "loss", "validation_loss", "samples")} for line in lines]
            for lines in (metrics(run, event) for run in (whole_run, tmp_path / "runs" / "cut"))
        )
        assert cut == whole
        assert len(whole) == (10 if event == "step" else 4)
