"""A run that version 0.1 wrote and that SIGTERM stopped at 1,280 tokens still reads and resumes.

`tests/data/old_run` is its folder as it was. Its validation at 1,280 tokens is missing: that version lost it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megagpt.checkpoints.folder import find_checkpoint
from megagpt.checkpoints.loading import read_weights, tensor_shapes
from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.incarnations import list_incarnations
from megagpt.run_log import newest
from tests.conftest import metrics
from tests.runs import charts

OLD = Path(__file__).parent.parent / "data" / "old_run"
# The rest of the same run as version 0.1 computed it without a stop: losses of steps 11 to 20, and its validations.
EXPECTED = json.loads((OLD.parent / "old_run_expected.json").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.slow
def test_it_resumes_with_the_losses_of_the_uninterrupted_run(
    run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bits that processors do not agree on."""
    assert main(["train", "--resume", str(run), f"data.sources=[{{path: {corpus}}}]"]) == 0
    assert "resuming at 1,280 tokens, saved by ddp on 1 rank" in capsys.readouterr().out
    steps = metrics(run)
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert [line["loss"] for line in steps] == pytest.approx(EXPECTED["losses"], abs=2e-6)
    validations = [(line["tokens_seen"], line["validation_loss"]) for line in metrics(run, "validation")]
    assert [tokens for tokens, _ in validations] == [640, 1280, 1920, 2560]
    assert [loss for _, loss in validations] == pytest.approx(EXPECTED["validation_losses"], abs=2e-6)
    # Curves go on, and the chart with both losses, which that version did not have, is complete.
    by_tokens = {line["tokens_seen"]: line["loss"] for line in steps}
    assert dict(charts(run / "train")["loss/by_tokens"]) == pytest.approx(by_tokens)
    assert dict(charts(run / "validation")["loss/by_tokens"]) == pytest.approx(dict(validations))
    for tag in ("loss/loss", "optimizer/lr", "optimizer/gradient_norm"):
        assert [step for step, _ in charts(run)[tag]] == list(range(1, 21))


def test_its_checkpoint_reads_bit_for_bit(run: Path) -> None:
    found = find_checkpoint(run)
    meta = found.meta
    assert (meta.tokens_seen, meta.sequences_seen, meta.step, meta.scalars["updates"]) == (1280, 40, None, 10)
    assert meta.scalars["loss_scale"] == {"value": 1.0, "good_steps": 0, "dynamic": False}
    assert meta.config["optimizer"]["clip_norm"] == 1.0
    shapes = {name.removeprefix("model."): s for name, s in tensor_shapes(found).items() if name.startswith("model.")}
    theirs = {f"model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(found.path), no_dist=True)
    for name, tensor in read_weights(found, shapes).items():
        assert torch.equal(tensor, theirs[f"model.{name}"])


def test_its_log_and_its_end_are_read(run: Path) -> None:
    log = newest(run)
    assert log["step"]["sequences_seen"] == 40
    assert log["stopped"]["reason"] == "SIGTERM"
    (incarnation,) = list_incarnations(run)
    assert incarnation.ended()["outcome"] == "stopped"
    (run / "incarnations" / "000001.end.json").write_text('{"outcome": "failed", "reason": "x", "mend": true}')
    assert incarnation.ended()["retry"] is False


def test_its_config_is_read_under_the_new_names(run: Path) -> None:
    config = load_config(str(run / "config.yaml"), ["checkpoint.keep=7"])
    assert (config.checkpoint.keep_last, config.train.hang_timeout) == (7, 900)
