"""Judges a job whose ranks have ended: which failure was the first, and whether the job should be started again."""

import datetime
import re
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.config import Config
from megagpt.console import say
from megagpt.errors import ExitCode
from megagpt.failures import Failure, read_record
from megagpt.files import write_atomic
from megagpt.incarnations import Incarnation, claim, list_incarnations
from megagpt.launchers import job_number
from megagpt.run_log import read

SUMMARY = "first_error.txt"
_TAIL_LINES = 30
# Bytes at the end of the run log that hold its last line.
_LOG_BYTES = 2**22
# Number of failures in a row without a new checkpoint after which a job ends, for any reasons.
_MAX_FRUITLESS = 3
# If a rank dies longer than this after another rank's failure, torchrun has killed it: it kills ranks that do not end
# by themselves.
_AFTERMATH = datetime.timedelta(seconds=5)


@dataclass(frozen=True)
class Cause:
    """The first failure of a job's ranks."""

    failure: Failure
    log: Path | None = None
    """The log of the rank, or of its launcher."""
    died: bool = False
    """Killed by a signal that no other rank's failure explains: out of memory, a crash."""


def is_finished(run: Path, config: Config) -> bool:
    """Whether the run has reached the end that the config wants."""
    last = config.total_sequences * config.model.context
    finished = False
    for incarnation in list_incarnations(run):
        if incarnation.start().get("from_tokens", last) < last:
            finished = False  # the run was taken back
        end = incarnation.ended()
        finished = finished or (end.get("outcome") == "finished" and end["tokens_seen"] >= last)
    return finished


def decide(run: Path, config: Config, job: str, logs: Path) -> ExitCode:
    """DONE: the run is finished; STOPPED: the job should be started again; DIFFERENT: it should not. `job`: ID.RESTARTS
    of this incarnation; `logs`: folder of its ranks' logs and records, to which a summary is written. Exit codes of the
    ranks are not used, because torchrun and srun replace them by their own."""
    if is_finished(run, config):
        return ExitCode.DONE
    mine = _incarnations(run, job)
    end = mine[-1].ended() if mine else {}
    if end.get("outcome") == "stopped":
        if end["reason"] == "SIGINT":
            say("stopped by SIGINT, which is Ctrl-C: the job ends here; submit it again to resume")
            return ExitCode.DIFFERENT
        say(f"stopped by {end['reason']} and saved: the job resumes when it is started again")
        return ExitCode.STOPPED
    return decide_after_failure(run, job, _find_cause(end, logs), logs)


def decide_after_failure(run: Path, job: str, cause: Cause, logs: Path) -> ExitCode:
    """Say and record why this incarnation failed. STOPPED if a retry may succeed, else DIFFERENT."""
    _summarize(cause, logs)
    recorded = _record(run, job, cause)
    failed = _failed_in_a_row(run, job)
    if not cause.failure.retry:
        say("this must be fixed first: the job ends here; submit it again to resume")
    elif not recorded and len(list(logs.parent.glob(f"{job_number(job)}.*/{SUMMARY}"))) >= _MAX_FRUITLESS:
        say(f"this job failed {_MAX_FRUITLESS} times while another job has the run: the job ends here")
    elif recorded and len(failed) > 1 and _alike(failed[-2], failed[-1]):
        tokens = failed[-1]["tokens_seen"]
        say(f"it failed in the same way at the same step before, at {tokens:,} tokens: the job ends here")
    elif len(failed) >= _MAX_FRUITLESS and len({end.get("checkpoint") for end in failed[-_MAX_FRUITLESS:]}) == 1:
        say(f"it failed {_MAX_FRUITLESS} times in a row without a new checkpoint: the job ends here")
    else:
        say("the job resumes from its last checkpoint when it is started again")
        return ExitCode.STOPPED
    return ExitCode.DIFFERENT


def _incarnations(run: Path, job: str) -> list[Incarnation]:
    return [i for i in list_incarnations(run) if i.start().get("job") == job]


def _record(run: Path, job: str, cause: Cause) -> bool:
    """Record the failure as the end of this job's incarnation; if it failed before it had one, claim one for that.
    False, with nothing recorded, if another job has the run now."""
    mine = _incarnations(run, job)
    if not mine:
        newest = list_incarnations(run)[-1:]
        if any(not i.ended() and job_number(i.start().get("job")) != job_number(job) for i in newest):
            return False
        mine = [claim(run, {"job": job, "note": "ended before the run was begun"})]
    end = mine[-1].ended()
    # After a rank died, the end says when the others noticed; the run log's last position is the same at each retry.
    logged = [0, *(line["tokens_seen"] for line in read(run, _LOG_BYTES))]
    tokens = logged[-1] if cause.died or not end else end["tokens_seen"]
    failure = cause.failure
    mine[-1].correct_end(
        "failed", failure.reason, tokens, rank=failure.rank, host=failure.host, retry=failure.retry,
        where=failure.where, checkpoint=max((c.tokens for c in list_checkpoints(run)), default=None),
    )  # fmt: skip
    return True


def _failed_in_a_row(run: Path, job: str) -> list[dict[str, Any]]:
    """The ends of this job's last incarnations, back to the last one that did not fail, oldest first."""
    newest_first = reversed(list_incarnations(run))
    mine = takewhile(lambda i: job_number(i.start().get("job")) == job_number(job), newest_first)
    ends = takewhile(lambda end: end.get("outcome") == "failed", (i.ended() for i in mine))
    return list(ends)[::-1]


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the reasons differ only in numbers (ports, addresses, times) and the tokens are the same."""
    words = [re.sub(r"0x[0-9a-f]+|\d+", "#", end["reason"]) for end in (one, other)]
    return words[0] == words[1] and one["tokens_seen"] == other["tokens_seen"]


def _find_cause(end: dict[str, Any], logs: Path) -> Cause:
    """The first failure, from the best source: a death by a signal, which other ranks only notice; else the end that
    the incarnation recorded; else the record of the rank that failed first; else the first exit code and its log."""
    records = list(_records(logs))
    first = next((cause for cause in records if cause.failure.first), None)
    if death := _death(logs, reported=first is not None):
        name = signal.Signals(-death.code).name if -death.code in set(signal.Signals) else f"signal {-death.code}"
        hint = " (out of memory, if nobody sent it)" if name == "SIGKILL" else ""
        failure = Failure(f"died of {name}{hint}", death.rank, death.node, retry=True)
        return Cause(failure, _rank_log(logs, death.node, death.local_rank), died=True)
    if end.get("outcome") == "failed":
        failure = Failure(end["reason"], end.get("rank"), end.get("host", ""), bool(end.get("retry", True)))
        same = next((cause for cause in records if cause.failure.rank == failure.rank), first)
        return Cause(failure, same.log if same else None)
    if first is not None:
        return first
    for left in sorted(_exits(logs)):
        log = _rank_log(logs, left.node, left.local_rank)
        if left.code > 0 and log is not None:
            known = next((cause for cause in records if cause.log == log), None)
            return known or Cause(Failure("".join(_tail(log, 1)).strip(), left.rank, left.node, retry=True), log)
    for path in sorted(logs.glob("*.torchrun.log")):
        for line in _tail(path, 1):
            node = path.name.removesuffix(".torchrun.log")
            return Cause(Failure(f"torchrun: {line.strip()}", None, node, retry=True), path)
    return Cause(Failure("the ranks left neither an error nor a log", None, "", retry=True))


def _records(logs: Path) -> Iterator[Cause]:
    """The records that failed ranks left where torchrun looks, with the logs beside them."""
    for path in sorted(logs.glob("*/*/attempt_*/*/error.json")):
        if record := read_record(path):
            log = path.with_name("stderr.log")
            yield Cause(record, log if log.exists() else None)


class _Exit(NamedTuple):
    """How a rank ended, from torchrun's summary."""

    time: datetime.datetime
    rank: int
    local_rank: int
    code: int
    node: str


_EXIT = re.compile(
    r"time\s*: (?P<time>\S+)\n.*\n\s*rank\s*: (?P<rank>\d+) \(local_rank: (?P<local>\d+)\)\n"
    r"\s*exitcode\s*: (?P<code>-?\d+) "
)


def _exits(logs: Path) -> Iterator[_Exit]:
    for path in logs.glob("*.torchrun.log"):
        for found in _EXIT.finditer(path.read_text(errors="replace")):
            when = datetime.datetime.strptime(found["time"], "%Y-%m-%d_%H:%M:%S")
            node = path.name.removesuffix(".torchrun.log")
            yield _Exit(when, int(found["rank"]), int(found["local"]), int(found["code"]), node)


def _death(logs: Path, reported: bool) -> _Exit | None:
    """The first rank that a signal killed, unless torchrun or PyTorch killed it because of another rank.
    `reported`: some rank left a record of an error of its own."""
    exits = sorted(set(_exits(logs)))
    consequences = {signal.SIGTERM, *([signal.SIGABRT] if reported else [])}
    for rank in exits:
        if rank.code < 0 and -rank.code not in consequences:
            earlier = any(other.code > 0 and rank.time - other.time > _AFTERMATH for other in exits)
            return None if earlier else rank
    return None


def _rank_log(logs: Path, node: str, local_rank: int) -> Path | None:
    return min(logs.glob(f"{node}/*/attempt_*/{local_rank}/stderr.log"), default=None)


def _summarize(cause: Cause, logs: Path) -> None:
    """Say what failed first, and write it to `logs` with the end of that rank's log."""
    lines = [f"first to fail: {cause.failure.where}: {cause.failure.reason}"]
    if cause.log is not None:
        lines.append(f"its log: {cause.log}")
    for line in lines:
        say(line)
    if cause.log is not None:
        lines += ["", *_tail(cause.log, _TAIL_LINES)]
    logs.mkdir(parents=True, exist_ok=True)
    write_atomic(logs / SUMMARY, ("\n".join(lines) + "\n").encode())


def _tail(path: Path, count: int) -> list[str]:
    """The last lines that are not empty."""
    with path.open(errors="replace") as file:
        return [line.rstrip("\n") for line in deque((line for line in file if line.strip()), count)]
