"""`megagpt profile` and `train.profile_steps`: what they leave, and that they change nothing else."""

import errno
import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.config_types import steps_of
from megagpt.engines.engine import Engine
from megagpt.errors import ExitCode
from megagpt.measure.processes import free_port, rank_environment
from megagpt.profiling import profiler
from megagpt.profiling.parts import Part
from megagpt.world import World
from tests.conftest import Refusal, Tiny, metrics
from tests.processes import Process, command, start_ranks

pytestmark = pytest.mark.usefixtures("known_rates")
FILES = {"memory.png", "parts.json", "parts.txt", "rank_0.json.gz"}
QUICK: dict[str, Any] = {"validation": {"tokens": 0}, "sampling": {"samples": 0}}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "tfevents" not in path.name}


def parts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "parts.json").read_text())["parts"]
    return found


def curve(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["gradient_norm"]) for line in metrics(run)]


@pytest.mark.slow
def test_a_profile_leaves_the_run_of_that_name_alone(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = str(tiny(**QUICK, train={"tokens": 256})), tmp_path / "runs" / "tiny"
    # A batch of 8 sequences, of which the run begins with fewer; and more steps than the run has.
    ramp = ["train.batch_tokens=256", "train.batch_ramp_start=32", "train.batch_ramp_tokens=1e3", "model.dropout=0.1"]
    assert main(["profile", config, *ramp, "--steps", "2"]) == 0
    assert files(run).keys() == {f"profile/standalone/{path.name}" for path in (run / "profile/standalone").iterdir()}
    assert main(["train", config]) == 0, "the folder of a profile is no run"
    before = {name: data for name, data in files(run).items() if not name.startswith("profile/")}
    capsys.readouterr()
    assert main(["profile", config, *ramp, "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert {name: data for name, data in files(run).items() if not name.startswith("profile/")} == before
    folder = run / "profile" / "standalone"
    assert names(folder) == FILES
    assert (folder / "parts.txt").read_text().partition("\n\n")[0] in printed
    assert "tiny: step 3 of 8 sequences, rank 0 of 1, ddp on 1 x cpu" in printed
    assert parts(folder)[Part.HEAD]["flops"] == 6 * 50304 * 32 * 256
    assert parts(folder)[Part.DATA]["seconds"] > 0


@pytest.mark.slow
def test_profiled_steps_keep_the_losses_and_are_marked(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, runs = str(tiny(**QUICK, model={"dropout": 0.1}, train={"tokens": 1024})), tmp_path / "runs"
    assert main(["train", config]) == 0
    assert main(["train", config, "run.name=profiled", "train.profile_steps=4-5"]) == 0
    assert curve(runs / "profiled") == curve(runs / "tiny")
    assert [line["step"] for line in metrics(runs / "profiled") if line.get("profiled")] == [3, 4, 5]
    folder = runs / "profiled" / "profile" / "steps_4-5"
    assert names(folder) == FILES
    assert "profiled: steps 4 to 5 of 4 sequences, rank 0 of 1" in capsys.readouterr().out
    found = parts(folder)
    step = found.pop("step")
    assert sum(part["seconds"] for part in found.values()) == pytest.approx(step["seconds"])
    with gzip.open(folder / "rank_0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) == 2
    # A run that resumes past these steps says so.
    assert main(["train", "--resume", str(runs / "profiled"), "train.tokens=1152"]) == 0
    assert "train.profile_steps 4-5 lie before step 8, from which this run resumes" in capsys.readouterr().out


def test_the_first_step_can_be_profiled(tiny: Tiny, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """It is the smallest of the batch ramp."""
    ramp = ["train.batch_tokens=256", "train.batch_ramp_start=32", "train.batch_ramp_tokens=1e3"]
    assert main(["train", str(tiny(**QUICK, train={"tokens": 256})), *ramp, "train.profile_steps=1"]) == 0
    folder = tmp_path / "runs" / "tiny" / "profile" / "steps_1"
    assert parts(folder)["step"]["seconds"] > 0
    assert json.loads((folder / "parts.json").read_text())["batch_sequences"] == [1]
    assert not [str(w.message) for w in recwarn if "rofiler" in str(w.message)]


@pytest.mark.slow
def test_a_stop_between_profiled_steps_ends_as_ever(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = Engine.train_step, [0]

    def stopped(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(Engine, "train_step", stopped)
    config, run = str(tiny(**QUICK, train={"tokens": 768})), tmp_path / "runs" / "tiny"
    assert main(["train", config, "train.profile_steps=3-5"]) == ExitCode.STOPPED
    assert "steps_3-5: no profile, because the run ended before it was complete" in capsys.readouterr().out
    assert not (run / "profile").exists()
    # The steps that are left are profiled after the resume.
    assert main(["train", "--resume", str(run)]) == 0
    assert "tiny: steps 4 to 5" in (run / "profile" / "steps_3-5" / "parts.txt").read_text()


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "reason"),
    [("profile", "NotADirectory"), ("gzip.open", "No space left"), ("write_report", "No space left")],
)
def test_a_profile_that_fails_is_one_line_and_the_run_continues(
    place: str, reason: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config, run = str(tiny(**QUICK, train={"tokens": 384})), tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    if place == "profile":  # a file in place of the folder
        (run / "profile").write_text("")
    else:
        monkeypatch.setattr(f"megagpt.profiling.profiler.{place}", full)
    assert main(["train", config, "train.profile_steps=2"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"[rank 0] {run}/profile/steps_2: no complete profile: ")
    assert reason in line
    assert len(metrics(run)) == 3


def test_a_profile_that_cannot_be_written_is_an_error(
    tiny: Tiny, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny().parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "profile").write_text("")
    refusal(["profile", str(tiny()), "--steps", "1"], f"{folder}/profile/standalone: Not a directory; fix this")
    (folder / "profile").unlink()
    monkeypatch.setattr("megagpt.profiling.profiler.gzip.open", full)
    refusal(["profile", str(tiny()), "--steps", "1"], f"{folder}/profile/standalone: no complete profile: OSError")
    refusal(["profile", str(tiny()), "--steps", "21"], "--steps 21 is more than 20", "such as --steps 3")


def test_a_peer_whose_profile_fails_ends_all(tiny: Tiny, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "gather_objects", lambda self, value: [value, "the reason of rank 1"])
    refusal(["profile", str(tiny()), "--steps", "1"], "the reason of rank 1")


def test_a_profiler_that_does_not_start_ends_no_run(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "profile", full)
    assert main(["train", str(tiny(**QUICK, train={"tokens": 384})), "train.profile_steps=2"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "steps_2: no complete profile: OSError: [Errno 28]" in line
    assert len(metrics(tmp_path / "runs" / "tiny")) == 3


@pytest.mark.parametrize(
    ("value", "problem"),
    [("0-3", "steps are numbered from 1"), ("5-2", "the first step 5 is after the last one 2"),
     ("20-21", "the run ends with step 20"), ("soon", "'soon' is not first-last"), ("-3", "'-3' is not first-last"),
     ("5-25", "21 steps are more than 20"), ("1.5", "'1.5' is not first-last"), ("1-2-3", "'1-2-3' is not first-last")],
)  # fmt: skip
def test_steps_that_cannot_be_profiled_are_refused(value: str, problem: str, tiny: Tiny, refusal: Refusal) -> None:
    for name in ("train", "config"):
        refusal([name, str(tiny()), f"train.profile_steps={value}"], "train.profile_steps", problem)


@pytest.mark.parametrize(
    ("value", "steps"),
    [("4-5", range(4, 6)), ("[4, 5]", range(4, 6)), ("4, 5", range(4, 6)), ("7", range(7, 8)), ("0", range(0)),
     ("1_0-2_0", range(10, 21)), ("", range(0)), ("none", range(0))],
)  # fmt: skip
def test_steps_may_be_written_as_other_trainers_do(value: str, steps: range, tiny: Tiny) -> None:
    config = load_config(str(tiny()), [f"train.profile_steps={value}"])
    assert steps_of(config.train.profile_steps) == steps
    in_a_file = {"": "", "0": 0, "7": 7, "[4, 5]": [4, 5]}
    if value in in_a_file:
        assert load_config(str(tiny(train={"profile_steps": in_a_file[value]}))).train == config.train


def test_zero_steps_are_refused(tiny: Tiny, refusal: Refusal) -> None:
    refusal(["profile", str(tiny()), "--steps", "0"], "argument --steps: '0' is not a whole number above 0")


@pytest.mark.slow
def test_each_rank_has_a_trace(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(**QUICK, train={"tokens": 640, "micro_batch": 2}, engine={"name": "fsdp"})
    ranks = start_ranks(2, [str(config), "train.profile_steps=3-4"], tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0]
    check_ranks(tmp_path / "runs" / "tiny" / "profile" / "steps_3-4")
    port, arguments = free_port(), ["profile", str(config), "--steps", "1"]
    ranks = [
        Process(command, arguments, cwd=tmp_path, stdout=(log := tmp_path / f"{rank}.log"), stderr=log,
                variables=rank_environment(rank, 2, port))
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.wait() for rank in ranks] == [0, 0]
    check_ranks(tmp_path / "runs" / "tiny" / "profile" / "standalone")
    assert "exchange between ranks" in (tmp_path / "0.log").read_text()
    assert "exchange between ranks" not in (tmp_path / "1.log").read_text()


@pytest.mark.slow
def test_collectives_of_several_groups_are_not_compared(tiny: Tiny, tmp_path: Path) -> None:
    """Each of these two copies of the model has collectives of its own, and the sum over both is one of all ranks."""
    config = tiny(**QUICK, train={"tokens": 384, "micro_batch": 2}, engine={"name": "fsdp", "shard_ranks": 1})
    ranks = start_ranks(2, [str(config), "train.profile_steps=2"], tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0]
    folder = tmp_path / "runs" / "tiny" / "profile" / "steps_2"
    assert parts(folder)[Part.EXCHANGE]["seconds"] > 0
    assert Part.PEERS not in parts(folder)
    assert any("several groups" in note for note in json.loads((folder / "parts.json").read_text())["notes"])


def check_ranks(folder: Path) -> None:
    """Files of two ranks under FSDP, whose exchange has a line. Whether rank 0 waited for its peer is up to them."""
    assert names(folder) == FILES | {"rank_1.json.gz"}
    found = parts(folder)
    step = found.pop("step")
    assert sum(part["seconds"] for part in found.values()) == pytest.approx(step["seconds"])
    assert found[Part.EXCHANGE]["seconds"] > 0
    assert found[Part.EXCHANGE]["floor_seconds"] is None
    assert found[Part.EXCHANGE]["bytes"] > 0
    assert json.loads((folder / "parts.json").read_text())["notes"][1:] == []
