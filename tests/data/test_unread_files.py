"""Files that look like shards and are not read are named."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.data.shards import open_stream, unread_note
from tests.conftest import write_tiny
from tests.data.folders import error_of, write_bin

UNREAD = [
    "x_test_0.bin", "part_1.bin", "part_2.npy", "x_train_1.bin.gz", "x_train_2.bin.part", "X_TRAIN_3.BIN",
    "x_train.npz", "._x_train_0.bin",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bin(tmp_path / "x_train_0.bin", np.arange(100))
    write_bin(tmp_path / "x_val_0.bin", np.arange(50))
    (tmp_path / "README.md").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "train.txt").touch()
    return tmp_path


@pytest.mark.parametrize("name", UNREAD)
def test_a_file_that_is_not_read_is_named(folder: Path, name: str) -> None:
    assert unread_note(folder) == ""
    write_bin(folder / name, np.arange(10))
    assert f"not read: {name}:" in unread_note(folder)
    assert open_stream(folder, "train").tokens == 100


def test_a_subfolder_with_shards_is_named(folder: Path) -> None:
    (folder / "more").mkdir()
    write_bin(folder / "more" / "x_train_1.bin", np.arange(10))
    assert "not read: more/:" in unread_note(folder)


def test_a_subfolder_that_cannot_be_read_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main rank alone looks for it: an error would leave the other ranks waiting."""
    iterdir = Path.iterdir

    def guarded(path: Path) -> Iterator[Path]:
        if path.name == "notes":
            raise FileNotFoundError(2, "removed meanwhile", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", guarded)
    assert unread_note(folder) == ""


def test_a_folder_of_folders_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("books", "notes", "web"):
        (tmp_path / name).mkdir()
    for name in ("books", "web"):
        write_bin(tmp_path / name / "x_train_0.bin", np.arange(10))
    message = error_of(lambda: open_stream(tmp_path, "train"))
    assert f"name them as sources: {tmp_path / 'books'}, {tmp_path / 'web'}" in message
    assert open_stream(tmp_path / "web", "train").tokens == 10


def test_many_files_that_are_not_read_are_counted(folder: Path) -> None:
    for i in range(100):
        write_bin(folder / f"part_{i:03d}.bin", np.arange(10))
    assert "part_000.bin, part_001.bin, part_002.bin, part_003.bin, part_004.bin and 95 more" in unread_note(folder)


def test_verify_and_train_name_what_the_manifest_does_not_list(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(corpus, tmp_path / "copy"))
    assert unread_note(copy) == ""
    shutil.copy(copy / "train_00000.npy", copy / "train_00001.npy")
    note = f"{copy}: not read: train_00001.npy: manifest.json does not list them"
    assert main(["verify", str(copy)]) == 0
    output = capsys.readouterr().out
    assert note in output
    assert "no checksums" not in output
    config = write_tiny(tmp_path, copy, train={"tokens": 256}, schedule={"warmup_tokens": 0}, sampling={"samples": 0})
    assert main(["config", str(config)]) == 0
    assert f"# {note}" in capsys.readouterr().out
    assert main(["train", str(config)]) == 0
    assert note in capsys.readouterr().out
