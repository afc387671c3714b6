"""A run's incarnations: its starts, numbered from 1. Each is a process group that began to train; the newest may write.

RUN/incarnations/000003.json        how it began: when, on which host, by which command, with which versions
RUN/incarnations/000003.end.json    how it ended: finished, stopped by a signal, or failed at which token

A batch system may start a job again while ranks of its last incarnation still run: on a node that it has lost contact
with, or behind a broken link. Such ranks see the newer incarnation's file long before anyone can end them."""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.errors import ExpectedError
from megagpt.files import create_json, now, read_json, write_atomic

# Seconds between two looks for a newer incarnation: cheap for a shared file system, soon enough for people.
_LOOK_SECONDS = 5.0


class Superseded(ExpectedError):
    """A newer incarnation has taken the run over."""


@dataclass(frozen=True, order=True)
class Incarnation:
    """One of a run's incarnations. A newer one is greater."""

    run: Path
    number: int
    """From 1."""

    def _file(self, ending: str) -> Path:
        return _folder(self.run) / f"{self.number:06d}{ending}"

    def start(self) -> dict[str, Any]:
        """The facts that were written when it began."""
        return read_json(self._file(".json"))

    def ended(self) -> dict[str, Any]:
        """`outcome`, `reason`, `tokens_seen`, `retry`, ...; empty while it runs, and if it had no time to write."""
        end = read_json(self._file(".end.json"))
        if "mend" in end:  # up to version 0.1
            end["retry"] = not end.pop("mend")
        return end

    def is_superseded(self) -> bool:
        """Whether a newer one has begun. Raises OSError."""
        return self < max(list_incarnations(self.run), default=self)

    def check(self) -> None:
        """Raises Superseded if a newer one has begun."""
        # A new file in the folder makes a network file system list it again.
        (_folder(self.run) / f".fence-{self.number}").touch()
        newest = max(list_incarnations(self.run), default=self)
        if self < newest:
            start = newest.start()
            where = " ".join(str(start[key]) for key in ("host", "job", "started") if start.get(key))
            newer = f"incarnation {newest.number} ({where}) has taken this run over"
            raise Superseded(f"{self.run}: {newer}; incarnation {self.number} ends and writes nothing more")

    def end(self, outcome: str, reason: str, tokens_seen: int, **more: Any) -> None:
        """Record how it ended. The first writer wins: it is closest to the cause. Never raises, so nothing hides it."""
        with contextlib.suppress(OSError):
            create_json(self._file(".end.json"), _end(outcome, reason, tokens_seen, more))

    def correct_end(self, outcome: str, reason: str, tokens_seen: int, **more: Any) -> None:
        """Replace the record, for a caller who knows more than its writer. Raises OSError."""
        end = _end(outcome, reason, tokens_seen, more)
        write_atomic(self._file(".end.json"), json.dumps(end, indent=1).encode())


class Lease:
    """This process's hold on a run: the incarnation that it claimed, as long as no newer one has taken the run over."""

    def __init__(self, incarnation: Incarnation) -> None:
        self.incarnation = incarnation
        self._looked = time.monotonic()

    def lost(self) -> bool:
        """Whether a newer incarnation has begun; reads the disk every few seconds only, and never raises."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        with contextlib.suppress(OSError):  # a disk that does not answer now tells nothing
            return self.incarnation.is_superseded()
        return False


def claim(run: Path, facts: dict[str, Any]) -> Incarnation:
    """Begin the next incarnation: from here on, `check` of each older one raises. Raises OSError."""
    folder = _folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        number = max((i.number for i in list_incarnations(run)), default=0) + 1
        mine = Incarnation(run, number)
        try:
            create_json(mine._file(".json"), {"incarnation": number, "started": now(), **facts})
            return mine
        except FileExistsError:  # another process was quicker
            continue


def list_incarnations(run: Path) -> list[Incarnation]:
    """All of a run's, oldest first."""
    names = [path.stem for path in _folder(run).iterdir()] if _folder(run).is_dir() else []
    return sorted(Incarnation(run, int(name)) for name in names if name.isdigit())


def _folder(run: Path) -> Path:
    return run / "incarnations"


def _end(outcome: str, reason: str, tokens_seen: int, more: dict[str, Any]) -> dict[str, Any]:
    return {"outcome": outcome, "reason": reason, "tokens_seen": tokens_seen, "ended": now(), **more}
