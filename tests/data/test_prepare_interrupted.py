"""An interrupted preparation resumes and gives the same bytes as an undisturbed one."""

import errno
import os
from pathlib import Path

import pytest

from megagpt.data import prepare as module
from megagpt.data.prepare import prepare
from megagpt.data.sources import open_source
from megagpt.errors import ExpectedError
from tests.data.crashes import CrashPoints, Killed
from tests.data.preparation import Prepare, check_unfinished, contents, error_of, stop_after


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_before_or_after_any_step_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple[Prepare, dict[str, bytes]], after: bool
) -> None:
    run, expected = reference
    crash = CrashPoints(monkeypatch)
    wrong: dict[int, str] = {}
    for step in range(1, 1000):
        folder = tmp_path / f"killed_{step}"
        if crash.survives(lambda folder=folder: run(folder), step, after):  # type: ignore[misc]
            break
        check_unfinished(folder, expected)
        try:
            run(folder)
        except ExpectedError as error:
            wrong[step] = str(error)
            continue
        if contents(folder) != expected:
            wrong[step] = f"differs in {sorted({name for name, _ in contents(folder).items() ^ expected.items()})}"
    assert not wrong
    assert 30 < step < 999


@pytest.mark.parametrize("steps", [29, 37, 50])
def test_repeated_kills_still_end_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple[Prepare, dict[str, bytes]], steps: int
) -> None:
    """No call gets far, but together they finish."""
    run, expected = reference
    crash = CrashPoints(monkeypatch)
    kills = 0
    while not crash.survives(lambda: run(tmp_path / "killed"), steps, after=kills % 2 == 0):
        check_unfinished(tmp_path / "killed", expected)
        kills += 1
        assert kills < 300
    assert kills >= 2
    assert contents(tmp_path / "killed") == expected


@pytest.mark.parametrize("batches", [0, 1, 5])
@pytest.mark.parametrize("journal_seconds", [-1.0, 3600.0])
def test_a_preparation_resumes_after_ctrl_c(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: tuple[Prepare, dict[str, bytes]],
    batches: int,
    journal_seconds: float,
) -> None:
    run, expected = reference
    monkeypatch.setattr(module, "_JOURNAL_SECONDS", journal_seconds)
    source = stop_after(open_source(str(tmp_path / "a.jsonl")), batches, KeyboardInterrupt)
    for _ in range(2):
        message = error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.2, shard_tokens=800))
        assert "run the same command again" in message
        check_unfinished(tmp_path / "out", expected)
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_kill_between_two_journals_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple[Prepare, dict[str, bytes]]
) -> None:
    """The journal is old: shards were completed since, and the partial files are longer than it records."""
    run, expected = reference
    source = open_source(str(tmp_path / "a.jsonl"))
    for early in (0, 1, 3):
        for late in (1, 4, 8):
            folder = tmp_path / f"{early}_{late}"
            for batches, seconds in ((early, -1.0), (late, 3600.0)):
                monkeypatch.setattr(module, "_JOURNAL_SECONDS", seconds)
                with pytest.raises(Killed):
                    prepare(stop_after(source, batches, Killed), folder, val_fraction=0.2, shard_tokens=800)
                check_unfinished(folder, expected)
            run(folder)
            assert contents(folder) == expected


def test_a_corrupt_journal_is_refused(tmp_path: Path, reference: tuple[Prepare, dict[str, bytes]]) -> None:
    run, _ = reference
    source = stop_after(open_source(str(tmp_path / "a.jsonl")), 5, KeyboardInterrupt)
    error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.2, shard_tokens=800))
    journal = tmp_path / "out" / "journal.json"
    for text in ("", "{", "[]", "{}", journal.read_text()[:-40]):
        journal.write_text(text)
        assert str(journal) in error_of(lambda: run(tmp_path / "out"))


@pytest.mark.parametrize("change", ["gone", "short"])
def test_lost_or_short_partial_files_are_refused_or_rewritten(
    tmp_path: Path, reference: tuple[Prepare, dict[str, bytes]], change: str
) -> None:
    run, expected = reference
    source = stop_after(open_source(str(tmp_path / "a.jsonl")), 5, KeyboardInterrupt)
    error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.2, shard_tokens=800))
    (partial,) = (tmp_path / "out").glob("train_*.partial")
    assert partial.stat().st_size > 200
    if change == "gone":
        partial.unlink()
    else:
        partial.write_bytes(partial.read_bytes()[:150])
    try:
        run(tmp_path / "out")
        complaint = ""
    except ExpectedError as error:
        complaint = str(error)
    assert str(tmp_path / "out") in complaint or contents(tmp_path / "out") == expected


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC, errno.EIO])
def test_disk_errors_at_a_flush_are_one_line_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple[Prepare, dict[str, bytes]], code: int
) -> None:
    """Some file systems report a full disk only then."""
    run, expected = reference
    original, calls = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise OSError(code, os.strerror(code))
        original(file)

    monkeypatch.setattr(os, "fsync", fsync)
    message = error_of(lambda: run(tmp_path / "out"))
    assert str(tmp_path / "out") in message
    assert ("disk full" in message) == (code != errno.EIO)
    check_unfinished(tmp_path / "out", expected)
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == expected
