"""A failing rank ends all ranks within seconds, whatever they wait for, and one line says why."""

import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest

from megagpt import world
from megagpt.errors import ExitCode, Reported, UserError
from megagpt.incarnations import list_incarnations
from megagpt.launchers import RankInfo
from megagpt.world import World, fail_together, join
from tests.conftest import Tiny, metrics
from tests.processes import REPOSITORY, Process, free_port, rank_environment, run_launcher, torchrun_command
from tests.runs import PATIENCE, assert_one_error, error_lines

# Longer than a test waits: a rank that would end by itself is not ended by its peer's failure.
FOREVER = 2 * PATIENCE
Ended = tuple[list[int], str]  # exit codes, and what all ranks have written to stderr


def job(failing: int, failure: str, peer: str) -> int:
    """One of two ranks. `failing`: the rank that fails; `failure`: how it does; `peer`: what the other one does then,
    which takes longer than a test waits."""
    try:
        if failure == "early" and int(os.environ["RANK"]) == failing:
            fail_together(UserError("broken on purpose"))
        with join("cpu") as ranks:
            if failure == "none":
                ranks.barrier()
                if ranks.rank != failing:
                    time.sleep(8)  # longer than the peers of a failed rank are given
            else:
                fail_or_wait(ranks, failing, failure, peer)
    except Reported:
        return ExitCode.FAILED
    return ExitCode.DONE


def fail_or_wait(ranks: World, failing: int, failure: str, peer: str) -> None:
    import torch.distributed as dist

    ranks.barrier()
    if ranks.rank == failing:
        if failure == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("broken on purpose")
    deadline = time.monotonic() + FOREVER
    if peer == "collective":
        ranks.sum(1.0)
    elif peer == "new group":
        dist.new_group([0, 1], backend="gloo")
    elif peer == "sleep":
        time.sleep(FOREVER)
    while time.monotonic() < deadline:
        pass


def late_job(failing: int, failure: str, peer: str) -> int:
    """The same, but a rank that has met the others needs 3 s for what it does next."""
    connect = world.connect

    def late(info: RankInfo, *more: object, **settings: object) -> object:
        stores = connect(info, *more, **settings)  # type: ignore[arg-type]
        if info.rank != failing:
            time.sleep(3)
        return stores

    with mock.patch.object(world, "connect", late):
        return job(failing, failure, peer)


def without_launcher(folder: Path, failing: int, failure: str, peer: str, function: object = job) -> Ended:
    """Two ranks that nobody watches: no launcher kills one that waits for ever."""
    port, logs = free_port(), [folder / f"{rank}.stderr" for rank in range(2)]
    ranks = [
        Process(
            function, failing, failure, peer,
            cwd=folder, stdout=log, stderr=log, variables=rank_environment(rank, 2, port),
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    codes = [rank.wait(PATIENCE) for rank in ranks]
    return codes, "".join(log.read_text() for log in logs)


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_finish_the_run(tiny: Tiny, tmp_path: Path) -> None:
    """In the store of the attempt that failed, which torchrun keeps."""
    script, config = tmp_path / "job.py", str(tiny(train={"micro_batch": 2}))
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests.faulty_run import train_with_a_fault\n"
        f"sys.exit(train_with_a_fault({config!r}))\n"
    )
    done = run_launcher([*torchrun_command(2), "--max-restarts=1", str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert error_lines(done.stderr) == ["megagpt: error: [rank 0 of 2] ValueError: broken on purpose"], done.stderr
    run = tmp_path / "runs" / "tiny"
    assert [line["step"] for line in metrics(run)] == list(range(1, 21))
    assert [found.ended()["outcome"] for found in list_incarnations(run)] == ["failed", "finished"]
    assert list_incarnations(run)[1].start()["from_tokens"] == 640


@pytest.mark.slow
# Rank 0 holds the store by which the others learn of failures.
@pytest.mark.parametrize(
    ("failing", "peer"),
    [(0, "collective"), (0, "sleep"), (0, "new group"), (1, "collective"), (1, "loop"), (1, "new group")],
)
def test_an_exception_ends_ranks_that_no_launcher_watches(tmp_path: Path, failing: int, peer: str) -> None:
    codes, stderr = without_launcher(tmp_path, failing, "raise", peer)
    assert codes == [2, 2], stderr
    assert error_lines(stderr) == [f"megagpt: error: [rank {failing} of 2] ValueError: broken on purpose"], stderr
    assert stderr.count("Traceback") == 1, stderr


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_killed_rank_ends_a_peer_in_a_collective(tmp_path: Path, failing: int) -> None:
    codes, stderr = without_launcher(tmp_path, failing, "kill", "collective")
    assert codes[failing] == -9, stderr
    assert codes[1 - failing] == 2, stderr
    assert len(error_lines(stderr)) <= 1, stderr


@pytest.mark.slow
def test_a_peer_that_sleeps_ends_with_the_stores_holder(tmp_path: Path) -> None:
    codes, stderr = without_launcher(tmp_path, 0, "kill", "sleep")
    assert codes == [-9, 2], stderr


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("function", [job, late_job], ids=["at once", "late"])
def test_an_error_before_the_ranks_meet_ends_a_healthy_peer(tmp_path: Path, failing: int, function: object) -> None:
    """Late: the failed rank, with the store if it held it, has left before its peer looks for failures."""
    codes, stderr = without_launcher(tmp_path, failing, "early", "collective", function)
    assert 0 not in codes, stderr
    assert_one_error(stderr, f"megagpt: error: [rank {failing} of 2] broken on purpose")


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_exits_cleanly_ends_no_peer(tmp_path: Path, first: int) -> None:
    """Its peer has work left, such as files to write, for longer than peers of a failed rank are given."""
    codes, stderr = without_launcher(tmp_path, first, "none", "")
    assert codes == [0, 0], stderr
