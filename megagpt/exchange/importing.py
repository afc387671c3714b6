"""A run that starts from the weights of a GPT-2 folder."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megagpt.checkpoints.saving import Saver, describe_position
from megagpt.config import CheckpointConfig, Config
from megagpt.config_file import to_yaml
from megagpt.engines.flat_shard import FlatShard
from megagpt.errors import UserError
from megagpt.files import write_atomic
from megagpt.models.gpt import GPT
from megagpt.models.huggingface import Pretrained
from megagpt.world import World


class _Unread(FlatShard):
    """A whole parameter, read from its file only when the checkpoint is written."""

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
        f"model.{key} {getattr(theirs, key)} there, {getattr(ours, key)} in the config"
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
    zero = torch.zeros(1)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        nothing = zero.expand(parameter.numel())
        weights = _Unread(nothing, shape, 0)
        weights.source, weights.parameter = source, name
        source.find(name, shape)  # refuses a missing tensor before anything is written
        state[f"model.{name}"] = weights
        state[f"exp_avg.{name}"] = FlatShard(nothing, shape, 0)
        state[f"exp_avg_sq.{name}"] = FlatShard(nothing, shape, 0)
    meta: dict[str, Any] = describe_position(config, "import", 1, 0, 0, None, milestone=False)
    saver = Saver(run, CheckpointConfig(asynchronous=False), World(0, 1, 0, torch.device("cpu")))
    try:
        saver.save(state, (0, 1), meta, print)
        saver.finish()
        # Written last: a folder without it does not count as a run.
        write_atomic(run / "config.yaml", to_yaml(config).encode())
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        raise
    return run
