"""A checkpoint's folder: when it is whole, where a run keeps it, and which ones stay.

RUN/checkpoints/000000000524288/    named by tokens seen; while incarnation 3 writes it, with `.saving-3` behind
    __0_0.distcp, ...           fp32 weights and both Adam moments by name, a file from each rank
    .metadata                   which part of which tensor lies where
    meta.json                   position, config, engine, world size, versions, data fingerprint
    COMPLETE                    size and checksums of all of them; written last, when they are on the disk
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.checkpoints.storage import BLOCK_BYTES, CheckedReader, CorruptError, FileSum, check_size, sum_bytes
from megagpt.errors import UserError, first_line
from megagpt.files import write_atomic

MARKER = "COMPLETE"
META = "meta.json"
INDEX = ".metadata"
FORMAT = 2
SAVING = ".saving"
DAMAGED = ".damaged"
REMOVED = ".removed"
SHARE = "run.folder must be one that all hosts share"


@dataclass(frozen=True)
class Checkpoint:
    """A saved position of a run."""

    path: Path

    @property
    def tokens(self) -> int:
        return int(self.path.name)

    def sums(self) -> dict[str, FileSum]:
        """File name -> its checksums. Raises CorruptError where the marker is missing or not as it was written."""
        marker = self.path / MARKER
        try:
            tree = json.loads(marker.read_bytes())
            if tree and all(isinstance(size, int) for size in tree.values()):
                raise UserError(f"{self.path}: a checkpoint of format 1; this version reads {FORMAT}")
            checksum = tree.pop("checksum")
            if checksum != _checksum(tree):
                raise ValueError("wrong checksum")
            return {name: FileSum(**value) for name, value in tree["files"].items()}
        except FileNotFoundError:
            raise CorruptError(marker, "is missing") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptError(marker, f"is damaged ({first_line(error)})") from None

    def whole(self) -> tuple[dict[str, Any], dict[str, FileSum]]:
        """What stands in meta.json, and the checksums of all files.

        Raises CorruptError for a file that is missing or of another size, and for a damaged marker or meta.json: what
        can be told without reading all.
        """
        sums = self.sums()
        for name, expected in sums.items():
            check_size(self.path / name, expected)
        data = (self.path / META).read_bytes()
        if META not in sums or sum_bytes(data) != sums[META]:
            raise CorruptError(self.path / META, "is damaged (wrong checksum)")
        meta: dict[str, Any] = json.loads(data)
        if meta.get("format") != FORMAT:
            raise UserError(f"{self.path}: checkpoint format {meta.get('format')}, this version reads {FORMAT}")
        return meta, sums

    def meta(self) -> dict[str, Any]:
        """What stands in meta.json. Raises CorruptError as `whole` does."""
        return self.whole()[0]

    def problem(self) -> str | None:
        """Why this checkpoint is not whole, as far as can be told without reading all; None where it is."""
        try:
            self.whole()
        except (UserError, OSError) as error:
            return str(error)
        return None

    def check_file(self, name: str, progress: Callable[[int], Any] = lambda count: None) -> None:
        """Read a file of it against its checksums. `progress` is told of bytes read. Raises CorruptError."""
        sums = self.sums()
        if name in sums:  # all but the marker itself
            self._read(name, sums[name], progress)

    def _read(self, name: str, expected: FileSum, progress: Callable[[int], Any]) -> None:
        buffer = bytearray(BLOCK_BYTES)
        with CheckedReader(self.path / name, expected) as file:
            while count := file.readinto(buffer):
                progress(count)

    def verify(self, progress: Callable[[int], Any] = lambda count: None) -> list[str]:
        """Read all of it; what is wrong, file by file. `progress` is told of bytes read."""
        try:
            sums = self.sums()
        except CorruptError as error:
            return [str(error)]
        problems = []
        for name, expected in sums.items():
            try:
                self._read(name, expected, progress)
            except CorruptError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{self.path / name} cannot be read ({first_line(error)})")
        return problems

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(s.size for s in self.sums().values())

    def complete(
        self, saving: Path, meta: dict[str, Any], sums: dict[str, FileSum], fence: Callable[[], Any] = lambda: None
    ) -> None:
        """Make the folder `saving`, whose files are on the disk, this checkpoint. Raises UserError where one is not,
        and what `fence` raises where another has taken over."""
        fence()
        for name, expected in sums.items():
            try:
                check_size(saving / name, expected)
            except CorruptError as error:
                raise UserError(f"{error} for the main rank: {SHARE}") from None
        data = json.dumps(meta, indent=1).encode()
        write_atomic(saving / META, data)
        files = {name: dataclasses.asdict(s) for name, s in sorted({**sums, META: sum_bytes(data)}.items())}
        _flush_folder(saving)
        marker = {"files": files}
        write_atomic(saving / MARKER, json.dumps({**marker, "checksum": _checksum(marker)}).encode())
        _flush_folder(saving)
        fence()
        try:
            saving.rename(self.path)  # never over one that is there
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            fence()
            self.remove()
            saving.rename(self.path)
        _flush_folder(self.path.parent)

    def remove(self) -> None:
        """It loses its name first: a removal that is cut off, or delayed by others' open files, leaves none that looks
        whole."""
        gone = self.path.with_name(self.path.name + REMOVED)
        shutil.rmtree(gone, ignore_errors=True)
        self.path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def set_aside(self) -> Path:
        """Rename a damaged checkpoint, so that none takes it for a whole one; where the disk does not let us, leave
        it. Returns where it is."""
        aside = self.path.with_name(self.path.name + DAMAGED)
        while aside.exists():  # an earlier one of this position
            aside = aside.with_name(aside.name + DAMAGED)
        try:
            return self.path.rename(aside)
        except OSError:
            return self.path


def _checksum(tree: dict[str, Any]) -> str:
    return sum_bytes(json.dumps(tree, sort_keys=True).encode()).blocks[0]


def _flush_folder(folder: Path) -> None:
    """Names of files are on the disk when their folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def at_tokens(run: Path, tokens: int) -> Checkpoint:
    """The run's checkpoint of that position, there or not yet."""
    return Checkpoint(checkpoints_folder(run) / f"{tokens:015d}")


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """All of a run's checkpoints, whole or not, oldest first."""
    folder = checkpoints_folder(run)
    if not folder.is_dir():
        return []
    return sorted((Checkpoint(p) for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda c: c.tokens)


def newest_complete(run: Path, say: Callable[[str], Any]) -> Checkpoint | None:
    """The newest whole checkpoint, as far as file sizes tell; each newer one that is not whole is said, and why."""
    for checkpoint in reversed(list_checkpoints(run)):
        problem = checkpoint.problem()
        if problem is None:
            return checkpoint
        say(f"skipping {checkpoint.path.name}: {problem}")
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of a checkpoint, not of a run."""
    path = path.resolve()
    return path.is_dir() and path.name.isdigit() and path.parent.name == "checkpoints"


def find_checkpoint(path: Path, say: Callable[[str], Any]) -> Checkpoint:
    """A checkpoint's own folder, or a run's newest whole one. Raises UserError where there is none."""
    if is_checkpoint(path):
        checkpoint = Checkpoint(path.resolve())
        checkpoint.whole()
        return checkpoint
    newest = newest_complete(path, say)
    if newest is None:
        raise UserError(f"{path}: has no whole checkpoint")
    return newest


def saving_folder(checkpoint: Checkpoint, incarnation: int) -> Path:
    """Where a checkpoint is written. Each incarnation of a run has its own: a rank that was left over from an older
    one cannot write into it."""
    return checkpoint.path.with_name(f"{checkpoint.path.name}{SAVING}-{incarnation}")


def rotate(run: Path, newest: Checkpoint, keep: int) -> None:
    """After `newest` was saved: of the interval checkpoints up to it, leave the last `keep`. Milestones stay, and
    what is not whole is left for people to look at."""
    interval = []
    for checkpoint in list_checkpoints(run):
        with contextlib.suppress(UserError, OSError):
            if checkpoint.tokens <= newest.tokens and not checkpoint.meta()["milestone"]:
                interval.append(checkpoint)
    for checkpoint in interval[:-keep]:
        if checkpoint != newest:
            with contextlib.suppress(OSError):  # it stays until the next time
                checkpoint.remove()


def remove_unfinished(run: Path, incarnation: int) -> None:
    """Remove what saves and removals that were cut off have left, up to those of an incarnation."""
    left = list(checkpoints_folder(run).glob(f"*{REMOVED}"))
    for path in checkpoints_folder(run).glob(f"*{SAVING}*"):
        number = path.name.partition(f"{SAVING}-")[2]  # none: of a version that had no incarnations
        if not number.isdigit() or int(number) <= incarnation:
            left.append(path)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def damaged(run: Path) -> list[Path]:
    """The run's damaged checkpoints that were set aside."""
    return sorted(checkpoints_folder(run).glob(f"*{DAMAGED}"))
