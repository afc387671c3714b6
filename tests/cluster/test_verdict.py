"""Whether a job is started again after its ranks have ended."""

from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.cluster.verdict import SUMMARY, is_finished
from megagpt.config_file import load_config
from megagpt.failures import Failure
from megagpt.incarnations import claim, list_incarnations
from tests.cluster.job import DONE, END, RETRY, TOKENS, Job


def test_a_finished_run_is_done(job: Job) -> None:
    job.begin("7.0", "stopped", "SIGUSR1", 640)
    job.begin("7.1", "finished", "the last token", TOKENS)
    assert job.decide("7.1") == DONE


def test_an_extended_run_is_no_longer_finished(job: Job, tmp_path: Path) -> None:
    job.begin("7.0", "finished", "the last token", TOKENS)
    longer = load_config(str(tmp_path / "tiny.yaml"), [f"train.tokens={TOKENS + 128}"])
    assert is_finished(job.run, job.config)
    assert not is_finished(job.run, longer)


def test_a_run_that_was_taken_back_is_not_finished(job: Job) -> None:
    job.begin("7.0", "finished", "the last token", TOKENS)
    claim(job.run, {"job": "8.0", "from_tokens": 640}).end("stopped", "SIGUSR1", 1280)
    assert job.decide("8.0") == RETRY
    claim(job.run, {"job": "8.1", "from_tokens": 1280}).end("finished", "the last token", TOKENS)
    assert job.decide("8.1") == DONE


def test_a_run_finishes_at_its_last_full_sequence(job: Job, tmp_path: Path) -> None:
    """2,570 tokens are 80 sequences of 32 and a remainder: the run ends at 2,560."""
    job.config = load_config(str(tmp_path / "tiny.yaml"), ["train.tokens=2570"])
    job.begin("7.0", "finished", "the last token", 2560)
    assert job.decide("7.0") == DONE


@pytest.mark.parametrize("reason", ["SIGUSR1", "SIGTERM", "train.time_limit"])
def test_a_stopped_run_resumes(reason: str, job: Job) -> None:
    job.begin("7.0", "stopped", reason, 640)
    assert job.decide("7.0") == RETRY
    assert not (job.logs("7.0") / SUMMARY).exists()


def test_a_run_may_be_stopped_at_the_same_step_again(job: Job) -> None:
    for restart in range(3):
        job.begin(f"7.{restart}", "stopped", "SIGTERM", 640)
        assert job.decide(f"7.{restart}") == RETRY


def test_ctrl_c_ends_the_job(job: Job) -> None:
    job.begin("7.0", "stopped", "SIGINT", 640)
    assert job.decide("7.0") == END


@pytest.mark.parametrize("field", [{"retry": False}, {"mend": True}], ids=["retry", "older records"])
def test_a_failure_without_retry_ends_the_job_at_once(field: dict[str, bool], job: Job) -> None:
    job.begin("7.0", "failed", "runs/tiny: disk full; free some space and resume", 640, rank=0, host="n1", **field)
    assert job.decide("7.0") == END
    assert job.said[0] == "first to fail: rank 0 on n1: runs/tiny: disk full; free some space and resume"
    assert list_incarnations(job.run)[-1].ended()["retry"] is False


@pytest.mark.parametrize("field", [{"retry": True}, {"mend": False}, {}], ids=["retry", "older records", "a hang"])
def test_a_failure_with_retry_is_retried(field: dict[str, bool], job: Job) -> None:
    job.begin("7.0", "failed", "no progress for 900 s", 640, rank=0, host="n1", **field)
    assert job.decide("7.0") == RETRY
    assert list_incarnations(job.run)[-1].ended()["retry"] is True


def test_a_record_without_retry_before_the_run_ends_the_job(job: Job) -> None:
    job.record("7.0", 1, Failure("data/x: no shards here", 3, "n2", retry=False))
    assert job.decide("7.0") == END
    assert job.said[0] == "first to fail: rank 3 on n2: data/x: no shards here"


def test_a_record_with_retry_before_the_run_is_retried(job: Job) -> None:
    job.record("7.0", 0, Failure("RuntimeError: CUDA is away", 0, "n1", retry=True))
    assert job.decide("7.0") == RETRY
    assert job.said[0] == "first to fail: rank 0 on n1: RuntimeError: CUDA is away"


def test_a_crash_is_retried_once(job: Job) -> None:
    assert job.crash("7.0") == RETRY
    assert job.said[0] == "first to fail: rank 1 on n2: RuntimeError: broken"


def test_the_same_crash_at_the_same_tokens_ends_the_job(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("7.1")] == [RETRY, END]
    assert "at 640 tokens" in job.said[-1]


def test_the_same_crash_in_another_job_is_retried(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("8.0")] == [RETRY, RETRY]


def test_jobs_are_told_apart_by_their_whole_number(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("77.1")] == [RETRY, RETRY]


def test_the_same_crash_at_other_tokens_is_retried(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("7.1", tokens=768)] == [RETRY, RETRY]


def test_another_crash_at_the_same_tokens_is_retried(job: Job) -> None:
    assert [job.crash("7.0"), job.crash("7.1", "ValueError: broken")] == [RETRY, RETRY]


def test_crashes_that_differ_in_ports_and_addresses_are_the_same(job: Job) -> None:
    before = job.crash("7.0", "RuntimeError: no answer from [10.0.0.12]:29500 after 60000ms")
    after = job.crash("7.1", "RuntimeError: no answer from [10.0.3.4]:4711 after 60001ms")
    assert [before, after] == [RETRY, END]


def test_three_failures_without_a_new_checkpoint_end_the_job(job: Job) -> None:
    assert [job.crash(f"7.{i}", f"{word}Error", 128 * i) for i, word in enumerate("AB")] == [RETRY, RETRY]
    assert job.crash("7.2", "CError", 512) == END


def test_failures_with_new_checkpoints_between_them_are_retried(job: Job) -> None:
    for i, word in enumerate("ABCD"):
        (job.run / "checkpoints" / f"{128 * i:015d}").mkdir(parents=True)
        assert job.crash(f"7.{i}", f"{word}Error", 128 * i) == RETRY


def test_a_job_without_the_run_leaves_the_owners_record_alone(job: Job) -> None:
    job.begin("6.0")
    (job.logs("7.0") / "n1.torchrun.log").write_text("DistNetworkError: port 29500 is in use\n")
    job.decide("7.0")
    assert [start.start()["job"] for start in list_incarnations(job.run)] == ["6.0"]


def test_a_stop_between_two_equal_crashes_separates_them(job: Job) -> None:
    assert job.crash("7.0") == RETRY
    job.begin("7.1", "stopped", "SIGTERM", 640)
    assert job.decide("7.1") == RETRY
    assert job.crash("7.2") == RETRY


def test_ranks_that_leave_nothing_twice_end_the_job(job: Job) -> None:
    verdicts = []
    for name in ("7.0", "7.1"):
        job.begin(name)
        verdicts.append(job.decide(name))
    assert verdicts == [RETRY, END]
    assert job.summary("7.0") == ["first to fail: an unknown rank: the ranks left neither an error nor a log"]


def test_the_metrics_tell_the_position_if_no_rank_recorded_it(job: Job) -> None:
    for name, tokens in (("7.0", 640), ("7.1", 768)):
        job.begin(name)
        line = f'{{"event": "step", "step": 5, "tokens_seen": {tokens}}}\n'
        (job.run / "metrics.jsonl").write_text(line + '{"event": "step", "st')
        assert job.decide(name) == RETRY
        assert list_incarnations(job.run)[-1].ended()["tokens_seen"] == tokens


def test_a_failure_before_the_run_becomes_an_incarnation(job: Job) -> None:
    log = job.logs("7.0") / "n1.torchrun.log"
    log.write_text("Traceback (most recent call last):\ntorch.DistNetworkError: port 29500 is in use\n\n")
    assert job.decide("7.0") == RETRY
    (start,) = list_incarnations(job.run)
    assert start.start()["job"] == "7.0"
    assert start.ended()["outcome"] == "failed"
    assert start.ended()["reason"] == "torchrun: torch.DistNetworkError: port 29500 is in use"
    assert job.summary("7.0")[0] == "first to fail: n1: torchrun: torch.DistNetworkError: port 29500 is in use"


def test_the_second_failure_before_the_run_ends_the_job(job: Job) -> None:
    job.begin("6.0", "stopped", "SIGTERM", 640)
    verdicts = []
    for name in ("7.0", "7.1"):
        (job.logs(name) / "n1.torchrun.log").write_text(f"DistNetworkError: port 2950{name[-1]} is in use\n")
        verdicts.append(job.decide(name))
    assert verdicts == [RETRY, END]


def test_the_command_line_ends_with_the_verdicts_code(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    codes = []
    for restart in (0, 1):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        job.begin(f"7.{restart}", "failed", "RuntimeError: broken", 640, rank=1, host="n2", retry=True)
        command = ["launch", "verdict", str(tmp_path / "tiny.yaml"), "--logs", str(job.logs(f"7.{restart}"))]
        codes.append(main(command))
    assert codes == [RETRY, END]
    assert capsys.readouterr().out.startswith("== first to fail: rank 1 on n2: RuntimeError: broken\n")
