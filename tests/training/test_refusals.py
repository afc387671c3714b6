"""Refusals of a run, changes that it accepts when told to, and checkpoints that it passes over."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from tests.conftest import Refusal, Tiny, metrics
from tests.data.folders import write_bin
from tests.runs import losses


def train(*arguments: str) -> int:
    return main(["train", *arguments])


@pytest.mark.slow
def test_an_impossible_run_is_refused_in_one_line(tiny: Tiny, tmp_path: Path, refusal: Refusal) -> None:
    config = str(tiny())
    run = tmp_path / "runs" / "tiny"
    refusal(["train"], "name one config")
    refusal(["train", "nowhere.yaml"], "nowhere.yaml")
    refusal(["train", config, "train.micro_batch=3"], "micro_batch 3", "2 or 4")
    refusal(["train", config, "data.sources=[{path: missing}]"], "missing", "megagpt data prepare")
    (tmp_path / "empty").mkdir()
    refusal(["train", config, f"data.sources=[{{path: {tmp_path / 'empty'}}}]"], "no token shards")
    long = ["model.context=65536", "train.batch_tokens=65536", "train.micro_batch=1", "train.tokens=65536"]
    long += ["validation.tokens=0"]
    refusal(["train", config, *long], "less than one sequence", "65536")
    refusal(["train", config, "model.vocab_size=50304"], "model.vocab_size 50304", "50257")
    refusal(["train", config, "model.vocab_size=50000"], "model.vocab_size 50000", "50257")
    refusal(["train", config, "sampling.prompt=''"], "sampling.prompt", "0 tokens")
    refusal(["train", "--resume", str(tmp_path / "nothing")], "nothing", "not a run")
    refusal(["train", "--resume", str(run), config], "--resume")
    (tmp_path / "file").write_text("kept")
    refusal(["train", config, f"run.folder={tmp_path}", "run.name=file"], str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "runs" / "half" / "checkpoints").mkdir(parents=True)
    refusal(["train", config, "run.name=half"], "already holds a run")
    if not torch.cuda.is_available():
        refusal(["train", config, "train.device=cuda"], "train.device", "cpu")
    assert not run.exists()
    assert train(config) == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    refusal(["train", config], "already holds a run", f"--resume {run}")
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before


@pytest.mark.slow
def test_a_checkpoint_of_other_model_or_data_is_refused(tiny: Tiny, tmp_path: Path, refusal: Refusal) -> None:
    assert train(str(tiny(train={"tokens": 256}))) == 0
    run = tmp_path / "runs" / "tiny"
    wider = ["train", "--resume", str(run), "model.width=64"]
    refusal(wider, "model.width is 32 in the checkpoint, 64 now", "another run.name")
    recipe = ["--allow-recipe-change", "--allow-data-change"]
    refusal([*wider, *recipe], "model.width is 32 in the checkpoint, 64 now")
    refusal(["train", "--resume", str(run), "run.seed=1"], "run.seed is 0 in", "--allow-recipe-change")
    both = ["train.batch_tokens=256", "optimizer.lr=1e-4"]
    refusal(["train", "--resume", str(run), *both], "train.batch_tokens is 128 in", "optimizer.lr is 0.0006 in the")
    from megagpt.data.prepare import prepare
    from megagpt.data.sources import open_source

    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"text": f"other {i}" * 99}) for i in range(100)))
    prepare(open_source(str(tmp_path / "other.jsonl")), tmp_path / "other", val_fraction=0.1, workers=1)
    other = ["train", "--resume", str(run), f"data.sources=[{{path: {tmp_path / 'other'}}}]"]
    refusal(other, "data ", "--allow-data-change")
    refusal([*other, "--allow-recipe-change"], "--allow-data-change")


@pytest.mark.slow
def test_an_allowed_change_is_trained_with(
    tiny: Tiny, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the saved position with the new recipe and the new data, which the next resume takes for its own."""
    config = str(tiny(train={"tokens": 1280}, schedule={"decay_end_tokens": 2560}))
    assert train(config) == 0
    run = tmp_path / "runs" / "tiny"
    write_bin(tmp_path / "other_train_0.bin", np.arange(5000))
    sources = [{"path": str(tmp_path), "weight": 1}, {"path": str(corpus), "weight": 3}]
    changes = [f"data.sources={json.dumps(sources)}", "optimizer.lr=1e-5", "model.dropout=0.1", "train.tokens=1920"]
    capsys.readouterr()
    assert train("--resume", str(run), "--allow-data-change", "--allow-recipe-change", *changes) == 0
    output = capsys.readouterr().out
    for difference in ("optimizer.lr is 0.0006 in the checkpoint, 1e-05 now", "model.dropout is 0.0 in", "data"):
        assert f"resuming with a change: {difference}" in output
    steps = metrics(run)
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert max(line["lr"] for line in steps[10:]) <= 1e-5 < min(line["lr"] for line in steps[3:10])
    assert train("--resume", str(run), "train.tokens=2560") == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_a_change_of_what_dropout_drops_is_said(
    dropout: float, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny(model={"dropout": dropout}, train={"tokens": 256}, checkpoint={"every_tokens": 128}))
    assert train(config) == 0
    newest = list_checkpoints(tmp_path / "runs" / "tiny")[-1]
    resume = ["--resume", str(tmp_path / "runs" / "tiny")]
    newest.remove()
    assert "dropout draws" not in capsys.readouterr().out
    assert train(*resume, "train.micro_batch=2") == 0
    said = "with train.micro_batch 2 instead of 4, other elements are dropped"
    assert (said in capsys.readouterr().out) == (dropout > 0)
    list_checkpoints(tmp_path / "runs" / "tiny")[-1].remove()
    assert train(*resume, "train.micro_batch=4") == 0  # what the checkpoint was saved with
    assert "dropout draws" not in capsys.readouterr().out


@pytest.mark.slow
def test_incomplete_checkpoints_are_passed_over(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(train={"tokens": 1024}, checkpoint={"every_tokens": 256, "keep_last": 9})
    assert train(str(config)) == 0
    run = tmp_path / "runs" / "tiny"
    expected = losses(run)
    first, second, third, fourth = list_checkpoints(run)
    (fourth.path / "COMPLETE").unlink()
    shard = next(third.path.glob("*.distcp"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    (second.path / "meta.json").unlink()
    capsys.readouterr()
    assert train("--resume", str(run)) == 0
    output = capsys.readouterr().out
    for damaged, reason in ((fourth, "COMPLETE is missing"), (third, f"{shard.name} has"), (second, "meta.json is")):
        (line,) = (line for line in output.splitlines() if f"{damaged.path.name}.corrupt" in line)
        assert str(damaged.path) in line
        assert reason in line
    assert f"resuming at {first.tokens:,} tokens" in output
    assert losses(run) == expected


def test_altered_shard_is_found_while_training(tiny: Tiny, tmp_path: Path, corpus: Path, refusal: Refusal) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    shard = copy / "train_00000.npy"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refusal(["train", str(tiny()), f"data.sources=[{{path: {copy}}}]"], "train_00000.npy", "checksums")
