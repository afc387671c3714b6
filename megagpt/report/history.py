"""A run's incarnations as a history: when, on which machines, how long, at what cost, and why each of them ended."""

import datetime
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.incarnations import Incarnation, list_incarnations
from megagpt.report.record import Record, number
from megagpt.training.run_folder import has_ended, last_written

_CPU = "cpu"


@dataclass(frozen=True)
class Chapter:
    """One incarnation."""

    number: int
    began: datetime.datetime | None
    ended: datetime.datetime | None
    """The end, or the last sign of life; None if nothing tells."""
    hosts: dict[str, int]
    """Host -> its ranks. Up to version 0.2.0 only the main rank's host is known: 0 ranks."""
    device: str
    ranks: int
    """0 if it is unknown."""
    engine: str
    versions: str
    from_tokens: int
    to_tokens: int | None
    """The position that it reached; None if nothing tells: a killed incarnation's last steps are taken again."""
    outcome: str
    """finished, stopped, failed, killed, running, or "running, or killed"."""
    reason: str

    @property
    def seconds(self) -> float | None:
        if self.began is None or self.ended is None:
            return None
        return (self.ended - self.began).total_seconds()

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all its GPUs; None if its time is unknown; 0 without GPUs."""
        if self.device == _CPU or not self.ranks:
            return 0.0
        return None if self.seconds is None else self.seconds * self.ranks / 3600

    @property
    def machines(self) -> str:
        """`8 x NVIDIA H100 80GB HBM3 on n1`."""
        devices = f"{self.ranks} x {self.device}" if self.ranks else self.device
        names = list(self.hosts)
        more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
        return f"{devices} on {', '.join(names[:4])}{more}" if names else devices


def read_history(run: Path, record: Record) -> list[Chapter]:
    """The incarnations, oldest first; those of version 0.1 have fewer facts."""
    found = list_incarnations(run)
    starts = [incarnation.start() for incarnation in found]
    followers: list[dict[str, Any] | None] = [*starts[1:], None]
    return [
        _chapter(run, record, incarnation, start, follower)
        for incarnation, start, follower in zip(found, starts, followers, strict=False)
    ]


def _chapter(
    run: Path, record: Record, incarnation: Incarnation, start: dict[str, Any], follower: dict[str, Any] | None
) -> Chapter:
    """`follower`: the facts of the next incarnation, if there is one."""
    end, began = incarnation.ended(), _time(start.get("started"))
    from_tokens = _whole(start.get("from_tokens")) or 0
    ended = _time(end.get("ended"))
    reached = _whole(end.get("tokens_seen"))
    if end:
        outcome, reason = str(end.get("outcome", "?")), str(end.get("reason", ""))
    elif follower is not None:
        outcome, reason = "killed", "it left no record of its end"
        ended = _time(follower.get("previous_seen"))
    else:
        gone = has_ended(start)
        outcome = "killed" if gone else "running"
        reason = "it left no record of its end" if gone else ""
        if gone is None:
            outcome, reason = "running, or killed", "its process cannot be seen from this machine"
        ended = _time(last_written(run))
        reached = max(record.reached, from_tokens)
    if began and ended and ended < began:  # it wrote nothing: the last line is of an earlier incarnation
        ended = None
    hosts = start.get("hosts") or ({start["host"]: 0} if start.get("host") else {})
    versions = [f"{name} {start[name]}" for name in ("megagpt", "torch", "python") if start.get(name)]
    return Chapter(
        incarnation.number, began, ended, hosts if isinstance(hosts, dict) else {},
        str(start.get("device") or "unknown device"), _whole(start.get("world_size")) or 0,
        str(start.get("engine") or start.get("note") or "?"), ", ".join(versions),
        from_tokens, reached, outcome, reason,
    )  # fmt: skip


def _time(value: Any) -> datetime.datetime | None:
    try:
        if isinstance(value, float):
            return datetime.datetime.fromtimestamp(value, datetime.UTC)
        found = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError, OverflowError, OSError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


def _whole(value: Any) -> int | None:
    found = number(value)
    return int(found) if math.isfinite(found) else None


@dataclass(frozen=True)
class Bill:
    """Time and cost of a whole run."""

    elapsed: float
    """Seconds of all incarnations whose time is known."""
    gpu_hours: float
    dollars: float | None
    """None without a price, and without GPUs; 0 if no GPU's time is known."""
    complete: bool
    """Whether the time of every incarnation is known; else the numbers are lower bounds."""


def bill(chapters: list[Chapter], dollars_per_gpu_hour: float | None = None) -> Bill:
    """All incarnations together, with what kills and failures have lost."""
    hours = sum(chapter.gpu_hours or 0.0 for chapter in chapters)
    elapsed = sum(chapter.seconds or 0.0 for chapter in chapters)
    has_gpus = any(chapter.gpu_hours != 0 for chapter in chapters)
    dollars = hours * dollars_per_gpu_hour if dollars_per_gpu_hour is not None and has_gpus else None
    return Bill(elapsed, hours, dollars, all(chapter.seconds is not None for chapter in chapters))
