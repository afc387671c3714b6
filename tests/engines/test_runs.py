"""Whole runs under each engine: the same metrics, validation and samples as one process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from tests.conftest import metrics, write_tiny
from tests.processes import megagpt, torchrun

Tiny = Callable[..., Path]

pytestmark = pytest.mark.slow

ENGINES = {
    "fsdp": ["engine.name=fsdp"],
    "zero-1": ["engine.name=zero", "engine.stage=1"],
    "zero-3": ["engine.name=zero", "engine.stage=3"],
}


def assert_same_run(run: Path, expected: Path) -> None:
    steps, wanted = metrics(run), metrics(expected)
    assert [line["step"] for line in steps] == [line["step"] for line in wanted]
    for line, reference in zip(steps, wanted, strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], abs=5e-6)
        assert line["gradient_norm"] == pytest.approx(reference["gradient_norm"], abs=2e-5)
    validation, reference = metrics(run, "validation")[-1], metrics(expected, "validation")[-1]
    assert validation["validation_loss"] == pytest.approx(reference["validation_loss"], abs=5e-6)
    assert metrics(run, "samples")[-1]["samples"] == metrics(expected, "samples")[-1]["samples"]


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config, and its run in one process under DDP."""
    folder = tmp_path_factory.mktemp("one")
    config = write_tiny(folder, corpus, validation={"every_tokens": 640}, optimizer={"clip_norm": 0.5})
    assert main(["train", str(config), "run.name=one"]) == 0
    return config, folder / "runs" / "one"


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_on_two_ranks_is_the_run_of_one_process(name: str, one: tuple[Path, Path], tmp_path: Path) -> None:
    """Losses, gradient norms, validations and samples."""
    config, expected = one
    done = torchrun(2, ["--config", str(config), f"run.name={name}", "train.micro_batch=2", *ENGINES[name]], tmp_path)
    assert done.returncode == 0, done.stderr
    run = expected.parent / name
    assert_same_run(run, expected)
    if "zero" in name:
        settings = json.loads((run / "deepspeed.json").read_text())
        assert settings["zero_optimization"]["stage"] == int(name[-1])


@pytest.mark.parametrize("name", ENGINES)
def test_one_process_alone_trains_under_every_engine(name: str, one: tuple[Path, Path], tmp_path: Path) -> None:
    config, expected = one
    arguments = [str(config), f"run.name={name}-alone", "train.micro_batch=2", *ENGINES[name]]
    done = megagpt("train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(expected.parent / f"{name}-alone", expected)


def test_what_engines_refuse_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(train={"micro_batch": 2}))
    refused = {
        ("engine.name=fsdp", "engine.shard_ranks=2"): ["engine.shard_ranks 2", "1 ranks"],
        ("engine.name=zero", "engine.deepspeed={fp16: {enabled: true}}"): ["engine.deepspeed.fp16", "train.precision"],
        ("engine.name=zero", "engine.stage=3", "engine.offload=all", "engine.nvme_path=nowhere"): ["nowhere"],
        ("engine.name=fsdp", "engine.offload=optimizer"): ["engine.offload optimizer", "none, all"],
    }
    for arguments, parts in refused.items():
        done = megagpt("train", config, *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        for part in parts:
            assert part in done.stderr
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_run_of_bad_steps_names_the_last_good_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(checkpoint={"every_tokens": 640}))
    assert main(["train", config]) == 0
    run = tmp_path / "runs" / "tiny"
    last = list_checkpoints(run)[-1].path
    shutil.rmtree(last)
    lr = ["--allow-recipe-change", "optimizer.lr=1e30", "train.nonfinite_limit=2", "schedule.warmup_tokens=0"]
    done = megagpt("train", "--resume", str(run), *lr, cwd=tmp_path)
    assert done.returncode == 2
    assert "not finite in 2 steps in a row" in done.stderr
    newest = list_checkpoints(run)[-1].path.relative_to(tmp_path)
    assert f"the last good checkpoint is {newest}" in done.stderr
    assert len(metrics(run, "skipped")) >= 2
