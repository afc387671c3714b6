"""Lists, finds and rotates a run's checkpoints."""

import contextlib
import shutil
from pathlib import Path

from megagpt.checkpoints.checkpoint import CORRUPT, REMOVED, SAVING, Checkpoint, OpenCheckpoint
from megagpt.console import warn
from megagpt.errors import ExpectedError, UserError

# The suffix of a quarantined checkpoint up to version 0.1.
_OLD_CORRUPT = ".damaged"


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def at_tokens(run: Path, tokens: int) -> Checkpoint:
    """The run's checkpoint of that position, which need not exist yet."""
    return Checkpoint(checkpoints_folder(run) / f"{tokens:015d}")


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """All of a run's checkpoints, complete or not, oldest first."""
    folder = checkpoints_folder(run)
    if not folder.is_dir():
        return []
    return sorted((Checkpoint(p) for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda c: c.tokens)


def newest_complete(run: Path) -> OpenCheckpoint | None:
    """The newest checkpoint that is complete by its file sizes. Newer ones are named on stderr with their problem."""
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            return checkpoint.open()
        except (ExpectedError, OSError) as error:
            warn(f"skipping {checkpoint.path.name}: {error}")
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint's, not a run's."""
    path = path.resolve()
    return path.is_dir() and path.name.isdigit() and path.parent.name == "checkpoints"


def find_checkpoint(path: Path) -> OpenCheckpoint:
    """A checkpoint by its own folder, or a run's newest complete one. Raises UserError if there is none."""
    if is_checkpoint(path):
        return Checkpoint(path.resolve()).open()
    if (newest := newest_complete(path)) is None:
        raise UserError(f"{path}: has no complete checkpoint")
    return newest


def saving_folder(checkpoint: Checkpoint, incarnation: int) -> Path:
    """The folder into which a checkpoint is written. Each incarnation of a run has its own, so that a rank that was
    left over from an older one cannot write into it."""
    return checkpoint.path.with_name(f"{checkpoint.path.name}{SAVING}-{incarnation}")


class Rotation:
    """Keeps a run's newest interval checkpoints. It reads the existing ones when it is made, and none of them again."""

    def __init__(self, run: Path, keep_last: int) -> None:
        self._keep_last = keep_last
        self._interval = [c for c in list_checkpoints(run) if _counts(c)]

    def saved(self, newest: Checkpoint, milestone: bool) -> None:
        """To be called after a save: removes all interval checkpoints up to `newest` except the last `keep_last`.
        Milestones stay, and so do incomplete checkpoints, for people to look at."""
        self._interval = [c for c in self._interval if c != newest]
        if not milestone:
            self._interval.append(newest)
        up_to_newest = sorted((c for c in self._interval if c.tokens <= newest.tokens), key=lambda c: c.tokens)
        for checkpoint in up_to_newest[: -self._keep_last]:
            with contextlib.suppress(OSError):  # it stays until the next time
                checkpoint.remove()
                self._interval.remove(checkpoint)


def _counts(checkpoint: Checkpoint) -> bool:
    """Whether rotation may remove a checkpoint: it is complete, and it is no milestone."""
    with contextlib.suppress(ExpectedError, OSError, ValueError):
        return not checkpoint.is_milestone() and checkpoint.open() is not None
    return False


def remove_unfinished(run: Path, incarnation: int) -> None:
    """Remove what interrupted saves and removals left, of this incarnation and of older ones."""
    folder = checkpoints_folder(run)
    for path in [*folder.glob(f"*{REMOVED}"), *folder.glob(f"*{SAVING}*")]:
        number = path.name.partition(f"{SAVING}-")[2]  # empty for removals, and before there were incarnations
        if not number.isdigit() or int(number) <= incarnation:
            shutil.rmtree(path, ignore_errors=True)


def quarantined(run: Path) -> list[Path]:
    """The run's corrupt checkpoints that were renamed."""
    folder = checkpoints_folder(run)
    return sorted([*folder.glob(f"*{CORRUPT}"), *folder.glob(f"*{_OLD_CORRUPT}")])
