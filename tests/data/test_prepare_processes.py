"""Real `megagpt data prepare` processes: killed, interrupted, started twice, with workers that die."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.data.preparation import (
    check_unfinished,
    contents,
    finish,
    journalled,
    resume,
    start,
    stop,
    wait_for_progress,
)


@pytest.mark.slow
def test_a_preparation_survives_sigkill_at_any_moment(tmp_path: Path, big: tuple[Path, dict[str, bytes]]) -> None:
    corpus, expected = big
    out, draw, kills, in_the_middle = tmp_path / "out", random.Random(), 0, 0
    while kills < 4:
        process = start(corpus, out, pace=0.03)
        try:
            before = journalled(out)
            if kills == 2:
                time.sleep(draw.uniform(0, 0.7))  # perhaps before it begins
            else:
                wait_for_progress(process, out, before)
                time.sleep(draw.uniform(0, 0.06))
            alive = process.poll() is None
            in_the_middle += alive and journalled(out) > before
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            finish(process)
        assert alive, "the corpus is too small for this test"
        kills += 1
        check_unfinished(out, expected)
    assert in_the_middle >= 3
    assert finish(start(corpus, out)) == (0, "")
    assert contents(out) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("moment", ["starting", "first batch", "working"])
def test_ctrl_c_ends_all_processes_with_one_line(
    tmp_path: Path, big: tuple[Path, dict[str, bytes]], moment: str
) -> None:
    """Ctrl-C in a terminal reaches the workers too, even while they start."""
    corpus, expected = big
    process = start(corpus, tmp_path / "out", pace=0.02, workers=4 if moment == "starting" else 2)
    if moment == "starting":
        while not (tmp_path / "out" / "journal.json").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.1)
    else:
        wait_for_progress(process, tmp_path / "out", 0 if moment == "first batch" else 600)
    os.killpg(process.pid, signal.SIGINT)
    code, err = finish(process)
    assert code in (2, 130)
    assert len(err.splitlines()) == 1, err
    assert err.startswith("megagpt: ")
    check_unfinished(tmp_path / "out", expected)
    resume(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_second_process_is_refused_while_the_first_runs(tmp_path: Path, big: tuple[Path, dict[str, bytes]]) -> None:
    """The second must not write into the shards of the first."""
    corpus, expected = big
    first = start(corpus, tmp_path / "out", pace=0.1)
    try:
        wait_for_progress(first, tmp_path / "out", 0)
        code, err = finish(start(corpus, tmp_path / "out"))
        still_running = first.poll() is None
    finally:
        stop(first)
    assert still_running
    assert code == 2
    assert len(err.splitlines()) == 1
    assert str(tmp_path / "out") in err
    assert finish(start(corpus, tmp_path / "out")) == (0, "")
    assert contents(tmp_path / "out") == expected


in_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the workers are found in /proc")


@pytest.mark.slow
@in_proc
@pytest.mark.usefixtures("inline")
def test_a_dead_worker_ends_the_preparation_with_one_line(tmp_path: Path, big: tuple[Path, dict[str, bytes]]) -> None:
    """As if the kernel had killed it for lack of memory."""
    corpus, expected = big
    process = start(corpus, tmp_path / "out", pace=0.05)
    wait_for_progress(process, tmp_path / "out", 0)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    code, err = finish(process)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "run the same command again" in err
    check_unfinished(tmp_path / "out", expected)
    resume(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
@in_proc
def test_workers_end_with_their_killed_parent(tmp_path: Path, big: tuple[Path, dict[str, bytes]]) -> None:
    """After `kill -9` of the process that the user started."""
    corpus, _ = big
    process = start(corpus, tmp_path / "out", pace=0.05)
    try:
        wait_for_progress(process, tmp_path / "out", 0)
        workers = workers_of(process)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 8
        while (left := [w for w in workers if is_worker(Path(f"/proc/{w}"))]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finally:
        stop(process)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    entries = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    workers = [int(entry.name) for entry in entries if is_worker(entry, process.pid)]
    assert len(workers) == 2
    return workers


def is_worker(process: Path, parent: int | None = None) -> bool:
    try:
        state, parent_id = (process / "stat").read_text().rpartition(")")[2].split()[:2]
        is_child = parent is None or int(parent_id) == parent
        return state != "Z" and is_child and b"spawn_main" in (process / "cmdline").read_bytes()
    except OSError:
        return False
