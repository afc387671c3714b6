"""A checkpoint's folder: when it is whole, where a run keeps it, and which ones stay.

RUN/checkpoints/000000524288/   named by tokens seen; while it is written, with `.saving` behind the name
    __0_0.distcp, ...           fp32 weights and both Adam moments by name, a file from each rank
    .metadata                   which part of which tensor lies where
    meta.json                   position, config, engine, world size, versions, data fingerprint
    COMPLETE                    size and checksums of all of them; written last, when they are on the disk
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.checkpoints.storage import BLOCK_BYTES, CheckedReader, DamagedError, FileSum, sum_bytes
from megagpt.data.shards import write_atomic
from megagpt.errors import UserError, first_line

MARKER = "COMPLETE"
META = "meta.json"
INDEX = ".metadata"
FORMAT = 2
SAVING = ".saving"
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Checkpoint:
    """A saved position of a run."""

    path: Path

    @property
    def tokens(self) -> int:
        return int(self.path.name)

    def sums(self) -> dict[str, FileSum]:
        """File name -> its checksums. Raises DamagedError where the marker is missing or not as it was written."""
        try:
            tree = json.loads((self.path / MARKER).read_bytes())
            checksum = tree.pop("checksum")
            if checksum != _checksum(tree):
                raise ValueError("wrong checksum")
            return {name: FileSum(**value) for name, value in tree["files"].items()}
        except FileNotFoundError:
            raise DamagedError(f"{self.path / MARKER} is missing") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(f"{self.path / MARKER} is damaged ({first_line(error)})") from None

    def check_sizes(self) -> None:
        """Raises DamagedError for a file that is missing or of another size: what can be told without reading all."""
        for name, expected in self.sums().items():
            CheckedReader(self.path / name, expected).close()

    def problem(self) -> str | None:
        """Why this checkpoint is not whole, as far as file sizes tell; None where they are right."""
        try:
            self.check_sizes()
            self.meta()
        except (UserError, OSError) as error:
            return str(error)
        return None

    def check_index(self) -> None:
        """Raises DamagedError where `.metadata` is not what was written: PyTorch hides what its reader raises there."""
        with CheckedReader(self.path / INDEX, self.sums()[INDEX]) as file:
            while file.read(BLOCK_BYTES):
                pass

    def verify(self, progress: Callable[[int], Any] = lambda count: None) -> list[str]:
        """Read all of it; what is wrong, file by file. `progress` is told of bytes read."""
        try:
            sums = self.sums()
        except DamagedError as error:
            return [str(error)]
        problems = []
        buffer = bytearray(BLOCK_BYTES)
        for name, expected in sums.items():
            try:
                with CheckedReader(self.path / name, expected) as file:
                    while count := file.readinto(buffer):
                        progress(count)
            except DamagedError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{self.path / name} cannot be read ({first_line(error)})")
        return problems

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(s.size for s in self.sums().values())

    def meta(self) -> dict[str, Any]:
        """What stands in meta.json. Raises DamagedError where it is not as it was written."""
        sums = self.sums()
        try:
            data = (self.path / META).read_bytes()
        except OSError as error:
            raise DamagedError(f"{self.path / META}: not readable ({first_line(error)})") from None
        if META not in sums or sum_bytes(data) != sums[META]:
            raise DamagedError(f"{self.path / META} is damaged (wrong checksum)")
        meta: dict[str, Any] = json.loads(data)
        if meta.get("format") != FORMAT:
            raise UserError(f"{self.path}: checkpoint format {meta.get('format')}, this version reads {FORMAT}")
        return meta

    def complete(self, saving: Path, meta: dict[str, Any], sums: dict[str, FileSum]) -> None:
        """Make the folder `saving`, whose files are on the disk, this checkpoint."""
        data = json.dumps(meta, indent=1).encode()
        write_atomic(saving / META, data)
        files = {name: dataclasses.asdict(s) for name, s in sorted({**sums, META: sum_bytes(data)}.items())}
        _flush_folder(saving)
        marker = {"files": files}
        write_atomic(saving / MARKER, json.dumps({**marker, "checksum": _checksum(marker)}).encode())
        _flush_folder(saving)
        if self.path.exists():
            self.remove()
        saving.rename(self.path)
        _flush_folder(self.path.parent)

    def remove(self) -> None:
        # Marker first: a removal that is cut off leaves no checkpoint that looks whole.
        (self.path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(self.path)

    def set_aside(self) -> Path:
        """Rename a damaged checkpoint, so that none takes it for a whole one; where the disk does not let us, leave
        it. Returns where it is."""
        aside = self.path.with_name(self.path.name + DAMAGED)
        try:
            shutil.rmtree(aside, ignore_errors=True)
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


def newest_whole(run: Path, say: Callable[[str], Any]) -> Checkpoint | None:
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
        checkpoint.check_sizes()
        return checkpoint
    newest = newest_whole(path, say)
    if newest is None:
        raise UserError(f"{path}: has no whole checkpoint")
    return newest


def rotate(run: Path, newest: Checkpoint, keep: int) -> None:
    """After `newest` was saved: of the interval checkpoints up to it, leave the last `keep`. Milestones stay, and
    what is not whole is left for people to look at."""
    interval = []
    for checkpoint in list_checkpoints(run):
        if checkpoint.tokens <= newest.tokens and checkpoint.problem() is None and not checkpoint.meta()["milestone"]:
            interval.append(checkpoint)
    for checkpoint in interval[:-keep]:
        if checkpoint != newest:
            checkpoint.remove()


def remove_unfinished(run: Path) -> None:
    """Remove what saves that were cut off have left."""
    for path in checkpoints_folder(run).glob(f"*{SAVING}"):
        shutil.rmtree(path, ignore_errors=True)
