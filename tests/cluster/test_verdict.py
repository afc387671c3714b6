"""What a job does after its ranks have ended, and whom it names."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.cluster.verdict import SUMMARY, is_finished, judge
from megagpt.config import Config
from megagpt.config_file import load_config
from megagpt.incarnations import claim, list_incarnations
from tests.conftest import write_tiny
from tests.processes import environment, free_port

DONE, GO_ON, STOP = 0, 75, 1
TOKENS = 2560

# Rank 1 is killed as the kernel would; rank 0 says that it lost its peer, and waits for torchrun to end it.
KILLED = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("the last words of rank 1", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
print("megagpt: error: [rank 0 of 2] RuntimeError: Connection closed by peer", file=sys.stderr, flush=True)
time.sleep(60)
"""
# Rank 1 ends before it could join the others: none of megagpt's own lines is in its log.
BROKEN = """
import os, time
if os.environ["RANK"] == "1":
    import no_such_module
time.sleep(60)
"""
# Of torch 2.13.0: rank 1 ended by itself, and rank 0 was deaf to SIGTERM until torchrun killed it.
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


@dataclass
class Job:
    """A run, and starts of jobs that end in one way or another."""

    folder: Path
    config: Config

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    def logs(self, job: str) -> Path:
        path = self.run / "logs" / job
        path.mkdir(parents=True, exist_ok=True)
        return path

    def begin(self, job: str, outcome: str = "", reason: str = "", tokens: int = 0, **more: object) -> None:
        """What the ranks leave behind; no outcome: they had no time to."""
        start = claim(self.run, {"job": job})
        if outcome:
            start.end(outcome, reason, tokens, **more)

    def rank_log(self, job: str, node: str, local_rank: int, text: str) -> Path:
        path = self.logs(job) / node / f"{job}_x1" / "attempt_0" / str(local_rank) / "stderr.log"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        return path

    def judge(self, job: str) -> int:
        self.said: list[str] = []
        return judge(self.run, self.config, job, self.logs(job), self.said.append)

    def crash(self, job: str, reason: str = "RuntimeError: broken", tokens: int = 640) -> int:
        """A start that fails, and the verdict on it."""
        self.begin(job, "failed", reason, tokens, rank=1, host="n2", mend=False)
        return self.judge(job)

    def summary(self, job: str) -> list[str]:
        return (self.logs(job) / SUMMARY).read_text().splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, load_config(str(write_tiny(tmp_path, tmp_path / "corpus"))))


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
    assert [torchrun.wait(60) for torchrun in running] == [1, 1]
    return logs


def use(real: Path, job: Job, name: str) -> None:
    """Put real logs where those of a start are."""
    shutil.copytree(real, job.run / "logs" / name)


def test_a_finished_run_is_done(job: Job) -> None:
    job.begin("7.0", "stopped", "SIGUSR1", 640)
    job.begin("7.1", "finished", "the last token", TOKENS)
    assert job.judge("7.1") == DONE


def test_a_finished_run_stays_done_when_a_rank_dies_while_it_leaves(job: Job) -> None:
    job.begin("7.0", "finished", "the last token", TOKENS)
    (job.logs("7.0") / "n1.torchrun.log").write_text(DEAF)
    assert job.judge("7.0") == DONE


def test_a_finished_run_that_is_extended_is_not_finished(job: Job, tmp_path: Path) -> None:
    job.begin("7.0", "finished", "the last token", TOKENS)
    longer = load_config(str(tmp_path / "tiny.yaml"), [f"train.tokens={TOKENS + 128}"])
    assert is_finished(job.run, job.config)
    assert not is_finished(job.run, longer)


def test_a_run_whose_tokens_are_no_whole_samples_finishes(job: Job, tmp_path: Path) -> None:
    """Of 2,570 tokens in samples of 32, 80 are whole: the run ends at 2,560."""
    job.config = load_config(str(tmp_path / "tiny.yaml"), ["train.tokens=2570"])
    job.begin("7.0", "finished", "the last token", 2560)
    assert job.judge("7.0") == DONE


@pytest.mark.parametrize("reason", ["SIGUSR1", "SIGTERM", "train.time_limit"])
def test_a_stopped_run_goes_on(reason: str, job: Job) -> None:
    job.begin("7.0", "stopped", reason, 640)
    assert job.judge("7.0") == GO_ON
    assert not (job.logs("7.0") / SUMMARY).exists()


def test_a_run_may_be_stopped_at_the_same_step_again(job: Job) -> None:
    for restart in range(3):
        job.begin(f"7.{restart}", "stopped", "SIGTERM", 640)
        assert job.judge(f"7.{restart}") == GO_ON


def test_ctrl_c_ends_the_job(job: Job) -> None:
    job.begin("7.0", "stopped", "SIGINT", 640)
    assert job.judge("7.0") == STOP


def test_what_has_to_be_mended_ends_the_job_at_once(job: Job) -> None:
    job.begin("7.0", "failed", "runs/tiny: disk full; free some space and resume", 640, rank=0, host="n1", mend=True)
    assert job.judge("7.0") == STOP
    assert job.said[0] == "first to fail: rank 0 on n1: runs/tiny: disk full; free some space and resume"


def test_what_has_to_be_mended_before_the_run_is_begun_ends_the_job_at_once(job: Job) -> None:
    job.rank_log("7.0", "n2", 1, "a warning\nmegagpt: error: [rank 3 of 4] data/x: no shards here\n")
    assert job.judge("7.0") == STOP
    assert job.said[0] == "first to fail: rank 3: data/x: no shards here"


def test_a_fault_before_the_run_is_begun_is_nothing_to_mend(job: Job) -> None:
    text = "Traceback (most recent call last):\n  ...\nmegagpt: error: [rank 0 of 4] RuntimeError: CUDA is away\n"
    job.rank_log("7.0", "n1", 0, text)
    assert job.judge("7.0") == GO_ON
    assert job.said[0] == "first to fail: rank 0: RuntimeError: CUDA is away"


def test_a_crash_goes_on_once(job: Job) -> None:
    assert job.crash("7.0") == GO_ON
    assert job.said[0] == "first to fail: rank 1 on n2: RuntimeError: broken"


def test_the_same_crash_at_the_same_tokens_ends_the_job(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("7.1")] == [GO_ON, STOP]
    assert "at 640 tokens" in job.said[-1]


def test_the_same_crash_in_another_job_goes_on(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("8.0")] == [GO_ON, GO_ON]


def test_a_job_whose_number_begins_alike_is_another(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("77.1")] == [GO_ON, GO_ON]


def test_the_same_crash_further_on_goes_on(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("7.1", tokens=768)] == [GO_ON, GO_ON]


def test_another_crash_at_the_same_tokens_goes_on(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("7.1", "ValueError: broken")] == [GO_ON, GO_ON]


def test_other_ports_and_addresses_make_no_other_crash(job: Job) -> None:
    before = job.crash("7.0", "RuntimeError: no answer from [10.0.0.12]:29500 after 60000ms")
    after = job.crash("7.1", "RuntimeError: no answer from [10.0.3.4]:4711 after 60001ms")
    assert [before, after] == [GO_ON, STOP]


def test_three_failures_in_a_row_without_a_checkpoint_end_the_job(job: Job) -> None:
    assert [job.crash(f"7.{i}", f"{word}Error", 128 * i) for i, word in enumerate("AB")] == [GO_ON, GO_ON]
    assert job.crash("7.2", "CError", 512) == STOP


def test_failures_with_new_checkpoints_between_them_do_not_add_up(job: Job) -> None:
    for i, word in enumerate("ABCD"):
        (job.run / "checkpoints" / f"{128 * i:015d}").mkdir(parents=True)
        assert job.crash(f"7.{i}", f"{word}Error", 128 * i) == GO_ON


def test_a_job_that_failed_before_it_had_the_run_leaves_it_to_the_one_that_has(job: Job) -> None:
    job.begin("6.0")
    (job.logs("7.0") / "n1.torchrun.log").write_text("DistNetworkError: port 29500 is in use\n")
    job.judge("7.0")
    assert [start.start()["job"] for start in list_incarnations(job.run)] == ["6.0"]


def test_a_start_between_two_crashes_that_ended_otherwise_forgives_the_first(job: Job) -> None:
    assert job.crash("7.0") == GO_ON
    job.begin("7.1", "stopped", "SIGTERM", 640)
    assert job.judge("7.1") == GO_ON
    assert job.crash("7.2") == GO_ON


def test_ranks_that_end_without_a_word_twice_end_the_job(job: Job) -> None:
    verdicts = []
    for name in ("7.0", "7.1"):
        job.begin(name)
        verdicts.append(job.judge(name))
    assert verdicts == [GO_ON, STOP]
    assert job.summary("7.0") == ["first to fail: no rank: the ranks ended without a word"]


def test_without_a_word_of_the_ranks_the_metrics_tell_how_far_they_were(job: Job) -> None:
    for name, tokens in (("7.0", 640), ("7.1", 768)):
        job.begin(name)
        line = f'{{"event": "step", "step": 5, "tokens_seen": {tokens}}}\n'
        (job.run / "metrics.jsonl").write_text(line + '{"event": "step", "st')
        assert job.judge(name) == GO_ON
        assert list_incarnations(job.run)[-1].ended()["tokens_seen"] == tokens


def test_a_start_that_fails_before_the_run_is_begun_is_noted_as_one(job: Job) -> None:
    log = job.logs("7.0") / "n1.torchrun.log"
    log.write_text("Traceback (most recent call last):\ntorch.DistNetworkError: port 29500 is in use\n\n")
    assert job.judge("7.0") == GO_ON
    (start,) = list_incarnations(job.run)
    assert start.start()["job"] == "7.0"
    assert start.ended()["outcome"] == "failed"
    assert start.ended()["reason"] == "torch.DistNetworkError: port 29500 is in use"
    assert job.summary("7.0")[0] == "first to fail: torchrun on n1: torch.DistNetworkError: port 29500 is in use"


def test_starts_that_fail_before_the_run_is_begun_end_the_job_the_second_time(job: Job) -> None:
    job.begin("6.0", "stopped", "SIGTERM", 640)
    verdicts = []
    for name in ("7.0", "7.1"):
        (job.logs(name) / "n1.torchrun.log").write_text(f"DistNetworkError: port 2950{name[-1]} is in use\n")
        verdicts.append(job.judge(name))
    assert verdicts == [GO_ON, STOP]


def test_a_rank_that_was_killed_comes_before_one_that_lost_its_peer(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["killed"], job, "7.0")
    job.begin("7.0", "failed", "RuntimeError: Connection closed by peer", 640, rank=0, host="n1", mend=False)
    assert job.judge("7.0") == GO_ON
    assert job.said[0] == "first to fail: rank 1 on n1: died of SIGKILL (out of memory, if nobody sent it)"
    end = list_incarnations(job.run)[-1].ended()
    assert end["reason"] == "died of SIGKILL (out of memory, if nobody sent it)"
    assert end["where"] == "rank 1 on n1"


def test_the_end_of_the_killed_ranks_log_is_left(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["killed"], job, "7.0")
    job.judge("7.0")
    lines = job.summary("7.0")
    assert re.fullmatch(r"its log: .*/logs/7\.0/n1/7\.0_\w+/attempt_0/1/stderr\.log", lines[1])
    assert lines[2:] == ["", "the last words of rank 1"]


def test_the_rank_that_was_killed_first_is_named(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["killed"], job, "7.0")
    log = job.logs("7.0") / "n1.torchrun.log"
    later = re.sub(r"rank      : \d+ ", "rank      : 0 ", log.read_text())
    earlier = re.sub(r"time      : \d{4}", "time      : 1999", log.read_text())
    log.write_text(later)
    (job.logs("7.0") / "n2.torchrun.log").write_text(earlier.replace("rank      : 1 ", "rank      : 3 "))
    job.judge("7.0")
    assert job.said[0].startswith("first to fail: rank 3 on n2: died of SIGKILL")


def test_a_death_is_the_same_whenever_the_other_ranks_noticed(job: Job, torchrun_logs: dict[str, Path]) -> None:
    verdicts = []
    for name, noticed in (("7.0", 640), ("7.1", 768)):
        use(torchrun_logs["killed"], job, name)
        job.begin(name, "failed", "RuntimeError: Connection closed by peer", noticed, rank=0, host="n1", mend=False)
        (job.run / "metrics.jsonl").write_text('{"event": "step", "step": 4, "tokens_seen": 512}\n')
        verdicts.append(job.judge(name))
    assert verdicts == [GO_ON, STOP]
    assert "at 512 tokens" in job.said[-1]


def test_a_rank_that_torchrun_ended_with_sigterm_is_no_cause(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["broken"], job, "7.0")
    assert "-15" in (job.logs("7.0") / "n1.torchrun.log").read_text()
    job.judge("7.0")
    assert "died of" not in job.said[0]


def test_a_rank_that_ended_before_it_joined_is_named_with_its_error(job: Job, torchrun_logs: dict[str, Path]) -> None:
    use(torchrun_logs["broken"], job, "7.0")
    assert job.judge("7.0") == GO_ON
    assert "rank 1" in job.said[0]
    assert "ModuleNotFoundError: No module named 'no_such_module'" in "\n".join(job.summary("7.0"))


def test_a_rank_that_torchrun_killed_because_it_was_deaf_is_no_cause(job: Job) -> None:
    job.begin("7.0", "failed", "ValueError: broken", 640, rank=1, host="n1", mend=False)
    (job.logs("7.0") / "n1.torchrun.log").write_text(DEAF)
    job.judge("7.0")
    assert job.said[0] == "first to fail: rank 1 on n1: ValueError: broken"


def test_the_last_lines_of_the_log_of_the_rank_that_reported_are_left(job: Job) -> None:
    job.rank_log("7.0", "n1", 0, "nothing happened here\n")
    report = "megagpt: error: [rank 3 of 4] ValueError: broken\n"
    path = job.rank_log("7.0", "n2", 1, "".join(f"line {i}\n" for i in range(100)) + "Traceback\n" + report)
    job.begin("7.0", "failed", "ValueError: broken", 640, rank=3, host="n2", mend=False)
    job.judge("7.0")
    lines = job.summary("7.0")
    assert lines[:2] == ["first to fail: rank 3 on n2: ValueError: broken", f"its log: {path}"]
    assert lines[3] == "line 72", "thirty lines of it"
    assert lines[-1] == report.strip()


def test_the_command_line_ends_with_the_verdicts_code(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    codes = []
    for restart in (0, 1):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        job.begin(f"7.{restart}", "failed", "RuntimeError: broken", 640, rank=1, host="n2", mend=False)
        command = ["launch", "verdict", str(tmp_path / "tiny.yaml"), "--logs", str(job.logs(f"7.{restart}"))]
        codes.append(main(command))
    assert codes == [GO_ON, STOP]
    assert capsys.readouterr().out.startswith("== first to fail: rank 1 on n2: RuntimeError: broken\n")
