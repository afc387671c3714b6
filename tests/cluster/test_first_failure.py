"""Which failure of a job was the first: the ranks' records, and the logs that real torchruns leave."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.failures import Failure
from megagpt.incarnations import list_incarnations
from tests.cluster.job import DONE, END, RETRY, TOKENS, Job
from tests.processes import REPOSITORY, environment, free_port

# One group: all logs come from one start of torchrun for each kind of failure.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("first_failure")]

# Rank 0 loses its peer, records that, and waits for torchrun to end it; rank 1 is killed as the kernel would kill it.
KILLED = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from megagpt.failures import Failure, leave_record
mine = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
if os.environ["RANK"] == "1":
    while not (mine.parent.parent / "0" / "error.json").exists():
        time.sleep(0.02)
    print("the last words of rank 1", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
leave_record(Failure("RuntimeError: Connection closed by peer", 0, "n1", retry=True))
time.sleep(60)
"""
# Rank 1 ends before it could leave a record.
BROKEN = """
import os, time
if os.environ["RANK"] == "1":
    import no_such_module
time.sleep(60)
"""
# From torch 2.13.0: rank 1 ended by itself; rank 0 ignored SIGTERM until torchrun killed it.
DEAF = """\
W1125 12:44:32.525000 28896 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 28918 closing signal SIGTERM
W1125 12:45:02.526000 28896 torch/distributed/elastic/multiprocessing/api.py:1047] Unable to shutdown process 28918 via 15, forcefully exiting via 9
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
======================================================
megagpt FAILED
------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-25_12:45:02
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 28918)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 28918
------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_12:44:32
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : 2 (pid: 28919)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
======================================================
"""  # noqa: E501
LOST_PEER = "RuntimeError: Connection closed by peer"


@pytest.fixture(scope="module")
def torchrun_logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The logs that real torchruns leave, with the options of launch/multinode.sh."""
    logs, running = {}, []
    for name, script in (("killed", KILLED), ("broken", BROKEN)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "rank.py").write_text(script)
        logs[name] = folder / "logs"
        (logs[name] / "n1").mkdir(parents=True)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--node-rank=0", "--nproc-per-node=2",
            "--master-addr=127.0.0.1", f"--master-port={free_port()}", "--rdzv-id=7.0", "--max-restarts=0",
            f"--log-dir={logs[name] / 'n1'}", "--redirects=3", "--tee=0:3", str(folder / "rank.py"),
        ]  # fmt: skip
        variables = {**environment(), "PET_SIGNALS_TO_HANDLE": "SIGHUP"}
        with (logs[name] / "n1.torchrun.log").open("w") as log:
            running.append(subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=log))
    assert [torchrun.wait(120) for torchrun in running] == [1, 1]
    return logs


def use(real: Path, job: Job, name: str) -> None:
    """Put real logs in the place of a job's."""
    shutil.copytree(real, job.run / "logs" / name)


# --- records ---


def test_the_first_record_is_named_and_no_later_one(job: Job) -> None:
    job.record("7.0", 0, Failure(LOST_PEER, 0, "n1", retry=True, first=False))
    log = job.record("7.0", 1, Failure("data/x: no shards here", 3, "n2", retry=False))
    assert job.decide("7.0") == END
    assert job.said[:2] == ["first to fail: rank 3 on n2: data/x: no shards here", f"its log: {log}"]


def test_the_text_of_a_log_decides_nothing(job: Job) -> None:
    """Neither an error line nor a traceback in a log says whether a retry may succeed: the record does."""
    log = "Traceback (most recent call last):\nmegagpt: error: [rank 0 of 4] RuntimeError: broken\n"
    job.record("7.0", 1, Failure("data/x: no shards here", 3, "n2", retry=False), log)
    job.rank_log("7.0", "n1", 0, log)
    assert job.decide("7.0") == END
    assert job.said[0] == "first to fail: rank 3 on n2: data/x: no shards here"


def test_a_file_of_another_program_is_no_record(job: Job) -> None:
    path = job.rank_log("7.0", "n1", 0, "")
    path.with_name("error.json").write_text('{"message": {"message": "RuntimeError: x"}}')
    job.rank_log("7.0", "n2", 0, "").with_name("error.json").write_text('{"mess')
    assert job.decide("7.0") == RETRY
    assert job.said[0].startswith("first to fail: an unknown rank: ")


def test_the_end_of_the_log_of_the_recorded_rank_is_left(job: Job) -> None:
    job.record("7.0", 0, Failure(LOST_PEER, 0, "n1", retry=True, first=False))
    failure = Failure("ValueError: broken", 3, "n2", retry=True)
    path = job.record("7.0", 1, failure, "".join(f"line {i}\n" for i in range(100)))
    job.begin("7.0", "failed", failure.reason, 640, rank=3, host="n2", retry=True)
    job.decide("7.0")
    lines = job.summary("7.0")
    assert lines[:2] == ["first to fail: rank 3 on n2: ValueError: broken", f"its log: {path}"]
    assert lines[3] == "line 70", "thirty lines of it"
    assert lines[-1] == "line 99"


# --- deaths ---


@pytest.mark.slow
def test_a_killed_rank_comes_before_one_that_lost_its_peer(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["killed"], job, "7.0")
    assert list(job.logs("7.0").glob("n1/*/attempt_0/0/error.json")), "no record of the rank that lost its peer"
    job.begin("7.0", "failed", LOST_PEER, 640, rank=0, host="n1", retry=True)
    assert job.decide("7.0") == RETRY
    assert job.said[0] == "first to fail: rank 1 on n1: died of SIGKILL (out of memory, if nobody sent it)"
    end = list_incarnations(job.run)[-1].ended()
    assert end["reason"] == "died of SIGKILL (out of memory, if nobody sent it)"
    assert end["where"] == "rank 1 on n1"
    assert (end["rank"], end["host"], end["retry"]) == (1, "n1", True)


def test_the_end_of_the_killed_ranks_log_is_left(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["killed"], job, "7.0")
    job.decide("7.0")
    lines = job.summary("7.0")
    assert re.fullmatch(r"its log: .*/logs/7\.0/n1/7\.0_\w+/attempt_0/1/stderr\.log", lines[1])
    assert lines[2:] == ["", "the last words of rank 1"]


@pytest.mark.slow
def test_the_rank_that_was_killed_first_is_named(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["killed"], job, "7.0")
    log = job.logs("7.0") / "n1.torchrun.log"
    later = re.sub(r"rank      : \d+ ", "rank      : 0 ", log.read_text())
    earlier = re.sub(r"time      : \d{4}", "time      : 1999", log.read_text())
    log.write_text(later)
    (job.logs("7.0") / "n2.torchrun.log").write_text(earlier.replace("rank      : 1 ", "rank      : 3 "))
    job.decide("7.0")
    assert job.said[0].startswith("first to fail: rank 3 on n2: died of SIGKILL")


def test_a_death_is_the_same_whenever_other_ranks_noticed(job: Job, torchrun_logs: dict[str, Path]) -> None:
    verdicts = []
    for name, noticed in (("7.0", 640), ("7.1", 768)):
        use(torchrun_logs["killed"], job, name)
        job.begin(name, "failed", LOST_PEER, noticed, rank=0, host="n1", retry=True)
        (job.run / "metrics.jsonl").write_text('{"event": "step", "step": 4, "tokens_seen": 512}\n')
        verdicts.append(job.decide(name))
    assert verdicts == [RETRY, END]
    assert "at 512 tokens" in job.said[-1]


@pytest.mark.parametrize("first", [True, False])
def test_an_abort_explained_by_a_record_is_no_cause(first: bool, job: Job) -> None:
    """PyTorch aborts ranks whose peer has left; an abort that no rank's own error explains is a crash."""
    job.record("7.0", 1, Failure("ValueError: broken", 1, "n1", retry=True, first=first))
    (job.logs("7.0") / "n1.torchrun.log").write_text(DEAF.replace("exitcode  : -9", "exitcode  : -6"))
    text = (job.logs("7.0") / "n1.torchrun.log").read_text().replace("12:45:02", "12:44:33")
    (job.logs("7.0") / "n1.torchrun.log").write_text(text)
    job.decide("7.0")
    cause = "rank 1 on n1: ValueError: broken" if first else "rank 0 on n1: died of SIGABRT"
    assert job.said[0] == f"first to fail: {cause}"


def test_a_rank_ended_by_torchruns_sigterm_is_no_cause(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["broken"], job, "7.0")
    assert "-15" in (job.logs("7.0") / "n1.torchrun.log").read_text()
    job.decide("7.0")
    assert "died of" not in job.said[0]


def test_a_rank_without_a_record_is_named_with_its_last_line(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["broken"], job, "7.0")
    assert job.decide("7.0") == RETRY
    assert "rank 1" in job.said[0]
    assert "ModuleNotFoundError: No module named 'no_such_module'" in "\n".join(job.summary("7.0"))


def test_a_rank_ended_by_torchruns_sigkill_is_no_cause(job: Job) -> None:
    job.begin("7.0", "failed", "ValueError: broken", 640, rank=1, host="n1", retry=True)
    (job.logs("7.0") / "n1.torchrun.log").write_text(DEAF)
    job.decide("7.0")
    assert job.said[0] == "first to fail: rank 1 on n1: ValueError: broken"


def test_a_finished_run_stays_done_if_a_rank_dies_leaving(job: Job) -> None:
    job.begin("7.0", "finished", "the last token", TOKENS)
    (job.logs("7.0") / "n1.torchrun.log").write_text(DEAF)
    assert job.decide("7.0") == DONE
