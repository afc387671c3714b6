"""A run's starts, numbered. The newest may write; whoever is older has been replaced and must not.

RUN/incarnations/000003.json        a start: when, where, by which command, with which versions
RUN/incarnations/000003.end.json    how it ended: finished, stopped by a signal, or failed at which token

A batch system may start a job again while ranks of its last start still run: on a node that it has lost sight of, or
behind a broken link. They see the shared folder long before anyone can end them.
"""

import contextlib
import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.errors import ExpectedError
from megagpt.files import write_atomic


class Superseded(ExpectedError):
    """A newer incarnation has taken the run over."""


@dataclass(frozen=True)
class Incarnation:
    """One start of a run."""

    run: Path
    number: int
    """From 1."""

    @property
    def _path(self) -> Path:
        return _folder(self.run) / f"{self.number:06d}.json"

    @property
    def _end_path(self) -> Path:
        return self._path.with_suffix(".end.json")

    def start(self) -> dict[str, Any]:
        """What it said of itself when it started."""
        return _read(self._path)

    def ended(self) -> dict[str, Any]:
        """`outcome`, `reason`, `tokens_seen`, ...; empty while it runs, and where it had no time to say."""
        return _read(self._end_path)

    def is_superseded(self) -> bool:
        """Whether a newer one has started. Raises OSError."""
        return max((i.number for i in list_incarnations(self.run)), default=0) > self.number

    def check(self) -> None:
        """Raises Superseded where a newer one has started."""
        # Something new in it makes a network file system list the folder afresh.
        (_folder(self.run) / f".fence-{self.number}").touch()
        newest = max(list_incarnations(self.run), key=lambda i: i.number, default=self)
        if newest.number > self.number:
            start = newest.start()
            where = " ".join(str(start[key]) for key in ("host", "job", "started") if start.get(key))
            raise Superseded(
                f"{self.run}: incarnation {newest.number} ({where}) has taken this run over; incarnation {self.number} "
                "ends and writes nothing more"
            )

    def end(self, outcome: str, reason: str, tokens_seen: int, **more: Any) -> None:
        """Note how it ended, unless that was noted before: the first to say so knows best. Never raises: whoever ends
        has something more important to say."""
        values = {"outcome": outcome, "reason": reason, "tokens_seen": tokens_seen, "ended": _now(), **more}
        with contextlib.suppress(OSError):
            _create(self._end_path, values)

    def correct_end(self, outcome: str, reason: str, tokens_seen: int, **more: Any) -> None:
        """Note it again, by someone who knows better."""
        values = {"outcome": outcome, "reason": reason, "tokens_seen": tokens_seen, "ended": _now(), **more}
        write_atomic(self._end_path, json.dumps(values, indent=1).encode())


def claim(run: Path, description: dict[str, Any]) -> Incarnation:
    """Begin the next incarnation: from here on, `check` of each older one raises. Raises OSError."""
    folder = _folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        number = max((i.number for i in list_incarnations(run)), default=0) + 1
        mine = Incarnation(run, number)
        try:
            _create(mine._path, {"incarnation": number, "started": _now(), **description})
            return mine
        except FileExistsError:  # another start was quicker
            continue


def list_incarnations(run: Path) -> list[Incarnation]:
    """All of a run's, oldest first."""
    names = [path.stem for path in _folder(run).iterdir()] if _folder(run).is_dir() else []
    return sorted((Incarnation(run, int(name)) for name in names if name.isdigit()), key=lambda i: i.number)


def _folder(run: Path) -> Path:
    return run / "incarnations"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _create(path: Path, values: dict[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(values, file, indent=1)


def _read(path: Path) -> dict[str, Any]:
    """Empty where it is missing, or cut off by the death of who wrote it."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    except (FileNotFoundError, ValueError):
        return {}
