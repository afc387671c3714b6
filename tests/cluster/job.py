"""The files that the ranks of a Slurm job leave behind, and the verdict on them."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megagpt.cluster.verdict import SUMMARY, decide
from megagpt.config import Config
from megagpt.errors import ExitCode
from megagpt.failures import Failure, leave_record
from megagpt.incarnations import claim

DONE, RETRY, END = ExitCode.DONE, ExitCode.STOPPED, ExitCode.DIFFERENT
TOKENS = 2560


@dataclass
class Job:
    """A run and incarnations of it that end in one way or another. Jobs are named ID.RESTARTS."""

    folder: Path
    config: Config
    capsys: pytest.CaptureFixture[str]
    said: list[str] = field(default_factory=list)
    """Lines of the last verdict."""

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    def logs(self, job: str) -> Path:
        path = self.run / "logs" / job
        path.mkdir(parents=True, exist_ok=True)
        return path

    def begin(self, job: str, outcome: str = "", reason: str = "", tokens: int = 0, **more: object) -> None:
        """The files of an incarnation; without an outcome, its ranks had no time to record one."""
        start = claim(self.run, {"job": job})
        if outcome:
            start.end(outcome, reason, tokens, **more)

    def rank_log(self, job: str, node: str, local_rank: int, text: str) -> Path:
        path = self.logs(job) / node / f"{job}_x1" / "attempt_0" / str(local_rank) / "stderr.log"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        return path

    def record(self, job: str, local_rank: int, failure: Failure, log: str = "a line\n") -> Path:
        """The record of a failed rank as torchrun asks for it, and its log; the log's path."""
        path = self.rank_log(job, failure.host, local_rank, log)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TORCHELASTIC_ERROR_FILE", str(path.with_name("error.json")))
            leave_record(failure)
        return path

    def decide(self, job: str) -> ExitCode:
        code = decide(self.run, self.config, job, self.logs(job))
        self.said = self.capsys.readouterr().out.splitlines()
        return code

    def crash(self, job: str, reason: str = "RuntimeError: broken", tokens: int = 640) -> ExitCode:
        """An incarnation that fails, and the verdict on it."""
        self.begin(job, "failed", reason, tokens, rank=1, host="n2", retry=True)
        return self.decide(job)

    def summary(self, job: str) -> list[str]:
        return (self.logs(job) / SUMMARY).read_text().splitlines()
