"""Whole runs under each engine: the same metrics, validation and samples as one process, and one checkpoint for all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from tests.conftest import metrics
from tests.ranks import megagpt, torchrun

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


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_under_an_engine_and_its_checkpoint_under_another(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """Two ranks under the engine are one process under DDP; half of it under the engine and the rest under DDP, and the
    other way round, too."""
    config = tiny(
        checkpoint={"every_tokens": 640, "keep": 9}, validation={"every_tokens": 640}, optimizer={"clip": 0.5}
    )
    runs = tmp_path / "runs"
    assert main(["train", str(config), "run.name=one"]) == 0
    done = torchrun(2, ["--config", str(config), "run.name=two", "train.micro_batch=2", *ENGINES[name]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(runs / "two", runs / "one")
    if "zero" in name:
        settings = json.loads((runs / "two" / "deepspeed.json").read_text())
        assert settings["zero_optimization"]["stage"] == int(name[-1])

    for source, target in (("two", "engine-to-ddp"), ("one", "ddp-to-engine")):
        shutil.copytree(runs / source, runs / target)
        for checkpoint in list_checkpoints(runs / target)[2:]:
            shutil.rmtree(checkpoint.path)
    assert main(["train", "--resume", str(runs / "engine-to-ddp"), "engine.name=ddp", "train.micro_batch=1"]) == 0
    assert_same_run(runs / "engine-to-ddp", runs / "one")
    arguments = ["--resume", str(runs / "ddp-to-engine"), "train.micro_batch=1", *ENGINES[name]]
    done = torchrun(2, arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming at" in done.stdout
    assert_same_run(runs / "ddp-to-engine", runs / "one")


@pytest.mark.parametrize("name", ENGINES)
def test_one_process_alone_trains_under_every_engine(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """And goes on bit for bit from the middle of itself."""
    config = str(tiny(checkpoint={"every_tokens": 1280, "keep": 9}, train={"micro_batch": 2}))
    done = megagpt("train", config, *ENGINES[name], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(run, tmp_path / "runs" / "cut")
    shutil.rmtree(list_checkpoints(tmp_path / "runs" / "cut")[-1].path)
    done = megagpt("train", "--resume", str(tmp_path / "runs" / "cut"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for key in ("loss", "gradient_norm"):
        assert [line[key] for line in metrics(tmp_path / "runs" / "cut")] == [line[key] for line in metrics(run)]


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
