"""Bad steps: good checkpoints survive a streak, counts continue after a resume, spikes are skipped or stop a run."""

import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megagpt.checkpoints.folder import list_checkpoints, renamed
from megagpt.cli import main
from megagpt.config import SkipConfig, TrainConfig
from megagpt.data.loader import Batch, Corpus
from megagpt.engines.engine import Engine, StepResult
from megagpt.engines.loss_scale import LossScale
from megagpt.errors import ExitCode
from megagpt.run_log import Event
from megagpt.training.bad_steps import leave_out
from megagpt.training.guard import Guard, Judgement
from tests.conftest import Tiny, metrics
from tests.runs import losses

TOO_HIGH = ["--allow-recipe-change", "optimizer.lr=3e19", "schedule.warmup_tokens=0", "train.nonfinite_limit=4"]


def tokens_of(run: Path) -> list[int]:
    return [c.tokens for c in list_checkpoints(run)]


def advice(error: str) -> list[str]:
    """The arguments of the command that an error names last."""
    return shlex.split(error[error.rindex("megagpt train") :])[1:]


@pytest.mark.slow
def test_good_checkpoints_survive_a_streak(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One finite update of 3e19 spoils the weights. Nothing good is rotated away in the skipped steps after it, the
    advice names the last good checkpoint, and following it trains on to the end."""
    monkeypatch.chdir(tmp_path)
    every_step = {"every_tokens": 128, "keep_last": 2}
    config = str(tiny(train={"tokens": 640}, checkpoint=every_step, run={"folder": "runs", "name": "tiny"}))
    run = Path("runs/tiny")
    assert main(["train", config]) == 0
    assert tokens_of(run) == [512, 640]
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "train.tokens=2560", *TOO_HIGH]) == 2
    error = capsys.readouterr().err
    assert "not finite in 4 steps in a row" in error
    assert "the last good checkpoint is runs/tiny/checkpoints/000000000000640" in error
    # Saved after the bad update, before it was known to be bad; nothing was saved in the streak.
    assert [path.name for path in renamed(run)] == ["000000000000768.abandoned"]
    assert tokens_of(run) == [512, 640]
    assert [line["skipped_updates"] for line in metrics(run)][-5:] == [0, 0, 1, 2, 3]
    arguments = [*advice(error), "schedule.warmup_tokens=512"]
    assert arguments[:4] == ["train", "--resume", "runs/tiny", "--at"]
    arguments[arguments.index("optimizer.lr=1.5e+19")] = "optimizer.lr=0.01"
    assert main(arguments) == 0
    assert metrics(run)[-1]["tokens_seen"] == 2560
    assert all(math.isfinite(loss) for loss in losses(run))


@pytest.mark.slow
def test_a_run_that_was_never_good_says_how_to_begin_again(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny(checkpoint={"every_tokens": 128}, optimizer={"lr": 3e19}, schedule={"warmup_tokens": 0}))
    run = tmp_path / "runs" / "tiny"
    assert main(["train", config]) == 2
    arguments = advice(capsys.readouterr().err)
    assert tokens_of(run) == []
    assert main(["train", "--resume", str(run)]) == 2, "nothing to resume from"
    assert "remove the renamed checkpoints" in capsys.readouterr().err
    arguments[arguments.index("optimizer.lr=1.5e+19")] = "optimizer.lr=0.01"
    assert main([*arguments, "train.tokens=256"]) == 0
    assert metrics(tmp_path / "runs" / "tiny-2")[-1]["tokens_seen"] == 256


@pytest.mark.slow
def test_a_stop_in_a_streak_saves_unproven_and_its_counts(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The uninterrupted run ends after four skipped steps; stopped after two, the resumed one ends after two more."""
    config = str(tiny(train={"tokens": 640}, checkpoint={"every_tokens": 128, "keep_last": 1}))
    run = tmp_path / "runs" / "tiny"
    assert main(["train", config]) == 0
    resume = ["train", "--resume", str(run), *TOO_HIGH]
    # After the one step that spoils the weights.
    assert main([*resume, "train.tokens=2560", "train.time_limit=0.001"]) == ExitCode.STOPPED
    assert main([*resume, "train.time_limit=0.001"]) == ExitCode.STOPPED
    assert tokens_of(run) == [640, 768, 896]
    assert [c.is_proven for c in list_checkpoints(run)] == [True, False, False]
    capsys.readouterr()
    assert main([*resume, "train.time_limit=0"]) == ExitCode.FAILED
    assert "not finite in 4 steps in a row" in capsys.readouterr().err
    assert [line["skipped_updates"] for line in metrics(run)][-5:] == [0, 0, 1, 2, 3]
    assert [line["step"] for line in metrics(run)] == list(range(1, 10))
    assert tokens_of(run) == [640]


@pytest.mark.slow
def test_a_changed_batch_numbers_steps_on(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(train={"tokens": 1280}))
    run = tmp_path / "runs" / "tiny"
    assert main(["train", config]) == 0
    bigger = ["--allow-recipe-change", "train.batch_tokens=256", "train.tokens=2560"]
    assert main(["train", "--resume", str(run), *bigger]) == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, 16))


@pytest.mark.slow
def test_a_run_resumes_from_the_checkpoint_that_was_chosen(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(tiny(train={"tokens": 1024}, checkpoint={"every_tokens": 256, "keep_last": 9}))
    run = tmp_path / "runs" / "tiny"
    assert main(["train", config]) == 0
    whole = metrics(run)
    before = (run / "config.yaml").read_bytes()
    for arguments, words in {
        ("--at", "700"): "has no checkpoint at 700 tokens; there are: 256, 512, 768, 1024",
        ("train.tokens=512",): "train.tokens 512 is less than the 1,024",
    }.items():
        capsys.readouterr()
        assert main(["train", "--resume", str(run), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before
    assert main(["train", "--resume", str(run / "checkpoints" / f"{512:015d}")]) == 0
    assert "000000000000768.abandoned, 000000000001024.abandoned" in capsys.readouterr().out
    assert tokens_of(run) == [256, 512, 768, 1024]
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in whole]
    assert metrics(run, Event.WENT_BACK)[0]["abandoned"] == ["000000000000768.abandoned", "000000000001024.abandoned"]
    abandoned = (run / "metrics.abandoned.jsonl").read_text().splitlines()
    assert sum('"event": "step"' in line for line in abandoned) == 4
    # Whoever types it again goes back again. A job that is requeued does not, once it has gone back.
    again = ["train", "--auto-resume", config, "--at", "512"]
    for job, done_before in ((None, False), ("7", False), ("7", True), ("8", False)):
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        assert main(again) == 0
        assert ("was done before this restart" in capsys.readouterr().out) == done_before


def spiky(tiny: Tiny, action: str, **train: object) -> str:
    """A run with a rate that makes the loss jump up at once, and the guard that notices it."""
    spike = {"deviations": 2.5, "steps": 4, "action": action}
    return str(tiny(train={"spike": spike, **train}, checkpoint={"every_tokens": 256, "keep_last": 9}))


def jump_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the loss of the `step`-th step of each start a spike, by asking for tokens that never come. Asserts that
    weights and moments stay as they were."""
    usual, count = Engine.train_step, 0

    def train_step(self: Engine, batch: Batch, *arguments: Any) -> StepResult:
        nonlocal count
        count += 1
        if count != step:
            return usual(self, batch, *arguments)
        for _, targets in batch.micro_batches:
            targets.copy_(torch.arange(targets.numel()).view_as(targets) + 40_000)
        before = {key: shard.flat.clone() for key, shard in self.state().items()}
        result = usual(self, batch, *arguments)
        assert all(torch.equal(before[key], shard.flat) for key, shard in self.state().items())
        return result

    monkeypatch.setattr(Engine, "train_step", train_step)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"name": "ddp"}, {"name": "zero", "stage": 2}])
def test_a_spike_is_skipped_and_counted(
    engine: dict[str, object], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jump_at(monkeypatch, 12)
    config = spiky(tiny, "skip")
    tree = yaml.safe_load(Path(config).read_text())
    Path(config).write_text(yaml.safe_dump(tree | {"engine": engine}))
    assert main(["train", config]) == 0
    run = tmp_path / "runs" / "tiny"
    (skipped,) = metrics(run, Event.SKIPPED)
    assert (skipped["step"], skipped["reason"]) == (12, "spike")
    steps = metrics(run)
    assert [line["skipped_updates"] for line in steps] == [0] * 11 + [1] * 9
    earlier = [line["loss"] for line in steps[7:11]]
    assert steps[11]["loss"] > statistics.fmean(earlier) + 2.5 * statistics.pstdev(earlier)


@pytest.mark.slow
def test_a_spike_stops_the_run_and_its_advice_leaves_the_data_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if spikes are watched since a resume only: the command then allows that change, too."""
    config = str(tiny(train={"tokens": 640}))
    run = tmp_path / "runs" / "tiny"
    assert main(["train", config]) == 0
    spike = "train.spike={deviations: 1.5, steps: 4, action: stop}"
    resume = ["train", "--resume", str(run), "--allow-recipe-change", "train.tokens=2560", spike]
    with monkeypatch.context() as patch:
        jump_at(patch, 5)
        assert main(resume) == 2
    error = capsys.readouterr().err
    assert "step 10: loss" in error
    assert "the last good checkpoint is" in error
    arguments = advice(error)
    flags = ["--allow-recipe-change", "--allow-data-change"]
    assert arguments[3:] == ["--at", "640", *flags, 'data.skip=[{"at": 640, "tokens": 640}]']
    assert main([*arguments, "train.spike=none"]) == 0
    assert metrics(run)[-1]["tokens_seen"] == 2560
    capsys.readouterr()
    late = ["--resume", str(run), "--allow-data-change", "train.tokens=5120", "data.skip=[{at: 512, tokens: 128}]"]
    assert main(["train", *late]) == 2
    assert "only stretches at or past that position may change" in capsys.readouterr().err


def test_a_loss_is_a_spike_by_the_deviations_of_those_before() -> None:
    guard = Guard(TrainConfig(spike={"deviations": 3.0, "steps": 4, "action": "skip"}, nonfinite_limit=2))
    for tokens, loss in enumerate([4.0, 3.0, 5.0, 4.0]):
        assert not guard.is_spike(100.0), "too few losses"
        guard.judge(StepResult(loss, 1.0, 1, updated=True), tokens)
    limit = 4.0 + 3 * math.sqrt(0.5)
    assert not guard.is_spike(limit - 1e-6)
    assert not guard.is_spike(math.nan), "a case for the gradient's norm"
    assert guard.is_spike(limit + 1e-6)
    bad = StepResult(9.0, math.nan, 1, updated=False, spiked=True)
    assert guard.judge(bad, 4) is Judgement.SKIPPED
    assert guard.counters()["recent_losses"] == [4.0, 3.0, 5.0, 4.0]
    assert guard.judge(bad, 5) is Judgement.TOO_MANY
    assert (guard.skipped, guard.spikes, guard.in_a_row, guard.bad_since) == (2, 2, 2, 4)


def test_the_search_for_a_loss_scale_is_no_reason_to_wait() -> None:
    guard = Guard(TrainConfig())
    guard.judge(StepResult(math.nan, math.nan, 1, updated=False), 0)
    assert guard.suspicious(LossScale(dynamic=False))
    assert not guard.suspicious(LossScale(dynamic=True, value=1024.0))
    assert guard.suspicious(LossScale(dynamic=True, value=1.0))


@pytest.mark.parametrize(
    "value",
    ["skip", {"deviations": 0, "steps": 8, "action": "skip"}, {"deviations": 6, "steps": 1, "action": "skip"},
     {"deviations": 6, "steps": 8, "action": "end"}, {"deviations": 6, "steps": 8}, {"deviations": math.inf,
     "steps": 8, "action": "stop"}, {"deviations": 6, "steps": True, "action": "stop"}],
)  # fmt: skip
def test_a_spike_setting_that_says_too_little_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="deviations above 0 and steps above 1"):
        TrainConfig(spike=value)  # type: ignore[arg-type]


def test_stretches_left_out_cover_what_the_run_saw(tmp_path: Path) -> None:
    """With any stretches before: the data after the resume is that which followed, and nothing of what was seen."""
    before = (SkipConfig(2, 3), SkipConfig(5, 1), SkipConfig(6, 2), SkipConfig(9, 4))

    def numbers(stretches: Sequence[SkipConfig], positions: range) -> list[int]:
        corpus = Corpus([], [], 1, 0, tuple((s.at, s.tokens) for s in stretches))
        return corpus.numbers_at(np.array(positions)).tolist()

    after = leave_out(before, 5, 8)
    assert numbers(after, range(5)) == numbers(before, range(5))
    assert numbers(after, range(5, 12)) == numbers(before, range(8, 15))
