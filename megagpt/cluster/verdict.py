"""After the ranks of a job have ended: who failed first and why, and whether the job should go on."""

import datetime
import json
import re
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.config import Config
from megagpt.errors import ExitCode
from megagpt.files import write_atomic
from megagpt.incarnations import Incarnation, claim, list_incarnations

GO_ON, STOP = ExitCode.STOPPED, ExitCode.DIFFERENT
SUMMARY = "first_error.txt"
_TAIL_LINES = 30
# A job whose starts fail in a row, without one new checkpoint, ends after so many, whatever they failed of.
_FRUITLESS = 3
# torchrun kills ranks that do not end by themselves: a death so long after another rank's failure is its doing.
_AFTERMATH = datetime.timedelta(seconds=5)


@dataclass(frozen=True)
class Failure:
    """The first rank that failed."""

    text: str
    where: str
    """Rank and node, as far as they are known."""
    log: Path | None = None
    died: bool = False
    """By a signal that nobody sent for the sake of another rank's failure: out of memory, a crash."""
    mend: bool = False
    """Something to mend, which would fail again."""


def is_finished(run: Path, config: Config) -> bool:
    """Whether the run has got to the end that the config wants."""
    last = config.total_sequences * config.model.context
    ends = [incarnation.ended() for incarnation in list_incarnations(run)]
    return any(end.get("outcome") == "finished" and end["tokens_seen"] >= last for end in ends)


def judge(run: Path, config: Config, job: str, logs: Path, say: Callable[[str], Any]) -> int:
    """What the job should do now: 0, it is done; GO_ON, start again; STOP, fail.

    `job`: ID.RESTARTS of this start; `logs`: where its ranks' logs are. What stopped the ranks is said, and left there.
    Exit codes are not asked: torchrun and srun make their own of them.
    """
    if is_finished(run, config):
        return 0
    mine = _starts(run, job)
    end = mine[-1].ended() if mine else {}
    if end.get("outcome") == "stopped":
        if end["reason"] == "SIGINT":
            say("stopped by SIGINT, which is Ctrl-C: the job ends here; submit it again to go on")
            return STOP
        say(f"stopped by {end['reason']} and saved: the job goes on when it is started again")
        return GO_ON
    return decide(run, job, _failure(end, logs), logs, say)


def decide(run: Path, job: str, failure: Failure, logs: Path, say: Callable[[str], Any]) -> int:
    """Say and note how this start failed. GO_ON, unless it would fail again: then STOP, and why."""
    _summarize(failure, logs, say)
    now = _note(run, job, failure)
    if failure.mend:
        say("that has to be mended first: the job ends here; submit it again to go on")
        return STOP
    failed = _failed_in_a_row(run, job)
    if not now and len(list(logs.parent.glob(f"{_number(job)}.*/{SUMMARY}"))) >= _FRUITLESS:
        say(f"{_FRUITLESS} starts of this job failed, while another one has the run: the job ends here")
        return STOP
    if now and len(failed) > 1 and _alike(failed[-2], failed[-1]):
        tokens = failed[-1]["tokens_seen"]
        say(f"it failed in the same way at the same step before, at {tokens:,} tokens: the job ends here")
        return STOP
    if len(failed) >= _FRUITLESS and len({end.get("checkpoint") for end in failed[-_FRUITLESS:]}) == 1:
        say(f"{_FRUITLESS} starts in a row failed without a new checkpoint: the job ends here")
        return STOP
    say("the job goes on from its last checkpoint when it is started again")
    return GO_ON


def _starts(run: Path, job: str) -> list[Incarnation]:
    return [i for i in list_incarnations(run) if i.start().get("job") == job]


def _note(run: Path, job: str, failure: Failure) -> bool:
    """Leave it as this start's end. One that ended before it took the run over gets an incarnation for that; but not
    where another job has the run: that one goes on."""
    mine = _starts(run, job)
    if not mine:
        newest = list_incarnations(run)[-1:]
        if any(not i.ended() and _number(i.start().get("job")) != _number(job) for i in newest):
            return False
        mine = [claim(run, {"job": job, "note": "ended before the run was begun"})]
    end = mine[-1].ended()
    # What others noted when a rank died tells when they noticed; the metrics tell the same each time.
    tokens = _last_tokens(run) if failure.died or not end else end["tokens_seen"]
    checkpoint = max((c.tokens for c in list_checkpoints(run)), default=None)
    mine[-1].correct_end("failed", failure.text, tokens, where=failure.where, mend=failure.mend, checkpoint=checkpoint)
    return True


def _failed_in_a_row(run: Path, job: str) -> list[dict[str, Any]]:
    """The ends of this job's last starts, as far as they failed, oldest first."""
    ends: list[dict[str, Any]] = []
    for incarnation in reversed(list_incarnations(run)):
        end = incarnation.ended()
        if _number(incarnation.start().get("job")) != _number(job) or end.get("outcome") != "failed":
            break
        ends.insert(0, end)
    return ends


def _number(job: Any) -> str:
    """The job itself, without its restarts."""
    return str(job).partition(".")[0]


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same words at the same token, whatever the ports, addresses and times in them."""
    words = [re.sub(r"0x[0-9a-f]+|\d+", "#", end["reason"]) for end in (one, other)]
    return words[0] == words[1] and one["tokens_seen"] == other["tokens_seen"]


def _failure(end: dict[str, Any], logs: Path) -> Failure:
    """A rank that died by a signal comes first: the others only noticed. Then the first that reported an error."""
    reports = list(_reports(logs))
    if death := _death(logs, bool(reports)):
        name = signal.Signals(-death.code).name if -death.code in set(signal.Signals) else f"signal {-death.code}"
        hint = " (out of memory, if nobody sent it)" if name == "SIGKILL" else ""
        log = _rank_log(logs, death.node, death.local_rank)
        return Failure(f"died of {name}{hint}", f"rank {death.rank} on {death.node}", log, died=True)
    if end.get("outcome") == "failed":
        where = f"rank {end.get('rank', '?')} on {end.get('host', '?')}"
        log = next((path for _, _, path in reports), None)
        return Failure(end["reason"], where, log, mend=bool(end.get("mend")))
    for rank, text, path in reports:
        return Failure(text, f"rank {rank}", path, mend="Traceback" not in path.read_text(errors="replace"))
    for left in sorted(_exits(logs)):
        log = _rank_log(logs, left.node, left.local_rank)
        if left.code > 0 and log is not None:
            return Failure("".join(_tail(log, 1)).strip(), f"rank {left.rank} on {left.node}", log)
    for path in sorted(logs.glob("*.torchrun.log")):
        for line in _tail(path, 1):
            return Failure(line.strip(), f"torchrun on {path.name.removesuffix('.torchrun.log')}", path)
    return Failure("the ranks ended without a word", "no rank")


class _Exit(NamedTuple):
    """How a rank ended, as torchrun has noted it."""

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
    """The first rank that a signal ended, unless that was torchrun's doing, or PyTorch's, because of another rank."""
    exits = sorted(set(_exits(logs)))
    brought_about = {signal.SIGTERM, *([signal.SIGABRT] if reported else [])}
    for rank in exits:
        if rank.code < 0 and -rank.code not in brought_about:
            earlier = any(other.code > 0 and rank.time - other.time > _AFTERMATH for other in exits)
            return None if earlier else rank
    return None


_REPORT = re.compile(r"^megagpt: error: (?:\[rank (\d+) of \d+\] )?(.*)", re.MULTILINE)


def _reports(logs: Path) -> Iterator[tuple[int, str, Path]]:
    """Rank, text and log of each error that a rank printed; the first one to fail is the only one that prints."""
    for path in sorted(logs.glob("*/*/attempt_*/*/stderr.log")):
        for rank, text in _REPORT.findall(path.read_text(errors="replace")):
            yield int(rank or 0), text, path


def _rank_log(logs: Path, node: str, local_rank: int) -> Path | None:
    return next(iter(sorted(logs.glob(f"{node}/*/attempt_*/{local_rank}/stderr.log"))), None)


def _summarize(failure: Failure, logs: Path, say: Callable[[str], Any]) -> None:
    """Say what failed, and leave it with the end of that rank's log in `logs`."""
    lines = [f"first to fail: {failure.where}: {failure.text}"]
    if failure.log is not None:
        lines.append(f"its log: {failure.log}")
    for line in lines:
        say(line)
    if failure.log is not None:
        lines += ["", *_tail(failure.log, _TAIL_LINES)]
    logs.mkdir(parents=True, exist_ok=True)
    write_atomic(logs / SUMMARY, ("\n".join(lines) + "\n").encode())


def _tail(path: Path, count: int) -> list[str]:
    with path.open(errors="replace") as file:
        return [line.rstrip("\n") for line in deque((line for line in file if line.strip()), count)]


def _last_tokens(run: Path) -> int:
    """The last position in the run's metrics."""
    path = run / "metrics.jsonl"
    if path.exists():
        for line in reversed(_tail(path, 5)):
            try:
                return int(json.loads(line)["tokens_seen"])
            except (ValueError, KeyError):
                continue
    return 0
