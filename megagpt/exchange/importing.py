"""A run that starts from the weights of a named model."""

import dataclasses
import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from megagpt.checkpoints.checkpoint import CheckpointMeta, OpenCheckpoint
from megagpt.checkpoints.folder import at_tokens
from megagpt.checkpoints.saving import Saver
from megagpt.config import Config
from megagpt.config_file import to_yaml
from megagpt.config_occasions import CheckpointConfig
from megagpt.engines.engine import MOMENTS, Replica
from megagpt.engines.flat_shard import FlatShard
from megagpt.engines.loss_scale import loss_scale
from megagpt.errors import ExpectedError, UserError
from megagpt.exchange.named import NamedModel
from megagpt.files import now, read_json, write_atomic
from megagpt.models.huggingface import parameter_shapes
from megagpt.world import World

_ORIGIN = "imported.json"


class _Unread(FlatShard):
    """A whole parameter, which is read from its file only when the checkpoint is written."""

    source: NamedModel
    parameter: str

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.source.read({self.parameter: self.shape})[self.parameter]


def import_run(model: NamedModel, config: Config) -> Path:
    """Make the config's run folder with a checkpoint at token 0: the model's weights, moments of zero. Returns the run
    folder, which keeps in imported.json where the weights came from. Holds one tensor in memory at a time, but a whole
    file if that is in PyTorch's format of before 1.6. Raises UserError if the shapes differ, a weight is not finite, or
    the run exists."""
    theirs, ours = model.config, config.model
    keys = ["layers", "width", "heads", "context", "vocab_size", "attention"]
    keys += ["window"] if theirs.attention == ours.attention == "banded" else []
    differing = [
        f"model.{key} is {getattr(theirs, key)} there, {getattr(ours, key)} in the config"
        for key in keys
        if getattr(theirs, key) != getattr(ours, key)
    ]
    if differing:
        raise UserError(f"{model.label}: its shape is not the config's: {'; '.join(differing)}; change the config")
    run = Path(config.run.folder).expanduser() / config.run.name
    if run.exists() and any(run.iterdir()):
        raise UserError(f"{run}: already holds a run; choose another run.name")
    state: dict[str, FlatShard] = {}
    for name, shape in parameter_shapes(ours).items():
        nothing = torch.zeros(1).expand(prod(shape))
        weights = _Unread(nothing, shape, 0)
        weights.source, weights.parameter = model, name
        state[f"model.{name}"] = weights
        state |= {f"{moment}.{name}": FlatShard(nothing, shape, 0) for moment in MOMENTS}
    scalars = {"updates": 0, "loss_scale": dataclasses.asdict(loss_scale(config.train.precision))}
    meta = CheckpointMeta(0, 0, 0, "import", 1, dataclasses.asdict(config), None, scalars)
    saver = Saver(run, CheckpointConfig(asynchronous=False), World.alone())
    try:
        saver.save(state, Replica(0, 1), meta)
        saver.finish()
        at_tokens(run, 0).prove()  # no step made these weights
        write_atomic(run / _ORIGIN, json.dumps(_whence(model), indent=1).encode())
        # Written last: a folder without it does not count as a run.
        write_atomic(run / "config.yaml", to_yaml(config).encode())
    except BaseException as error:
        shutil.rmtree(run, ignore_errors=True)
        if isinstance(error, CheckpointException):  # PyTorch's, around what reading a tensor has raised
            raise next((e for e, _ in error.failures.values() if isinstance(e, ExpectedError)), error) from None
        raise
    return run


def _whence(model: NamedModel) -> dict[str, Any]:
    hub = {"hub": {"repo": model.hub.repo, "commit": model.hub.revision}} if model.hub else {}
    theirs = model.source.meta.config if isinstance(model.source, OpenCheckpoint) else model.source.description
    return {**hub, "folder": str(model.folder.resolve()), "imported": now(), "config": theirs}


def origin(run: Path) -> dict[str, Any]:
    """Where an imported run's weights came from: of a model on the hub `hub`, its `repo` and `commit`; `folder`; the
    time `imported`; and the `config` there, config.json or that of a run. Empty for a run that started from random
    weights."""
    return read_json(run / _ORIGIN)


def first_weights(whence: dict[str, Any], mark: str = "") -> str:
    """The weights of such an origin, for people: repository and commit on the hub, else the folder. A `mark` is put at
    both ends of each name."""
    hub = whence.get("hub")  # imports of version 0.1, and of folders, lack it
    if hub:
        return f"{mark}{hub['repo']}{mark} at commit {mark}{hub['commit']}{mark}"
    return f"{mark}{whence['folder']}{mark}"
