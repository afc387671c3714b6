"""How long a run took, on which machines, and why each incarnation ended, against sums by hand."""

import platform
from pathlib import Path

import pytest

from megagpt.report.history import bill, read_history
from megagpt.report.record import read_record
from megagpt.training.run_folder import this_process
from tests.report.logged import BEGAN, H100, Logged, hours


@pytest.fixture
def restarted(tmp_path: Path) -> Logged:
    """Killed after 1 h, stopped after 2 h more, failed after half an hour on another node, finished on two nodes."""
    run = Logged(tmp_path, "run")
    run.steps(10)
    run.incarnation(1, 0)
    run.incarnation(2, 1.5, 3.5, "stopped", "SIGUSR1", previous_seen=hours(1), from_tokens=100, reached=900)
    run.incarnation(3, 4, 4.5, "failed", "CUDA error", hosts={"n2": 8}, from_tokens=900)
    both = {"hosts": {"n3": 8, "n4": 8}, "world_size": 16}
    run.incarnation(4, 5, 6, "finished", "the last token", from_tokens=900, **both)
    return run.save()


def test_each_incarnation_has_its_time_its_machines_and_its_end(restarted: Logged) -> None:
    chapters = read_history(restarted.folder, read_record(restarted.folder))
    assert [c.seconds for c in chapters] == [3600, 7200, 1800, 3600]
    assert [c.outcome for c in chapters] == ["killed", "stopped", "failed", "finished"]
    assert [c.reason for c in chapters][1:3] == ["SIGUSR1", "CUDA error"]
    assert [(c.from_tokens, c.to_tokens) for c in chapters[:2]] == [(0, None), (100, 900)]
    assert chapters[0].machines == f"8 x {H100} on n1"
    assert chapters[3].machines == f"16 x {H100} on n3, n4"


def test_the_bill_counts_every_gpu_of_every_incarnation(restarted: Logged) -> None:
    chapters = read_history(restarted.folder, read_record(restarted.folder))
    found = bill(chapters, 2.5)
    assert found.gpu_hours == pytest.approx(8 * (1 + 2 + 0.5) + 16)
    assert found.dollars == pytest.approx(44 * 2.5)
    assert (found.elapsed, found.complete) == (4.5 * 3600, True)
    assert bill(chapters).dollars is None


def test_an_unknown_end_makes_the_bill_a_lower_bound(tmp_path: Path) -> None:
    """Version 0.1 did not note when the run last wrote before a start."""
    run = Logged(tmp_path, "run")
    run.incarnation(1, 0)
    run.incarnation(2, 2, 3, "finished", "the last token")
    found = bill(read_history(run.folder, read_record(run.save().folder)), 1.0)
    assert (found.gpu_hours, found.complete) == (8.0, False)


def test_cpus_cost_nothing(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    run.incarnation(1, 0, 2, "finished", "the last token", device="cpu")
    found = bill(read_history(run.folder, read_record(run.save().folder)), 1.0)
    assert (found.gpu_hours, found.dollars, found.elapsed) == (0.0, None, 7200)


def test_the_last_incarnation_lasts_to_its_last_line(tmp_path: Path) -> None:
    """Its time survives a copy of the run, which changes that of the file."""
    run = Logged(tmp_path, "run")
    run.steps(10)
    run.incarnation(1, 0)
    run.lines[-1]["time"] = int(BEGAN.timestamp()) + 1800
    (chapter,) = read_history(run.folder, read_record(run.save().folder))
    assert chapter.outcome == "running, or killed"
    assert "cannot be seen" in chapter.reason
    assert chapter.to_tokens == 10 * 524_288
    assert chapter.seconds == 1800


def test_a_log_without_times_leaves_its_end_unknown(tmp_path: Path) -> None:
    """The time of its file may be that of a copy."""
    run = Logged(tmp_path, "run")
    run.steps(10)
    run.incarnation(1, 0)
    chapters = read_history(run.folder, read_record(run.save().folder))
    assert (chapters[0].to_tokens, chapters[0].seconds) == (10 * 524_288, None)
    found = bill(chapters, 2.5)
    assert (found.gpu_hours, found.dollars, found.complete) == (0.0, 0.0, False)


def test_an_incarnation_that_wrote_no_line_took_unknown_time(tmp_path: Path) -> None:
    """The run's last line is that of the incarnation before it."""
    run = Logged(tmp_path, "run")
    run.steps(10)
    run.lines[-1]["time"] = int(BEGAN.timestamp()) + 1800
    run.incarnation(1, 0)
    run.incarnation(2, 1, previous_seen=hours(0.5), from_tokens=700)
    run.incarnation(3, 3, previous_seen=hours(0.5), from_tokens=500)
    chapters = read_history(run.folder, read_record(run.save().folder))
    assert [c.seconds for c in chapters] == [1800, None, None]
    assert [c.to_tokens for c in chapters] == [None, None, 10 * 524_288]
    found = bill(chapters, 2.5)
    assert (found.gpu_hours, found.dollars, found.complete) == (4.0, 10.0, False)


def test_a_process_that_runs_here_is_seen(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    run.incarnation(1, 0, host=platform.node(), process=this_process())
    run.incarnation(2, 1, host=platform.node(), process={**this_process(), "pid": 2**22 + 1})
    chapters = read_history(run.folder, read_record(run.save().folder))
    assert [c.outcome for c in chapters] == ["killed", "killed"]
    (run.folder / "incarnations" / "000002.json").unlink()
    (chapter,) = read_history(run.folder, read_record(run.folder))
    assert (chapter.outcome, chapter.reason) == ("running", "")


def test_a_start_without_facts_is_shown(tmp_path: Path) -> None:
    """The verdict on a Slurm job leaves such a record if the job ended before its run began."""
    run = Logged(tmp_path, "run")
    start = '{"incarnation": 1, "job": "17", "note": "ended before the run was begun"}'
    (run.folder / "incarnations" / "000001.json").write_text(start)
    (chapter,) = read_history(run.folder, read_record(run.save().folder))
    assert (chapter.engine, chapter.ranks, chapter.gpu_hours) == ("ended before the run was begun", 0, 0.0)
    assert chapter.machines == "unknown device"
