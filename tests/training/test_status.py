"""`megagpt status` of runs in every state."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.incarnations import claim
from megagpt.training.status import status_lines
from tests.conftest import write_tiny

STEP_TOKENS = 128


class Run:
    """A run of 20 steps, by what it leaves in its folder."""

    def __init__(self, folder: Path) -> None:
        self.config = load_config(str(write_tiny(folder, folder / "corpus")))
        self.folder = folder / "runs" / "tiny"
        self.folder.mkdir(parents=True)
        self.metrics = self.folder / "metrics.jsonl"

    def write(self, event: str, step: int, **values: Any) -> None:
        line = {"event": event, "step": step, "tokens_seen": step * STEP_TOKENS, **values}
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def steps(self, first: int, last: int, seconds: float = 0.5) -> None:
        for step in range(first, last + 1):
            speed = STEP_TOKENS / seconds
            self.write("step", step, loss=4.0 + 1 / step, step_seconds=seconds, tokens_per_second=speed)

    def age(self, seconds: float) -> None:
        """Make the log look as if it had not been written for that long."""
        then = time.time() - seconds
        os.utime(self.metrics, (then, then))

    def lines(self) -> list[str]:
        return list(status_lines(self.folder, self.config))

    def line(self, name: str) -> str:
        (found,) = [line for line in self.lines() if line.startswith(name)]
        return found.removeprefix(name).strip()

    @property
    def state(self) -> str:
        return self.lines()[0].removeprefix(f"{self.folder}: ")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_an_empty_folder_is_a_run_that_did_not_begin(run: Run) -> None:
    assert run.state == "not begun"
    assert run.line("progress") == "no step yet"
    assert run.line("checkpoint") == "none yet"
    assert run.line("incarnations") == "0"


def test_a_run_that_writes_is_running(run: Run) -> None:
    claim(run.folder, {"host": "n1", "engine": "ddp on 8 rank(s)", "from_tokens": 0})
    run.steps(1, 5)
    assert run.state == "running"
    assert run.line("progress") == "25.0% of 2,560 tokens, step 5, loss 4.2000"
    assert run.line("speed") == "256 tok/s; 00:07 to go at that speed", "15 steps of half a second"
    assert re.fullmatch(r"\S+ on n1, ddp on 8 rank\(s\), from 0 tokens; the last one", run.line("  1:"))
    assert run.line("resume with") == f"megagpt train --resume {run.folder}"


def test_the_speed_is_the_median_of_the_last_steps(run: Run) -> None:
    run.steps(1, 1, seconds=90)
    run.steps(2, 10)
    assert run.line("speed").startswith("256 tok/s")


def test_the_last_validation_is_shown(run: Run) -> None:
    run.steps(1, 2)
    run.write("validation", 2, validation_loss=5.0)
    run.steps(3, 4)
    run.write("validation", 4, validation_loss=4.5)
    assert run.line("progress").endswith("loss 4.2500, validation loss 4.5000")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_losses_that_are_not_finite_are_shown(value: str, run: Run) -> None:
    """JSON has no such numbers: the metrics hold their names."""
    run.steps(1, 1)
    run.write("step", 2, loss=value, step_seconds=0.5, tokens_per_second=256.0)
    run.write("validation", 2, validation_loss=value)
    assert run.line("progress").endswith(f"loss {value}, validation loss {value}")


def test_a_run_without_lines_for_ten_steps_is_silent(run: Run) -> None:
    claim(run.folder, {})
    run.steps(1, 5, seconds=20)
    run.age(190)
    assert run.state == "running"
    run.age(210)
    assert run.state.startswith("silent for 03:3")


def test_a_run_of_short_steps_is_not_silent_before_a_minute(run: Run) -> None:
    claim(run.folder, {})
    run.steps(1, 5, seconds=0.01)
    run.age(50)
    assert run.state == "running"
    run.age(70)
    assert run.state.startswith("silent for 01:1")


def test_a_finished_run_stays_finished(run: Run) -> None:
    start = claim(run.folder, {})
    run.steps(1, 20)
    start.end("finished", "the last token", 2560)
    run.age(10_000)
    assert run.state == "finished (the last token)"
    assert run.line("progress").startswith("100.0% of 2,560 tokens, step 20")
    assert "00:00 to go" in run.line("speed")


def test_a_failed_run_names_its_reason(run: Run) -> None:
    start = claim(run.folder, {"host": "n1", "engine": "ddp"})
    run.steps(1, 5)
    start.end("failed", "ValueError: broken", 640, rank=3, host="n2")
    assert run.state == "failed (ValueError: broken)"
    assert run.line("  1:").endswith("failed at 640 tokens: ValueError: broken")


def test_a_run_resumed_after_a_failure_is_running(run: Run) -> None:
    claim(run.folder, {}).end("failed", "ValueError: broken", 640)
    claim(run.folder, {})
    run.steps(1, 6)
    assert run.state == "running"
    assert run.line("incarnations") == "2"


def test_an_incarnation_without_an_end_is_told_from_the_last(run: Run) -> None:
    claim(run.folder, {"host": "n1"})
    claim(run.folder, {"host": "n2"})
    assert run.line("  1:").endswith("; left no record of its end")
    assert run.line("  2:").endswith("; the last one")


def test_an_incarnation_that_failed_early_is_listed(run: Run) -> None:
    claim(run.folder, {"job": "7.0", "note": "ended before the run was begun"}).end("failed", "no GPU", 0)
    assert "ended before the run was begun" in run.line("  1:")
    assert run.state == "failed (no GPU)"


def test_the_last_five_incarnations_are_listed(run: Run) -> None:
    for _ in range(7):
        claim(run.folder, {}).end("stopped", "SIGTERM", 0)
    assert run.line("incarnations") == "7"
    assert [line.strip()[0] for line in run.lines() if line.startswith("  ")] == ["3", "4", "5", "6", "7"]


@pytest.mark.parametrize("cut", ['{"event": "step", "step": 6, "tok', '{"event": "samples", "samples": ["\u00e9', "{"])
def test_a_cut_off_last_line_is_ignored(cut: str, run: Run) -> None:
    run.steps(1, 5)
    with run.metrics.open("ab") as file:
        file.write(cut.encode()[:-1] or b"{")
    assert run.line("progress").startswith("25.0% of 2,560 tokens, step 5")


def test_a_long_log_is_read_from_its_end(run: Run) -> None:
    """Lines past the last quarter of a MiB, of which the first is cut off."""
    run.steps(1, 1)
    for step in range(2, 12):
        run.write("samples", step, samples=["x" * 50_000])
    run.steps(12, 12)
    assert run.line("progress").startswith("60.0% of 2,560 tokens, step 12")


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"megagpt: error: {tmp_path}: not a run's folder (no config.yaml in it)\n"


def test_the_status_of_a_real_run_is_shown(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "tiny"
    assert main(["train", str(tiny(sampling={"samples": 0}))]) == 0
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: finished (the last token)"
    assert re.fullmatch(
        r"progress     100\.0% of 2,560 tokens, step 20, loss \d+\.\d{4}, validation loss \d+\.\d{4}", lines[1]
    )
    checkpoint = folder / "checkpoints" / "000000000002560"
    assert re.fullmatch(rf"checkpoint   2,560 tokens, saved \d\d:\d\d ago: {re.escape(str(checkpoint))}", lines[3])
    assert lines[4] == "incarnations 1"
    assert lines[-1] == f"resume with  megagpt train --resume {folder}"
