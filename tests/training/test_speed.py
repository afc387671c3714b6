"""The speed in the log covers the whole loop, except for saves, validations and samples."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megagpt.cli import main
from megagpt.engines.engine import Engine
from megagpt.training import loop, occasions, speed
from megagpt.training.occasions import Occasion
from megagpt.training.reporter import Reporter
from megagpt.training.reserve import Reserve
from megagpt.training.run import Run
from megagpt.training.stragglers import Stragglers
from tests.conftest import Tiny, metrics


class Clock:
    """A clock on which only the patched calls take time. `ends`: for each step, the time at its end without what passed
    inside occasions."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.outside, self.ends, self.in_occasion = 0.0, 0.0, list[float](), False
        self.patch = patch
        for module in (loop, speed):
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def takes(self, owner: object, name: str, seconds: float, then: Callable[[], object] = lambda: None) -> None:
        """Each call of `owner.name` takes that long."""
        call = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            self.outside += 0.0 if self.in_occasion else seconds
            result = call(*arguments, **named)
            then()
            return result

        self.patch.setattr(owner, name, timed)

    def watch_occasions(self) -> None:
        hold = Occasion.hold

        def watched(*arguments: Any) -> bool:
            self.in_occasion = True
            try:
                return hold(*arguments)
            finally:
                self.in_occasion = False

        self.patch.setattr(Occasion, "hold", watched)


@pytest.mark.slow
@pytest.mark.parametrize("steps_a_line", [1, 4])
def test_the_step_seconds_add_up_to_the_time_of_the_loop(
    steps_a_line: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {"every_tokens": 640}
    config = str(tiny(validation=every, sampling=every, checkpoint=every, log={"every_tokens": 128 * steps_a_line}))
    clock, steps, own = Clock(monkeypatch), list[float](), list[float]()
    clock.takes(Engine, "train_step", 8, then=lambda: clock.ends.append(clock.outside))
    clock.takes(Run, "between_steps", 1)
    clock.takes(Stragglers, "add", 0.25)
    clock.takes(Reporter, "event", 2)
    clock.takes(Run, "save", 2**10)
    clock.takes(occasions, "validation_loss", 2**12)
    clock.takes(occasions, "generate", 2**14)
    clock.watch_occasions()
    compare, took = Stragglers.add, Reserve.took
    monkeypatch.setattr(Stragglers, "add", lambda self, step, *more: own.append(step) or compare(self, step, *more))
    monkeypatch.setattr(Reserve, "took", lambda self, step=0.0, **more: steps.append(step) or took(self, step, **more))
    assert main(["train", config]) == 0

    lines = metrics(tmp_path / "runs" / "tiny")
    assert len(clock.ends) == 20
    assert len(lines) == 20 // steps_a_line
    bounds = [0.0, *clock.ends[steps_a_line - 1 :: steps_a_line]]
    expected = [(end - begin) / steps_a_line for begin, end in itertools.pairwise(bounds)]
    assert [line["step_seconds"] for line in lines] == expected
    assert all(line["tokens_per_second"] * line["step_seconds"] == pytest.approx(128) for line in lines)
    if steps_a_line == 1:
        # A step, the comparison, and what the flags say; a step's line takes no time here.
        assert expected[:5] == [8, 9.25, 9.25, 9.25, 9.25]
        assert max(expected) < 2**10
    # A stop and the comparison of the ranks ask for the step alone.
    assert own == [8] * 20
    assert {step for step in steps if step} == {8}
