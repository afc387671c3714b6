"""`megagpt status` of runs in every state."""

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import main
from megagpt.config_file import load_config, to_yaml
from megagpt.config_occasions import EvaluationConfig
from megagpt.incarnations import claim
from megagpt.training.run_folder import this_process
from megagpt.training.status import read_status, status_lines
from tests.conftest import Refusal, Tiny, write_tiny

Capture = pytest.CaptureFixture[str]

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
        """Make the run look as if it had not written for that long."""
        then = time.time() - seconds
        for path in (self.metrics, *(self.folder / "incarnations").glob("*")):
            os.utime(path, (then, then))

    def lines(self) -> list[str]:
        return list(status_lines(read_status(self.folder, self.config)))

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
    assert run.state == "running on n1"
    assert run.line("progress") == "25.0% of 2,560 tokens, step 5, loss 4.2000"
    assert run.line("speed") == "256 tok/s; 00:07 to go at that speed", "15 steps of half a second"
    assert re.fullmatch(r"\S+ on n1, ddp on 8 rank\(s\), from 0 tokens; the last one", run.line("  1:"))
    assert run.line("stop with") == "Ctrl-C in its terminal on n1"
    assert run.line("watch with") == f"tensorboard --logdir {run.folder.parent}"


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


def test_the_last_exams_are_shown(run: Run) -> None:
    """Also if many steps followed them, and those of an early log."""
    run.steps(1, 2)
    assert not any(line.startswith("exams") for line in run.lines())
    run.config = dataclasses.replace(run.config, evaluation=EvaluationConfig(tasks=("hellaswag",)))
    run.write("exam", 1, **{"exam/hellaswag": 0.2, "exam/hellaswag_stderr": 0.01, "exam/hellaswag_items": 9})
    assert run.line("exams") == "hellaswag 0.2000 ± 0.0100 at 128 tokens"
    scores = {"hellaswag": {"value": 0.25, "standard_error": 0.0125, "score": "mean_token"}}
    scores |= {"ptb": {"value": "inf", "score": "per_token_perplexity"}, "odd": {"value": []}}
    run.write("exam", 2, exams=scores)
    expected = "hellaswag 0.2500 ± 0.0125; ptb inf at 256 tokens"
    assert run.line("exams") == expected
    for _ in range(3):
        run.write("step", 3, loss=4.0, tokens_per_second=256.0, padding="x" * 2**17)
    assert run.line("exams") == expected
    assert read_status(run.folder, run.config).as_json()["exams"]["hellaswag"]["tokens"] == 256


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


# --- where the process is, and what to do next ---


def begun(run: Run, **facts: Any) -> None:
    """An incarnation of this very process, except for what `facts` say."""
    claim(run.folder, {"host": platform.node(), "process": this_process(), "from_tokens": 0, **facts})


def ended_process() -> dict[str, Any]:
    """The facts of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return {**this_process(), "pid": process.pid}


def test_a_process_here_that_lives_is_running(run: Run) -> None:
    begun(run)
    assert run.state == "starting"
    run.steps(1, 5)
    assert run.state == "running"
    assert run.line("stop with") == f"kill -INT {os.getpid()}"
    run.age(10_000)
    assert run.state.startswith("running"), "a process is asked, not a clock"


def test_a_process_here_that_has_ended_is_dead_at_once(run: Run) -> None:
    begun(run, process=ended_process())
    run.steps(1, 5)
    assert run.state.startswith(f"dead: its process on {platform.node()} has ended and left no record")
    assert run.line("resume with") == f"megagpt train --resume {run.folder}"


def test_another_process_with_the_same_number_is_not_the_run(run: Run) -> None:
    begun(run, process={**this_process(), "created": this_process()["created"] - 3600})
    assert run.state.startswith("dead")


@pytest.mark.parametrize("fact", ["host", "boot", "namespace"])
def test_elsewhere_the_age_of_the_last_line_decides(fact: str, run: Run) -> None:
    process = {**ended_process(), **({fact: "another"} if fact != "host" else {})}
    begun(run, process=process, host="n1" if fact == "host" else platform.node())
    run.steps(1, 5)
    assert run.state.startswith("running on")
    assert re.fullmatch(r"kill -INT \d+  \(on \S+\)", run.line("stop with"))
    run.age(10_000)
    assert run.state.startswith("silent for 02:46:")
    assert f"if it died   megagpt train --resume {run.folder}" in run.lines()


def test_a_slurm_job_is_stopped_by_its_number(run: Run) -> None:
    begun(run, host="n1", job="4711.2")
    assert run.line("stop with") == "scancel --signal=INT 4711"


@pytest.mark.slow
def test_tokens_that_are_no_whole_sequence_do_not_count(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    """2,575 tokens are 80 sequences of 32, and 15 tokens."""
    folder = tmp_path / "runs" / "tiny"
    config = str(tiny(train={"tokens": 2575}, sampling={"samples": 0}, validation={"tokens": 0}))
    assert main(["train", config]) == 0
    assert "step 20 | 100.0% | " in capsys.readouterr().out
    assert main(["status", str(folder)]) == 0
    assert "progress     100.0% of 2,560 tokens, step 20" in capsys.readouterr().out


def test_runs_are_listed(run: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(run.folder, {}).end("finished", "the last token", 2560)
    run.steps(1, 20)
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    other = tmp_path / "runs" / "another"
    other.mkdir()
    (other / "config.yaml").write_text("trian: {}\n")
    monkeypatch.chdir(tmp_path)
    for words in ([], ["runs"]):
        assert main(["status", *words]) == 0
        header, *rows = capsys.readouterr().out.splitlines()
        assert header.split() == ["run", "state", "done", "tokens", "loss", "to", "go"]
        assert [row.split()[:4] for row in rows] == [
            ["runs/another", "unreadable", "0.0%", "0"],
            ["runs/tiny", "finished", "100.0%", "2,560"],
        ]
    assert main(["status", "--json"]) == 0
    another, tiny = json.loads(capsys.readouterr().out)
    assert "trian" in another["text"]
    assert (tiny["run"], tiny["state"], tiny["tokens_seen"]) == ("runs/tiny", "finished", 2560)


def test_json_holds_what_the_lines_say(run: Run, capsys: Capture) -> None:
    begun(run, process=ended_process())
    run.steps(1, 4)
    run.write("step", 5, loss="nan", step_seconds=0.5, tokens_per_second=256.0)
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    assert main(["status", "--json", str(run.folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["loss"], found["tokens_per_second"]) == ("dead", 5, "nan", 256.0)
    assert (found["seconds_left"], found["checkpoint"], found["incarnations"]) == (7.5, None, 1)
    assert found["next"] == {"resume with": f"megagpt train --resume {run.folder}"}


@pytest.mark.parametrize("name", ["", "absent"])
def test_a_folder_without_runs_is_refused_in_one_line(name: str, tmp_path: Path, refusal: Refusal) -> None:
    refusal(["status", str(tmp_path / name)], "no such folder" if name else "holds no run", "name a run's folder")
    refusal(["status", name and "x" * 300], "the name is too long" if name else "a name is empty")
