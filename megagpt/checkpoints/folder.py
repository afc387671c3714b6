"""Lists, finds and rotates a run's checkpoints."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from megagpt.checkpoints.checkpoint import ABANDONED, CORRUPT, REMOVED, SAVING, Checkpoint, OpenCheckpoint
from megagpt.console import warn
from megagpt.errors import ExpectedError, UserError, disk_reason

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
    doubtful = newest.meta.skipped_in_a_row and not newest.checkpoint.is_proven
    if doubtful and (good := newest_good(path, newest.meta.bad_since)):
        warn(f"{newest.path.name} was saved while updates were skipped; using {good.path.name}, the last good one")
        return good
    return newest


def saving_folder(checkpoint: Checkpoint, incarnation: int) -> Path:
    """The folder into which a checkpoint is written. Each incarnation of a run has its own, so that a rank that was
    left over from an older one cannot write into it."""
    return checkpoint.path.with_name(f"{checkpoint.path.name}{SAVING}-{incarnation}")


class Rotation:
    """Keeps a run's last interval checkpoints. Only proven ones count: from those a later step was finite. It reads
    the checkpoints that are there once, and no old one after that."""

    def __init__(self, run: Path, keep_last: int) -> None:
        self._keep_last = keep_last
        self._proven: list[Checkpoint] = []
        self._unproven: list[tuple[Checkpoint, bool]] = []
        for checkpoint in list_checkpoints(run):
            with contextlib.suppress(ExpectedError, OSError, ValueError):  # it is not complete: rotation leaves it
                milestone = checkpoint.is_milestone()
                checkpoint.open()
                if not checkpoint.is_proven:
                    self._unproven.append((checkpoint, milestone))
                elif not milestone:
                    self._proven.append(checkpoint)

    def saved(self, newest: Checkpoint, milestone: bool) -> None:
        """Note a save, which is unproven."""
        self._proven = [c for c in self._proven if c != newest]
        self._unproven = [(c, m) for c, m in self._unproven if c != newest] + [(newest, milestone)]

    def proved(self, tokens: int) -> None:
        """After a finite step from position `tokens`: the checkpoints up to it are proven. Of them, leave the last
        `keep_last`. Milestones stay, and so do incomplete checkpoints, for people to look at."""
        for checkpoint, milestone in [(c, m) for c, m in self._unproven if c.tokens <= tokens]:
            with contextlib.suppress(OSError):  # it stays unproven until the next time
                checkpoint.prove()
                self._unproven.remove((checkpoint, milestone))
                if not milestone:
                    self._proven.append(checkpoint)
        up_to_now = sorted((c for c in self._proven if c.tokens <= tokens), key=lambda c: c.tokens)
        for checkpoint in up_to_now[: -self._keep_last]:
            with contextlib.suppress(OSError):  # it stays until the next time
                checkpoint.remove()
                self._proven.remove(checkpoint)


def newest_good(run: Path, before_tokens: int) -> OpenCheckpoint | None:
    """The newest complete checkpoint before a position that is proven; None if there is none."""
    for checkpoint in reversed(list_checkpoints(run)):
        with contextlib.suppress(ExpectedError, OSError):
            if checkpoint.tokens < before_tokens and checkpoint.is_proven:
                return checkpoint.open()
    return None


def abandon(run: Path, doubtful: Callable[[Checkpoint], bool]) -> list[Path]:
    """Rename the checkpoints that are doubtful; returns their new paths, oldest first. Raises UserError."""
    try:
        return [checkpoint.abandon() for checkpoint in list_checkpoints(run) if doubtful(checkpoint)]
    except OSError as error:
        problem = f"a checkpoint from which the run does not continue cannot be renamed: {disk_reason(error)}"
        raise UserError(f"{checkpoints_folder(run)}: {problem}") from None


def remove_unfinished(run: Path, incarnation: int) -> None:
    """Remove what interrupted saves and removals left, of this incarnation and of older ones."""
    folder = checkpoints_folder(run)
    for path in [*folder.glob(f"*{REMOVED}"), *folder.glob(f"*{SAVING}*")]:
        number = path.name.partition(f"{SAVING}-")[2]  # empty for removals, and before there were incarnations
        if not number.isdigit() or int(number) <= incarnation:
            shutil.rmtree(path, ignore_errors=True)


def renamed(run: Path) -> list[Path]:
    """The run's checkpoints that are quarantined or abandoned."""
    folder = checkpoints_folder(run)
    return sorted(path for suffix in (CORRUPT, _OLD_CORRUPT, ABANDONED) for path in folder.glob(f"*{suffix}"))
