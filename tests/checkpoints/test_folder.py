"""A run's checkpoints on the disk: what rotation keeps, what is found, what a marker covers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megagpt.checkpoints.checkpoint import Checkpoint
from megagpt.checkpoints.checksums import CorruptError
from megagpt.checkpoints.folder import Rotation, find_checkpoint, list_checkpoints, newest_complete, newest_good
from megagpt.checkpoints.loading import tensor_shapes
from megagpt.checkpoints.saving import Saver
from megagpt.checkpoints.storage import Writer
from megagpt.config_occasions import CheckpointConfig
from megagpt.errors import UserError
from tests.checkpoints.toy_state import ALONE, SHAPES, WHOLE, is_complete, meta, save, saved_value, state_of


def test_the_newest_and_the_milestones_stay(tmp_path: Path) -> None:
    saver = Saver(tmp_path, CheckpointConfig(keep_last=2), ALONE)
    for samples in range(1, 10):
        save(saver, samples, milestone=samples % 4 == 0)
        saver.proved(4 * samples)
    saver.finish()
    assert [c.tokens // 4 for c in list_checkpoints(tmp_path)] == [4, 7, 8, 9]


def test_only_proven_checkpoints_count_and_push_others_out(tmp_path: Path) -> None:
    """A finite step from position 8 proves 4 and 8; those at 12 to 20 are kept and marked, whatever follows them."""
    saver = Saver(tmp_path, CheckpointConfig(keep_last=1), ALONE)
    for step in (1, 2):
        save(saver, step)
    saver.proved(8)
    for step in (3, 4, 5):
        save(saver, step)
    saver.finish()
    assert [(c.tokens // 4, c.is_proven) for c in list_checkpoints(tmp_path)] == [
        (2, True), (3, False), (4, False), (5, False),
    ]  # fmt: skip
    good = newest_good(tmp_path, 100)
    assert good is not None
    assert good.meta.step == 2
    assert newest_good(tmp_path, 8) is None
    again = Saver(tmp_path, CheckpointConfig(keep_last=1), ALONE)  # a resume from 20, whose first step is finite
    again.proved(20)
    again.finish()
    assert [(c.tokens // 4, c.is_proven) for c in list_checkpoints(tmp_path)] == [(5, True)]


def test_rotation_reads_nothing_of_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many milestones there are: after the first look, a save costs nothing for each of them."""
    saver = Saver(tmp_path, CheckpointConfig(keep_last=2), ALONE)
    for step in range(1, 6):
        save(saver, step, milestone=step < 4)
    saver.finish()
    rotation = Rotation(tmp_path, keep_last=2)

    def read(*_: object) -> None:
        raise AssertionError("an old checkpoint was read")

    removed: list[Checkpoint] = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        patch.setattr(Path, "stat", read)
        patch.setattr(Checkpoint, "open", read)
        patch.setattr(Checkpoint, "remove", lambda checkpoint: removed.append(checkpoint))
        for step in (6, 7):
            rotation.saved(Checkpoint(tmp_path / "checkpoints" / f"{4 * step:015d}"), milestone=False)
            rotation.proved(4 * step)
    assert [c.tokens // 4 for c in removed] == [4, 5]


def test_milestones_of_an_older_version_stay(tmp_path: Path) -> None:
    """Their flag is in meta.json alone."""
    saver = Saver(tmp_path, CheckpointConfig(keep_last=9), ALONE)
    for step in (1, 2):
        save(saver, step, milestone=step == 1)
    saver.finish()
    again = Saver(tmp_path, CheckpointConfig(keep_last=1), ALONE)
    save(again, 3)
    again.proved(12)
    again.finish()
    assert [c.tokens // 4 for c in list_checkpoints(tmp_path)] == [1, 3]


def test_rotation_keeps_the_only_complete_one(tmp_path: Path) -> None:
    """It counts neither one of a future that was given up nor an incomplete one."""
    saver = Saver(tmp_path, CheckpointConfig(keep_last=9), ALONE)
    for samples in (1, 2, 5):
        save(saver, samples)
    saver.finish()
    (list_checkpoints(tmp_path)[1].path / "COMPLETE").unlink()
    again = Saver(tmp_path, CheckpointConfig(keep_last=1), ALONE)
    save(again, 3)
    again.proved(12)
    again.finish()
    assert [c.tokens // 4 for c in list_checkpoints(tmp_path)] == [2, 3, 5]
    assert [c.tokens // 4 for c in list_checkpoints(tmp_path) if is_complete(c)] == [3, 5]


def test_a_save_that_was_cut_off_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / "000000000000008.saving-0"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    saver.probe(1000)
    assert not left.exists()


def test_the_same_position_may_be_saved_again(tmp_path: Path) -> None:
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    for value in (1.0, 2.0):
        saver.save(state_of(value), WHOLE, meta(1))
    saver.finish()
    (checkpoint,) = list_checkpoints(tmp_path)
    assert saved_value(checkpoint) == 2.0


def test_a_delayed_removal_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS a file that is open elsewhere stays in its folder, under another name."""
    saver = Saver(tmp_path, CheckpointConfig(keep_last=1), ALONE)
    save(saver, 1)
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
        save(saver, 2)
        saver.proved(8)
        assert saver.finish() is not None
    assert [c.tokens // 4 for c in list_checkpoints(tmp_path)] == [2]
    save(saver, 3)
    saver.proved(12)
    saver.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"{12:015d}"]


def test_a_folder_that_ranks_do_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every save would lack what the other hosts wrote."""
    write = Writer.write_data

    def elsewhere(writer: Writer, *arguments: Any) -> Any:
        result = write(writer, *arguments)
        (Path(writer.path) / "__0_0.distcp").unlink()
        return result

    monkeypatch.setattr(Writer, "write_data", elsewhere)
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    save(saver, 1)
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing.*run\.folder must be one that all hosts share"):
        saver.finish()
    assert list_checkpoints(tmp_path) == []


def test_an_older_format_is_named_and_left_alone(tmp_path: Path) -> None:
    old = tmp_path / "checkpoints" / f"{640:015d}"
    old.mkdir(parents=True)
    (old / "COMPLETE").write_text(json.dumps({"meta.json": 12, "__0_0.distcp": 3}))
    with pytest.raises(UserError, match="format 1") as raised:
        Checkpoint(old).open()
    assert not isinstance(raised.value, CorruptError)


def test_a_quarantine_loses_nothing(tmp_path: Path) -> None:
    """Not even one that was quarantined at the same position before."""
    for value in (1.0, 2.0):
        saver = Saver(tmp_path, CheckpointConfig(), ALONE)
        saver.save(state_of(value), WHOLE, meta(1))
        saver.finish()
        list_checkpoints(tmp_path)[0].quarantine()
    assert list_checkpoints(tmp_path) == []
    aside = sorted((tmp_path / "checkpoints").iterdir())
    assert [saved_value(Checkpoint(path)) for path in aside] == [1.0, 2.0]


def test_a_run_or_a_checkpoint_names_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    saver = Saver(tmp_path, CheckpointConfig(keep_last=9), ALONE)
    for samples in (1, 2):
        save(saver, samples)
    saver.finish()
    first, second = list_checkpoints(tmp_path)
    assert find_checkpoint(tmp_path).path == second.path
    assert find_checkpoint(first.path).meta.tokens_seen == first.tokens
    (second.path / "meta.json").unlink()
    newest = newest_complete(tmp_path)
    assert newest is not None
    assert newest.path == first.path
    assert "meta.json is missing" in capsys.readouterr().err
    with pytest.raises(CorruptError, match="is missing"):
        find_checkpoint(second.path)


def test_other_tools_read_it(tmp_path: Path) -> None:
    """PyTorch's own reader, into whole tensors of the true shapes."""
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    save(saver, 1)
    saver.finish()
    (checkpoint,) = list_checkpoints(tmp_path)
    assert tensor_shapes(checkpoint.open()) == SHAPES
    state = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint.path), no_dist=True)
    for key, shard in state_of(1).items():
        assert torch.equal(state[key], shard.flat.view(SHAPES[key]))


def test_a_marker_covers_every_file(tmp_path: Path) -> None:
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    save(saver, 1)
    saver.finish()
    (checkpoint,) = list_checkpoints(tmp_path)
    on_disk = {path.name for path in checkpoint.path.iterdir()}
    assert set(checkpoint.sums()) | {"COMPLETE", "UNPROVEN"} == on_disk
    assert checkpoint.open().size == sum(p.stat().st_size for p in checkpoint.path.iterdir() if p.name != "COMPLETE")
