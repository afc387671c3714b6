"""Loading: a checkpoint into an engine, or single tensors of it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megagpt.checkpoints.compatibility import Allowed, check
from megagpt.checkpoints.folder import INDEX, Checkpoint, damaged, find_checkpoint, list_checkpoints
from megagpt.checkpoints.saving import hush
from megagpt.checkpoints.storage import CorruptError, FileSum, Reader
from megagpt.config import Config
from megagpt.config_file import build_config
from megagpt.engines.engine import Engine
from megagpt.errors import ExpectedError, UserError, first_line
from megagpt.models.gpt import GPT
from megagpt.models.huggingface import is_pretrained, load_pretrained


def resume(
    run: Path,
    engine: Engine,
    fingerprints: list[str],
    allowed: Allowed,
    say: Callable[[str], Any],
    chosen: Callable[[int], Any] = lambda tokens: None,
) -> dict[str, Any] | None:
    """Fill the engine from the run's newest whole checkpoint; its meta.json, or None where none was ever completed.
    `chosen` is called with its tokens when it is known to fit, before it is read.

    Every rank calls it. A damaged checkpoint is named and set aside, and the next older one is taken. Raises UserError
    where there are only damaged ones, and where the checkpoint is of another run than the engine's config.
    """
    world = engine.world
    while True:
        # As the main rank sees it: file systems may show ranks different states.
        path = world.from_main(lambda: max((c.path for c in list_checkpoints(run)), default=None))
        if path is None:
            break
        checkpoint = Checkpoint(path)
        try:
            return _load(checkpoint, engine, fingerprints, allowed, say, chosen)
        except CorruptError as error:
            aside = world.from_main(functools.partial(_set_aside, checkpoint, error))
            say(f"{error}; set aside as {aside.name}")
    found = world.from_main(lambda: damaged(run))
    if found:
        raise UserError(
            f"{found[-1]}: no checkpoint of this run is whole; restore one from a copy, or start another run. To start "
            "this one over, remove what was set aside"
        )
    return None


def _set_aside(checkpoint: Checkpoint, error: CorruptError) -> Path:
    """Rename a damaged checkpoint. Raises UserError where this rank finds it whole, and where it cannot be renamed."""
    with contextlib.suppress(CorruptError):
        checkpoint.whole()
        checkpoint.check_file(error.file.name)
        raise UserError(f"{error}, as one rank reads it, and the main rank finds it whole: look at that rank's host")
    aside = checkpoint.set_aside()
    if aside == checkpoint.path:
        raise UserError(f"{error}; move {checkpoint.path} away, and an older checkpoint is taken")
    return aside


def _load(
    checkpoint: Checkpoint,
    engine: Engine,
    fingerprints: list[str],
    allowed: Allowed,
    say: Callable[[str], Any],
    chosen: Callable[[int], Any],
) -> dict[str, Any]:
    config, world = engine.config, engine.world

    meta, sums = world.from_main(lambda: _whole(checkpoint))
    for difference in check(checkpoint, meta, config, fingerprints, allowed):
        say(f"going on with a change: {difference}")
    if config.model.dropout and meta["world_size"] != world.size:
        say(
            f"dropout draws by rank: on {world.size} ranks instead of {meta['world_size']}, other elements are dropped "
            "from here on, at the same rate"
        )
    chosen(meta["tokens_seen"])
    state = engine.state()
    _read(checkpoint.path, sums, state, no_dist=world.size == 1)
    engine.state_loaded(meta["updates"])
    if (
        engine.loss_scale.dynamic
        and "loss_scale" in meta
        and meta["config"]["train"]["precision"] == config.train.precision
    ):
        engine.loss_scale = dataclasses.replace(engine.loss_scale, **meta["loss_scale"])
    return meta


def _whole(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, FileSum]]:
    """Its meta.json and checksums, with the index read: PyTorch hides what a reader of that raises."""
    try:
        meta, sums = checkpoint.whole()
        checkpoint.check_file(INDEX)
    except OSError as error:
        raise UserError(f"{checkpoint.path}: cannot be read: {first_line(error)}") from None
    return meta, sums


def read_weights(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Parameters by name, fp32 on the CPU. Raises UserError for one that is missing or of another shape."""
    state = {f"model.{name}": torch.empty(shape) for name, shape in shapes.items()}
    _read(checkpoint.path, _whole(checkpoint)[1], state, no_dist=True)
    return {name: state[f"model.{name}"] for name in shapes}


def saved_config(checkpoint: Checkpoint) -> Config:
    """The config of the run that saved a checkpoint. Raises UserError."""
    return build_config(checkpoint.meta()["config"], str(checkpoint.path))


def load_model(folder: Path, say: Callable[[str], Any]) -> GPT:
    """The model of a run's newest complete checkpoint, of a checkpoint, or of a transformers GPT-2 folder; fp32 on the
    CPU. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if is_pretrained(folder):
        return load_pretrained(folder)
    checkpoint = find_checkpoint(folder, say)
    with torch.device("meta"):
        model = GPT(saved_config(checkpoint).model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(read_weights(checkpoint, shapes), assign=True)
    return model


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its key, such as `exp_avg.blocks.0.mlp.up.weight`."""
    metadata = Reader(checkpoint.path, checkpoint.sums()).read_metadata()
    return {
        key: tuple(tensor.size)
        for key, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


def _read(folder: Path, sums: dict[str, FileSum], state: Mapping[str, Tensor], no_dist: bool) -> None:
    hush()
    try:
        dcp.load(dict(state), storage_reader=Reader(folder, sums), no_dist=no_dist)
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        raise next((c for c in causes if isinstance(c, ExpectedError)), None) or UserError(
            f"{folder}: cannot be read: {first_line(causes[0])}"
        ) from None
