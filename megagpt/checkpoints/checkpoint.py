"""One checkpoint on disk: its folder, its marker of completeness, and its description.

RUN/checkpoints/000000000524288/    named by tokens seen; while incarnation 3 writes it, with the suffix `.saving-3`
    __0_0.distcp, ...           fp32 weights and both Adam moments by name, a file from each rank
    .metadata                   the place of each part of each tensor
    meta.json                   position, counters, config, engine, world size, versions, data fingerprints
    COMPLETE                    size and checksums of all of them; written last, when they are on the disk
    UNPROVEN                    empty; removed after a later step was finite"""

import errno
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import megagpt
from megagpt.checkpoints.checksums import BLOCK_BYTES, CheckedReader, CorruptError, FileSum, check_size, sum_bytes
from megagpt.config_file import with_current_keys
from megagpt.errors import UserError, first_line
from megagpt.files import flush_folder, now, write_atomic
from megagpt.placement import layout

MARKER = "COMPLETE"
META = "meta.json"
INDEX = ".metadata"
FORMAT = 2
SAVING = ".saving"
CORRUPT = ".corrupt"
ABANDONED = ".abandoned"
UNPROVEN = "UNPROVEN"
REMOVED = ".removed"
SHARE = "run.folder must be one that all hosts share"

Progress = Callable[[int], Any]


def _versions() -> dict[str, str]:
    import torch  # only what saves needs it: status and launch read checkpoints without it

    deepspeed = importlib.metadata.version("deepspeed")
    python = platform.python_version()
    return {"megagpt": megagpt.__version__, "torch": torch.__version__, "deepspeed": deepspeed, "python": python}


@dataclass(frozen=True)
class CheckpointMeta:
    """The content of meta.json. It holds no random generator's state: initial weights, data order, dropout and samples
    are functions of the seed and the position."""

    tokens_seen: int
    sequences_seen: int
    step: int | None
    """Optimizer steps taken; None in checkpoints of version 0.1, which did not store it."""
    engine: str
    """Name of the engine that saved it, or "import"."""
    world_size: int
    config: dict[str, Any]
    """The run's whole config as plain values."""
    data: list[str] | None
    """Fingerprint of each source; None for imported weights."""
    scalars: dict[str, Any]
    """The engine's state that is not a tensor: `updates`, `loss_scale`."""
    milestone: bool = False
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    spikes_in_a_row: int = 0
    bad_since: int = 0
    """Tokens before the first of the updates skipped in a row: the weights may be bad since then."""
    spikes: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Those that train.spike compares the next one with."""
    compiled: bool | None = None
    """Whether blocks were compiled, which changes last digits; None: not stored."""
    saved: str = field(default_factory=now)
    versions: dict[str, str] = field(default_factory=_versions)

    @property
    def layout(self) -> str:
        """The ranks that saved it, with their groups of tensor ranks, in words."""
        engine = self.config.get("engine", {}) if self.engine != "import" else {}
        return layout(self.world_size, engine.get("tensor_ranks", 1))

    def to_json(self) -> bytes:
        """The content of the file, in which the scalars are keys beside the others."""
        tree = {"format": FORMAT, **asdict(self)}
        scalars = tree.pop("scalars")
        return json.dumps(tree | scalars, indent=1).encode()

    @staticmethod
    def from_json(data: bytes, where: Path) -> "CheckpointMeta":
        """Raises UserError for another format, and CorruptError if a key is missing."""
        tree = json.loads(data)
        if tree.pop("format", None) != FORMAT:
            raise UserError(f"{where.parent}: the checkpoint's format is not {FORMAT}, which this version reads")
        try:
            # Version 0.1 spelled some keys differently and stored fewer.
            tree["config"] = with_current_keys(tree["config"], str(where))
            if "samples_seen" in tree:
                tree["sequences_seen"] = tree.pop("samples_seen")
            tree.setdefault("step", None)
            scale = tree.setdefault("loss_scale", {})
            scale.setdefault("dynamic", tree["config"]["train"]["precision"] == "fp16" and "value" in scale)
            names = {f.name for f in fields(CheckpointMeta)}
            scalars = {key: value for key, value in tree.items() if key not in names}
            return CheckpointMeta(**{k: v for k, v in tree.items() if k in names}, scalars=scalars)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptError(where, f"lacks what a checkpoint stores ({first_line(error)})") from None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by its folder, which need not be complete."""

    path: Path

    @property
    def tokens(self) -> int:
        return int(self.path.name)

    def sums(self) -> dict[str, FileSum]:
        """File name -> its checksums. Raises CorruptError if the marker is missing or not as it was written."""
        marker = self.path / MARKER
        try:
            tree = json.loads(marker.read_bytes())
            if tree and all(isinstance(size, int) for size in tree.values()):
                raise UserError(f"{self.path}: a checkpoint of format 1; this version reads {FORMAT}")
            if tree.pop("checksum") != _checksum(tree):
                raise ValueError("wrong checksum")
            return {name: FileSum(**value) for name, value in tree["files"].items()}
        except FileNotFoundError:
            raise CorruptError(marker, "is missing") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptError(marker, f"is corrupt ({first_line(error)})") from None

    def open(self) -> "OpenCheckpoint":
        """Check everything that can be checked without reading the tensors: the marker, meta.json, each file's size.
        Raises CorruptError if any of them is not as it was written, UserError for another format, OSError."""
        sums = self.sums()
        for name, expected in sums.items():
            check_size(self.path / name, expected)
        data = (self.path / META).read_bytes()
        if META not in sums or sum_bytes(data) != sums[META]:
            raise CorruptError(self.path / META, "is corrupt (wrong checksum)")
        return OpenCheckpoint(self, CheckpointMeta.from_json(data, self.path / META), sums)

    def is_milestone(self) -> bool:
        """Reads only meta.json, which is small, and does not check it. Raises OSError, and ValueError if not JSON."""
        return bool(json.loads((self.path / META).read_bytes()).get("milestone"))

    @property
    def is_proven(self) -> bool:
        """Whether a later step was finite, so the weights are good. True for imported weights and for checkpoints of
        version 0.1, which did not note it. Raises OSError."""
        return not (self.path / UNPROVEN).exists()

    def prove(self) -> None:
        """Note that a later step was finite. Raises OSError."""
        (self.path / UNPROVEN).unlink(missing_ok=True)

    def verify(self, progress: Progress = lambda count: None) -> list[str]:
        """Compare all of it with its checksums; returns the problems, by file. `progress` is called with bytes read."""
        try:
            sums = self.sums()
        except CorruptError as error:
            return [str(error)]
        problems = []
        for name, expected in sums.items():
            try:
                _read_all(self.path / name, expected, progress)
            except CorruptError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{self.path / name} cannot be read ({first_line(error)})")
        return problems

    def complete(
        self, saving: Path, meta: CheckpointMeta, sums: dict[str, FileSum], fence: Callable[[], Any] = lambda: None
    ) -> None:
        """Turn the folder `saving`, whose files are on the disk, into this checkpoint. Raises UserError if one of the
        files is missing, and the error of `fence` if another incarnation has taken over."""
        fence()
        for name, expected in sums.items():
            try:
                check_size(saving / name, expected)
            except CorruptError as error:
                raise UserError(f"{error}, as the main rank sees it: {SHARE}") from None
        data = meta.to_json()
        write_atomic(saving / META, data)
        files = sorted({**sums, META: sum_bytes(data)}.items())
        marker = {"files": {name: asdict(file) for name, file in files}}
        flush_folder(saving)
        write_atomic(saving / MARKER, json.dumps({**marker, "checksum": _checksum(marker)}).encode())
        flush_folder(saving)
        fence()
        try:
            saving.rename(self.path)  # fails if one is there already
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            fence()
            self.remove()
            saving.rename(self.path)
        flush_folder(self.path.parent)

    def remove(self) -> None:
        """Rename the folder before its files go, so that an interrupted removal leaves nothing that looks complete."""
        gone = self.path.with_name(self.path.name + REMOVED)
        shutil.rmtree(gone, ignore_errors=True)
        self.path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def quarantine(self) -> Path:
        """Rename a corrupt checkpoint; returns its new path, or the old one if the disk refuses."""
        try:
            return self._rename(CORRUPT)
        except OSError:
            return self.path

    def abandon(self) -> Path:
        """Rename a checkpoint from which the run does not continue, so that none resumes from it; returns its new path.
        Raises OSError."""
        return self._rename(ABANDONED)

    def _rename(self, suffix: str) -> Path:
        renamed = self.path.with_name(self.path.name + suffix)
        while renamed.exists():  # an earlier one of this position
            renamed = renamed.with_name(renamed.name + suffix)
        return self.path.rename(renamed)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A complete checkpoint, validated once by `Checkpoint.open`. Of its methods, only `check_file` reads the disk."""

    checkpoint: Checkpoint
    meta: CheckpointMeta
    sums: dict[str, FileSum]

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def size(self) -> int:
        """Bytes of all files but the marker."""
        return sum(s.size for s in self.sums.values())

    def check_file(self, name: str, progress: Progress = lambda count: None) -> None:
        """Compare one of its files with its checksums. Raises CorruptError."""
        if name in self.sums:  # all but the marker itself
            _read_all(self.path / name, self.sums[name], progress)


def _read_all(path: Path, expected: FileSum, progress: Progress) -> None:
    buffer = bytearray(BLOCK_BYTES)
    with CheckedReader(path, expected) as file:
        while count := file.readinto(buffer):
            progress(count)


def _checksum(tree: dict[str, Any]) -> str:
    return sum_bytes(json.dumps(tree, sort_keys=True).encode()).blocks[0]
