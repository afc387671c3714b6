"""Loading: a run's newest checkpoint into an engine, or single tensors of one."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megagpt.checkpoints.checkpoint import INDEX, Checkpoint, CheckpointMeta, OpenCheckpoint
from megagpt.checkpoints.checksums import CorruptError
from megagpt.checkpoints.compatibility import Allowed, check
from megagpt.checkpoints.folder import at_tokens, list_checkpoints, renamed
from megagpt.checkpoints.saving import hush
from megagpt.checkpoints.storage import Reader
from megagpt.config import Config, compiles
from megagpt.config_file import build_config
from megagpt.console import say
from megagpt.engines.engine import Engine
from megagpt.errors import ExpectedError, UserError, first_line
from megagpt.models.finite import check_finite
from megagpt.placement import layout
from megagpt.world import World


def choose(
    run: Path, config: Config, fingerprints: list[str], allowed: Allowed, world: World, tokens: int | None = None
) -> OpenCheckpoint | None:
    """The run's newest complete checkpoint, which fits config and data; None if none was ever completed. Every rank
    calls it and gets the main rank's answer, because file systems may show ranks different states. Corrupt ones are
    named and quarantined. `tokens`: take the checkpoint of that position and no other. Raises UserError if all are
    corrupt, if that one is missing or corrupt, or if the checkpoint belongs to another run."""

    def search() -> OpenCheckpoint | None:
        found = _newest(run) if tokens is None else _at(run, tokens)
        if found is not None:
            for difference in check(found, config, fingerprints, allowed):
                say(f"resuming with a change: {difference}")
            if config.model.dropout and (changes := _dropout_changes(found.meta, config, world)):
                draws = "dropout draws by rank and micro-batch"
                say(f"{draws}: {' and '.join(changes)}, other elements are dropped from here on, at the same rate")
        return found

    return world.from_main(search)


def _newest(run: Path) -> OpenCheckpoint | None:
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            return _checked(checkpoint)
        except CorruptError as error:
            say(_quarantine_words(error, checkpoint.quarantine(), checkpoint.path))
    if left := renamed(run):
        ways = "restore one from a copy or give one its name back, or use another run.name"
        again = "To begin this run again from its first token, remove the renamed checkpoints"
        raise UserError(f"{left[-1]}: no checkpoint of this run is complete; {ways}. {again}")
    return None


def _at(run: Path, tokens: int) -> OpenCheckpoint:
    checkpoint = at_tokens(run, tokens)
    if not checkpoint.path.is_dir():
        there = ", ".join(str(c.tokens) for c in list_checkpoints(run)) or "none"
        raise UserError(f"{run}: has no checkpoint at {tokens} tokens; there are: {there}")
    try:
        return _checked(checkpoint)
    except CorruptError as error:
        raise UserError(f"{error}; choose another checkpoint, or leave --at out to take the newest good one") from None


def _checked(checkpoint: Checkpoint) -> OpenCheckpoint:
    """The checkpoint, opened. Raises CorruptError, and UserError if the disk does not read it."""
    try:
        found = checkpoint.open()
        found.check_file(INDEX)  # PyTorch hides what its reader of the index raises
        return found
    except OSError as error:
        raise UserError(f"{checkpoint.path}: cannot be read: {first_line(error)}") from None


def _dropout_changes(meta: CheckpointMeta, config: Config, world: World) -> list[str]:
    """The differences from the incarnation that saved a checkpoint which make dropout draw other elements."""
    if not meta.sequences_seen:  # nothing was dropped yet
        return []
    train, before = config.train, meta.config["train"]
    changes, now = [], layout(world.size, config.engine.tensor_ranks)
    if now != meta.layout:
        changes.append(f"on {now} instead of {meta.layout}")
    if config.micro_batch != before["micro_batch"]:
        changes.append(f"with train.micro_batch {config.micro_batch} instead of {before['micro_batch']}")
    then, device = before.get("compile", False), world.device.type
    if compiles(train.compile, device) != compiles(then, device):
        changes.append(f"with train.compile {train.compile} instead of {then}".lower())
    return changes


def load(found: OpenCheckpoint, engine: Engine) -> None:
    """Fill the engine from a checkpoint. Every rank calls it. Raises CorruptError, on every rank, if some rank reads a
    block that is not as it was written."""
    state = engine.state()  # until `state_loaded`: it may be the only copy in memory
    _read(found, state, no_dist=engine.world.size == 1)
    engine.state_loaded(found.meta.scalars)


def quarantine(found: OpenCheckpoint, error: CorruptError, world: World) -> None:
    """Rename a checkpoint that could not be loaded, so that `choose` takes an older one. Every rank calls it. Raises
    UserError if the main rank finds it complete, and if it cannot be renamed."""

    def rename() -> Path:
        with contextlib.suppress(CorruptError):
            found.checkpoint.open().check_file(error.file.name)
            differ = "as one rank reads it, but the main rank finds it complete"
            raise UserError(f"{error}, {differ}: check that rank's host")
        return found.checkpoint.quarantine()

    say(_quarantine_words(error, world.from_main(rename), found.path))


def _quarantine_words(error: CorruptError, now: Path, before: Path) -> str:
    """A line for the log. Raises UserError if the checkpoint still has its old path."""
    if now == before:
        raise UserError(f"{error}; move {before} away, then resume from an older checkpoint")
    return f"{error}; quarantined as {now.name}"


def read_weights(found: OpenCheckpoint, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Parameters by name, fp32 on the CPU. Raises UserError for one that is missing or of another shape, and
    NonFiniteError for one with NaN or infinite values."""
    state = {f"model.{name}": torch.empty(shape) for name, shape in shapes.items()}
    found.check_file(INDEX)
    _read(found, state, no_dist=True)
    way = "take an older checkpoint (megagpt checkpoint list)"
    return {name: check_finite(state[f"model.{name}"], name, found.path, way) for name in shapes}


def saved_config(found: OpenCheckpoint) -> Config:
    """The config of the run that saved a checkpoint, without the run's name: 0.1.0 took names that are now refused.
    Raises UserError."""
    tree = found.meta.config
    return build_config({**tree, "run": {**tree.get("run", {}), "name": ""}}, str(found.path))


def tensor_shapes(found: OpenCheckpoint) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its key, such as `exp_avg.blocks.0.mlp.up.weight`."""
    entries = Reader(found.path, found.sums).read_metadata().state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _read(found: OpenCheckpoint, state: Mapping[str, Tensor], no_dist: bool) -> None:
    hush()
    try:
        dcp.load(dict(state), storage_reader=Reader(found.path, found.sums), no_dist=no_dist)
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        unexpected = UserError(f"{found.path}: cannot be read: {first_line(causes[0])}")
        raise next((cause for cause in causes if isinstance(cause, ExpectedError)), unexpected) from None
