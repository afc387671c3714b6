"""A run that starts from the weights of a GPT-2 folder."""

import dataclasses
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megagpt.checkpoints.checkpoint import CheckpointMeta
from megagpt.checkpoints.saving import Saver
from megagpt.config import CheckpointConfig, Config
from megagpt.config_file import to_yaml
from megagpt.engines.engine import Replica
from megagpt.engines.flat_shard import FlatShard
from megagpt.engines.loss_scale import loss_scale
from megagpt.errors import UserError
from megagpt.files import write_atomic
from megagpt.models.gpt import GPT
from megagpt.models.huggingface import Pretrained
from megagpt.world import World


class _Unread(FlatShard):
    """A whole parameter, which is read from its file only when the checkpoint is written."""

    source: Pretrained
    parameter: str

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.source.read(self.parameter, tuple(self.shape))


def import_run(folder: str | Path, config: Config) -> Path:
    """Make the config's run folder with a checkpoint at token 0: the weights from `folder`, moments of zero. Holds one
    tensor in memory at a time; returns the run folder. Raises UserError if the shapes differ or the run exists."""
    source = Pretrained(folder)
    theirs, ours = source.config, config.model
    differing = [
        f"model.{key} is {getattr(theirs, key)} there, {getattr(ours, key)} in the config"
        for key in ("layers", "width", "heads", "context", "vocab_size", "attention")
        if getattr(theirs, key) != getattr(ours, key)
    ]
    if differing:
        raise UserError(f"{folder}: its shape is not the config's: {'; '.join(differing)}; change the config")
    run = Path(config.run.folder) / config.run.name
    if run.exists() and any(run.iterdir()):
        raise UserError(f"{run}: already holds a run; choose another run.name")
    with torch.device("meta"):
        model = GPT(ours)
    state: dict[str, FlatShard] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        nothing = torch.zeros(1).expand(parameter.numel())
        weights = _Unread(nothing, shape, 0)
        weights.source, weights.parameter = source, name
        source.find(name, shape)  # refuses a missing tensor before anything is written
        state[f"model.{name}"] = weights
        state |= {f"{moment}.{name}": FlatShard(nothing, shape, 0) for moment in ("exp_avg", "exp_avg_sq")}
    scalars = {"updates": 0, "loss_scale": dataclasses.asdict(loss_scale(config.train.precision))}
    meta = CheckpointMeta(0, 0, 0, "import", 1, dataclasses.asdict(config), None, scalars)
    saver = Saver(run, CheckpointConfig(asynchronous=False), World.alone())
    try:
        saver.save(state, Replica(0, 1), meta)
        saver.finish()
        # Written last: a folder without it does not count as a run.
        write_atomic(run / "config.yaml", to_yaml(config).encode())
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        raise
    return run
