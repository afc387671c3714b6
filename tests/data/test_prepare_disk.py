"""A full disk ends a preparation with one line; with more room, it resumes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megagpt.cli import main
from tests.data.preparation import (
    Prepare,
    check_unfinished,
    contents,
    finish,
    journalled,
    start,
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of a number of pages; a second call resizes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def resize(pages: int) -> Path:
        nonlocal mounted
        size = f"size={pages * os.sysconf('SC_PAGE_SIZE')}"
        options = f"remount,{size}" if mounted else size
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted = True
        return folder

    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small file system")
    yield resize
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12])
def test_a_full_disk_is_one_line_and_can_be_resumed(
    disk: Callable[[int], Path],
    tmp_path: Path,
    reference: tuple[Prepare, dict[str, bytes]],
    capsys: pytest.CaptureFixture[str],
    pages: int,
) -> None:
    _, expected = reference
    folder = disk(pages) / "out"
    command = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(folder), "--val-fraction", "0.2"]
    command += ["--shard-tokens", "800"]
    for _ in range(2):
        assert main(command) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert f"{folder}: disk full" in lines[0]
        check_unfinished(folder, expected)
    disk(10_000)
    assert main(command) == 0
    assert contents(folder) == expected


@pytest.mark.slow
def test_a_full_disk_ends_real_processes_with_one_line(
    disk: Callable[[int], Path], tmp_path: Path, big: tuple[Path, dict[str, bytes]]
) -> None:
    corpus, expected = big
    folder = disk(sum(map(len, expected.values())) // os.sysconf("SC_PAGE_SIZE") // 2) / "out"
    code, err = finish(start(corpus, folder))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"{folder}: disk full" in err
    check_unfinished(folder, expected)
    assert journalled(folder) > 0
    disk(100_000)
    assert finish(start(corpus, folder)) == (0, "")
    assert contents(folder) == expected
