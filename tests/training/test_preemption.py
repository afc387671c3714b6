"""Requests to stop: signals and time limits, noticed between steps and inside validations."""

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.errors import ExitCode, UserError
from megagpt.training import occasions, safety
from megagpt.training.reserve import Reserve
from megagpt.training.safety import StopRequest
from tests.conftest import Tiny, metrics
from tests.processes import Process, megagpt, rank_environment
from tests.runs import PATIENCE


@pytest.mark.parametrize("number", safety.SIGNALS)
def test_signals_are_noted_however_often(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested()
        for _ in range(1 if number == signal.SIGINT else 5):
            os.kill(os.getpid(), number)
        assert stop.requested()
        assert stop.reason == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == number.name, "not the first"
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts() -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_and_the_first_ctrl_c_are_answered(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    assert capfd.readouterr().err.splitlines() == [
        "megagpt: SIGTERM: stopping; the steps taken so far are saved first",
        "megagpt: SIGINT: stopping; the steps taken so far are saved first; Ctrl-C again ends at once without saving",
    ]


def test_one_rank_answers_for_all(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_environment(1, 2, 29500).items():
        monkeypatch.setenv(name, value)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM"
    assert capfd.readouterr().err == ""


def busy_in_c(ready: str) -> None:
    """A main thread in which Python handles no signal for minutes."""
    with StopRequest():
        Path(ready).touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


@pytest.mark.slow
def test_ctrl_c_is_answered_and_obeyed_in_a_call_that_never_ends(tmp_path: Path) -> None:
    ready, log = tmp_path / "ready", tmp_path / "log"
    process = Process(busy_in_c, str(ready), cwd=tmp_path, stdout=log, stderr=log)

    def wait_until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)

    wait_until(ready.exists)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "SIGINT: stopping; the steps taken" in log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == ExitCode.INTERRUPTED


def test_a_time_limit_leaves_time_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    age = [0.0]
    monkeypatch.setattr(safety, "seconds_since_start", lambda: age[0])
    stop = StopRequest(time_limit=100)
    for seconds, asked in ((0.0, False), (69.0, False), (71.0, True), (0.0, True)):
        age[0] = seconds
        assert stop.requested(reserve=30) is asked
    assert stop.reason == "train.time_limit"
    age[0] = 1e9
    assert not StopRequest().requested(reserve=30)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90), ("1.5", 1.5), ("1e3", 1000), ("02:30", 150), ("2:30", 150), ("01:00:00", 3600),
        ("12:00:00", 43_200), ("1-00:00:00", 86_400), ("2-12", 216_000), ("1-06:30", 109_800), ("0", 0),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_writes_them(text: str, seconds: float, tiny: Tiny) -> None:
    config = load_config(str(tiny()), [f"train.time_limit={text}"])
    assert config.train.time_limit == seconds


@pytest.mark.parametrize("text", ["-1", "soon", "01:2:3:4", "true", "1-", "'12 h'", "[1]"])
def test_other_time_limits_are_refused(text: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"train\.time_limit.*HH:MM:SS"):
        load_config(str(tiny()), [f"train.time_limit={text}"])


@pytest.mark.timing
def test_a_run_ends_itself_in_time_and_resumes(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(train={"tokens": 128 * 100_000}))
    done = megagpt("train", config, "train.time_limit=12", cwd=tmp_path)
    run = tmp_path / "runs" / "tiny"
    assert done.returncode == ExitCode.STOPPED, done.stderr
    assert f"stopped by train.time_limit; resume with: megagpt train --resume {run}" in done.stdout
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.tokens == metrics(run)[-1]["tokens_seen"]
    total = checkpoint.tokens + 256
    done = megagpt("train", "--resume", str(run), "train.time_limit=0", f"train.tokens={total}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert metrics(run)[-1]["tokens_seen"] == total
    assert metrics(run, "resumed")[0]["seconds_to_first_step"] > 0


def stop_in_the_first_validation(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the config until SIGTERM comes as its first validation begins."""

    def signalled(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(occasions, "validation_loss", signalled)
        assert main(["train", config]) == ExitCode.STOPPED


@pytest.mark.slow
def test_an_interrupted_last_validation_is_done_after_the_resume(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything is saved by then; the run is not finished, and the next incarnation finishes it."""
    config = str(tiny())
    run = tmp_path / "runs" / "tiny"
    stop_in_the_first_validation(config, monkeypatch)
    assert metrics(run, "finished") == metrics(run, "samples") == []
    assert main(["train", "--resume", str(run)]) == 0
    for event in ("validation", "samples", "finished"):
        assert len(metrics(run, event)) == 1
    assert [line["step"] for line in metrics(run)] == list(range(1, 21))
    assert main(["train", "--resume", str(run)]) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_ends_a_validation_early(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny(train={"tokens": 128 * 1000}, validation={"every_tokens": 1280, "tokens": 5000}))
    validate, asked = occasions.validation_loss, [0]

    def signalled(engine: Any, corpus: Any, sequences: int, interrupted: Callable[[], bool]) -> float | None:
        def ask() -> bool:
            asked[0] += 1
            if asked[0] == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return interrupted()

        return validate(engine, corpus, sequences, ask)

    monkeypatch.setattr(occasions, "validation_loss", signalled)
    assert main(["train", config]) == ExitCode.STOPPED
    assert asked == [3], "it was not interrupted at once"
    run = tmp_path / "runs" / "tiny"
    assert metrics(run, "validation") == []
    assert metrics(run)[-1]["step"] == list_checkpoints(run)[-1].open().meta.step == 10
    output = capsys.readouterr().out
    assert f"exits with code {ExitCode.STOPPED}" in output


@pytest.mark.slow
def test_the_printed_bound_is_the_time_that_is_kept(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the steps, samples and saves of this run took."""
    kept: list[float] = []
    sentence = Reserve.sentence

    def noted(reserve: Reserve, size: int) -> str:
        kept.append(reserve.seconds)
        return sentence(reserve, size)

    monkeypatch.setattr(Reserve, "sentence", noted)
    assert main(["train", str(tiny())]) == 0
    (seconds,) = kept
    assert seconds > 0
    assert f"ends this run within about {seconds:.1f} s" in capsys.readouterr().out


def test_the_bound_counts_a_validation_that_compiles() -> None:
    """Until it has compiled: 2 saves of 1 s, a step of 2 s, and the longest of a step, samples and compiling."""
    reserve = Reserve(SimpleNamespace(expected_seconds=1.0))  # type: ignore[arg-type]
    reserve.took(step=2, samples=5, compiling=60)
    reserve.validation_compiles = True
    assert reserve.seconds == 60 + 2 + 2
    assert "a first validation, compiling included (60.00 s), one step (2.00 s)" in reserve.sentence(0)
    reserve.validation_compiles = False
    assert reserve.seconds == 5 + 2 + 2
    assert "samples (5.00 s), one step (2.00 s)" in reserve.sentence(0)


def test_the_bound_counts_a_step_that_compiles_again() -> None:
    """It comes after samples, a validation that compiles, or the rest of a step."""
    reserve = Reserve(SimpleNamespace(expected_seconds=1.0))  # type: ignore[arg-type]
    reserve.took(step=2, compiling=60)
    assert reserve.seconds == 2 + 2 + 2
    assert "two steps (2.00 s each)" in reserve.sentence(0)
    reserve.step_compiles = True
    assert reserve.seconds == 2 + 60 + 2
    assert "one step (2.00 s), a step that compiles the model again (60.00 s), a save" in reserve.sentence(0)
    reserve.validation_compiles = True
    assert reserve.seconds == 60 + 60 + 2


@pytest.mark.slow
def test_a_time_limit_too_short_for_a_validation_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed again and again, the run would never get past it."""
    config = str(tiny(validation={"every_tokens": 1280}))
    run = tmp_path / "runs" / "tiny"
    stop_in_the_first_validation(config, monkeypatch)
    before = len(metrics(run))
    assert main(["train", "--resume", str(run), "train.time_limit=0.001"]) == ExitCode.FAILED
    assert "train.time_limit 0.001 s ends this run before a validation" in capsys.readouterr().err
    assert len(metrics(run)) == before
    assert main(["train", "--resume", str(run), "train.time_limit=0"]) == 0
