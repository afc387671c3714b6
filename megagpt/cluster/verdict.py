"""After the ranks of a job have ended: who failed first and why, and whether the job should go on."""

import json
import re
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.config import Config
from megagpt.data.shards import write_atomic
from megagpt.incarnations import Incarnation, claim, list_incarnations

GO_ON = 75
STOP = 1
SUMMARY = "first_error.txt"
_TAIL_LINES = 30


@dataclass(frozen=True)
class Failure:
    """The first rank that failed."""

    text: str
    where: str
    """Rank and node, as far as they are known."""
    log: Path | None
    died: bool
    """By a signal that nobody sent for the sake of another rank's failure: out of memory, a crash."""
    mend: bool
    """Something to mend, which would fail again."""


def is_finished(run: Path, config: Config) -> bool:
    """Whether the run has got to the end that the config wants."""
    ends = [incarnation.ended() for incarnation in list_incarnations(run)]
    return any(e.get("outcome") == "finished" and e["tokens_seen"] >= config.train.tokens for e in ends)


def judge(run: Path, config: Config, job: str, logs: Path, say: Callable[[str], Any]) -> int:
    """What the job should do now: 0, it is done; GO_ON, start again; STOP, fail.

    `job`: ID.RESTARTS of this start; `logs`: where its ranks' logs are. What stopped the ranks is said, and left there.
    Exit codes are not asked: torchrun and srun make their own of them.
    """
    if is_finished(run, config):
        return 0
    mine = [i for i in list_incarnations(run) if i.start().get("job") == job]
    end = mine[-1].ended() if mine else {}
    if end.get("outcome") == "stopped":
        if end["reason"] == "SIGINT":
            say("stopped by SIGINT, which is Ctrl-C: the job ends here; submit it again to go on")
            return STOP
        say(f"stopped by {end['reason']} and saved: the job goes on when it is started again")
        return GO_ON
    failure = _failure(end, logs)
    # What others noted when a rank died tells when they noticed; the metrics tell the same each time.
    tokens = _last_tokens(run) if failure.died or not end else end["tokens_seen"]
    _summarize(failure, logs, say)
    incarnation = mine[-1] if mine else claim(run, {"job": job, "note": "ended before the run was begun"})
    incarnation.correct_end("failed", failure.text, tokens, where=failure.where, mend=failure.mend)
    if failure.mend:
        say("that has to be mended first: the job ends here; submit it again to go on")
        return STOP
    before = _failed_before(run, job, incarnation)
    if before and _alike(before, incarnation.ended()):
        say(f"it failed in the same way at the same step before, at {tokens:,} tokens: the job ends here")
        return STOP
    say("the job goes on from its last checkpoint when it is started again")
    return GO_ON


def _failed_before(run: Path, job: str, now: Incarnation) -> dict[str, Any]:
    """How the start before ended, if it was one of this job and failed."""
    number = job.partition(".")[0]
    earlier = [i for i in list_incarnations(run) if i.number < now.number]
    if not earlier or str(earlier[-1].start().get("job")).partition(".")[0] != number:
        return {}
    end = earlier[-1].ended()
    return end if end.get("outcome") == "failed" else {}


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same words at the same token, whatever the ports, addresses and times in them."""
    words = [re.sub(r"\d+", "#", end["reason"]) for end in (one, other)]
    return words[0] == words[1] and one["tokens_seen"] == other["tokens_seen"]


def _failure(end: dict[str, Any], logs: Path) -> Failure:
    """A rank that died by a signal comes first: the others only noticed. Then the first that reported an error."""
    died = sorted(_deaths(logs))
    if died:
        _, rank, host, number = died[0]
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        hint = " (out of memory, if nobody sent it)" if name == "SIGKILL" else ""
        return Failure(f"died of {name}{hint}", f"rank {rank} on {host}", _rank_log(logs, host), True, False)
    reports = list(_reports(logs))
    if end.get("outcome") == "failed":
        where = f"rank {end.get('rank', '?')} on {end.get('host', '?')}"
        log = next((path for _, _, path in reports), None)
        return Failure(end["reason"], where, log, False, bool(end.get("mend")))
    for rank, text, path in reports:
        return Failure(text, f"rank {rank}", path, False, "Traceback" not in path.read_text(errors="replace"))
    agents = sorted(logs.glob("*.torchrun.log"))
    last = [(path, line) for path in agents for line in _tail(path, 1)]
    if last:
        return Failure(last[0][1].strip(), f"torchrun on {last[0][0].name.partition('.')[0]}", last[0][0], False, False)
    return Failure("the ranks ended without a word", "no rank", None, False, False)


_DEATH = re.compile(
    r"time\s*: (?P<time>\S+)\n\s*host .*\n\s*rank\s*: (?P<rank>\d+) .*\n\s*exitcode\s*: -(?P<signal>\d+) "
)


def _deaths(logs: Path) -> Iterator[tuple[str, int, str, int]]:
    """Time, rank, node and signal of each rank that a signal ended, but for torchrun's own SIGTERM."""
    for path in logs.glob("*.torchrun.log"):
        node = path.name.removesuffix(".torchrun.log")
        for found in _DEATH.finditer(path.read_text(errors="replace")):
            if int(found["signal"]) != signal.SIGTERM:
                yield found["time"], int(found["rank"]), node, int(found["signal"])


_REPORT = re.compile(r"^megagpt: error: \[rank (\d+) of \d+\] (.*)", re.MULTILINE)


def _reports(logs: Path) -> Iterator[tuple[int, str, Path]]:
    """Rank, text and log of each error that a rank printed; the first one to fail is the only one that prints."""
    for path in sorted(logs.glob("*/*/attempt_*/*/stderr.log")):
        for rank, text in _REPORT.findall(path.read_text(errors="replace")):
            yield int(rank), text, path


def _rank_log(logs: Path, node: str) -> Path | None:
    return next(iter(sorted(logs.glob(f"{node}/*/attempt_*/*/stderr.log"))), None)


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
