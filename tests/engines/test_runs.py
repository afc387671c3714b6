"""Whole runs under each engine: the same metrics, validation and samples as one process."""

import json
from pathlib import Path

import pytest

from megagpt.cli import main
from tests.conftest import Tiny, metrics, write_tiny
from tests.processes import megagpt, start_ranks
from tests.runs import LOSS, PATIENCE, assert_same_curve, logs

# One group: all of it is compared with one run.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("runs")]

ENGINES = {
    "fsdp": ["engine.name=fsdp"],
    "zero-1": ["engine.name=zero", "engine.stage=1"],
    "zero-3": ["engine.name=zero", "engine.stage=3"],
}
# 24 sequences in batches of 1, 1, 2, 2, 3, and then 4: on two ranks, the second one has nothing to do at first.
RAMP = {"tokens": 768, "batch_ramp_start": 32, "batch_ramp_tokens": 256}


def assert_same_run(run: Path, expected: Path) -> None:
    assert_same_curve(run, expected)
    validation, reference = metrics(run, "validation")[-1], metrics(expected, "validation")[-1]
    assert validation["validation_loss"] == pytest.approx(reference["validation_loss"], abs=LOSS)
    assert metrics(run, "samples")[-1]["samples"] == metrics(expected, "samples")[-1]["samples"]


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config with a batch ramp, and its run in one process under DDP."""
    folder = tmp_path_factory.mktemp("one")
    config = write_tiny(folder, corpus, train=RAMP, validation={"every_tokens": 384}, optimizer={"clip_norm": 0.5})
    assert main(["train", str(config), "run.name=one"]) == 0
    return config, folder / "runs" / "one"


@pytest.mark.parametrize("name", ["fsdp", "zero-3"])
def test_two_ranks_train_the_run_of_one_process(name: str, one: tuple[Path, Path], tmp_path: Path) -> None:
    """Losses, gradient norms, validations and samples."""
    config, expected = one
    ranks = start_ranks(2, [str(config), f"run.name={name}", "train.micro_batch=2", *ENGINES[name]], tmp_path)
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0], logs(tmp_path)
    assert_same_run(expected.parent / name, expected)


@pytest.mark.parametrize("name", ENGINES)
def test_one_process_trains_under_every_engine(name: str, one: tuple[Path, Path], tmp_path: Path) -> None:
    config, expected = one
    arguments = [str(config), f"run.name={name}-alone", "train.micro_batch=2", *ENGINES[name]]
    done = megagpt("train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = expected.parent / f"{name}-alone"
    assert_same_run(run, expected)
    if "zero" in name:
        settings = json.loads((run / "deepspeed.json").read_text())
        assert settings["zero_optimization"]["stage"] == int(name[-1])


def test_an_engine_refuses_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(train={"micro_batch": 2}))
    refused = {
        ("engine.name=fsdp", "engine.shard_ranks=2"): ["engine.shard_ranks 2", "1 rank;"],
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
