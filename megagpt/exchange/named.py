"""A model by its name: a run, one of its checkpoints, a folder of `transformers`, or one on the Hugging Face hub."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megagpt.checkpoints.checkpoint import OpenCheckpoint
from megagpt.checkpoints.folder import checkpoints_folder, find_checkpoint, is_checkpoint
from megagpt.checkpoints.loading import read_weights, saved_config
from megagpt.data.tokenizer import VOCAB_SIZE
from megagpt.errors import ExpectedError, UserError
from megagpt.exchange.hub_models import SHORT_NAMES, HubName, fetch, hub_name, resolve
from megagpt.exchange.tokenizer_files import check_tokenizer
from megagpt.files import named_path
from megagpt.models.gpt import GPT
from megagpt.models.huggingface import Pretrained, is_pretrained, parameter_shapes
from megagpt.models.presets import ModelConfig
from megagpt.world import World

# Places that a name may mean on a disk, in words for errors.
_PLACES = {
    "run": "a run", "checkpoint": "a checkpoint", "folder": "a transformers folder",
    "other": "a folder without a model", "file": "a file", "nothing": "no file or folder",
}  # fmt: skip


@dataclass(frozen=True)
class NamedModel:
    """A model that was found; its weights are still on the disk."""

    label: str
    """The name for people and for results: the path, with the position of a run's checkpoint, or OWNER/NAME@COMMIT."""
    kind: Literal["run", "checkpoint", "folder", "hub"]
    folder: Path
    """The folder of the weights: of one checkpoint, or one that `transformers` reads."""
    config: ModelConfig
    source: OpenCheckpoint | Pretrained
    """A checkpoint for a run and a checkpoint; else the folder's files."""
    hub: HubName | None = None
    """Repository and commit of a model on the hub."""

    @property
    def checkpoint(self) -> OpenCheckpoint | None:
        return self.source if isinstance(self.source, OpenCheckpoint) else None

    def read(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Parameters by our name, fp32 on the CPU, the vocabulary padded to our shape. Raises UserError for one that is
        missing or of another shape, and NonFiniteError."""
        if isinstance(self.source, OpenCheckpoint):
            return read_weights(self.source, shapes)
        return {name: self.source.read(name) for name in shapes}

    def load(self) -> GPT:
        """The model, fp32 on the CPU. Raises as `read` does."""
        with torch.device("meta"):
            model = GPT(self.config)
        model.load_state_dict(self.read(parameter_shapes(self.config)), assign=True)
        return model


def open_model(name: str, world: World | None = None) -> NamedModel:
    """The model of that name: a folder here, else a model on the hub, whose files are fetched if the hub's cache lacks
    them. `world`: its ranks, all of which call it; one on each machine fetches, and all get the same weights. Raises
    UserError if there is none, if it is no GPT-2, if its vocabulary or tokenizer is not GPT-2's, or if the name means
    different things on different machines."""
    world = world or World.alone()
    path = named_path(name)
    place = _common_place(name, path, world)
    if place == "file":
        raise UserError(f"{name}: a file, not a model's folder; name the folder that it is in")
    found = _on_hub(name, path, world) if place == "nothing" else _in_folder(name, path, place, world)
    if found.config.vocab_size < VOCAB_SIZE:
        raise UserError(f"{name}: its vocabulary of {found.config.vocab_size} is not GPT-2's {VOCAB_SIZE}")
    if found.checkpoint is None:
        check_tokenizer(found.folder)
    return found


def _common_place(name: str, path: Path, world: World) -> str:
    """The kind of place that the path is, one of _PLACES, on every rank. Raises UserError, on every rank, if hosts
    differ: their ranks would go different ways, and wait for each other for ever."""
    main, place, others = world.differing(_place(path))
    for host, theirs in others.items():
        way = "copy it to every host, or name a folder that all hosts share"
        raise UserError(f"{name}: {_PLACES[theirs]} on {host}, but {_PLACES[place]} on {main}: {way}")
    return place


def _place(path: Path) -> str:
    if is_pretrained(path):
        return "folder"
    if is_checkpoint(path):
        return "checkpoint"
    if checkpoints_folder(path).is_dir() or (path / "config.yaml").exists():
        return "run"
    return "other" if path.is_dir() else "file" if path.exists() else "nothing"


def _in_folder(name: str, path: Path, place: str, world: World) -> NamedModel:
    if place == "folder":
        source = Pretrained(path)
        _check_same(name, source, world)
        return NamedModel(name, "folder", path, source.config, source)
    if place == "other":
        parts = "neither config.json (a transformers folder) nor checkpoints/ (a run), and is no checkpoint of a run"
        short = f"; OpenAI's model of that name is {SHORT_NAMES[name]}" if name in SHORT_NAMES else ""
        near = [path.parent, *sorted(path.iterdir())] if not short else []
        inside = next((f"; name {each}" for each in near if _place(each) in ("run", "folder")), "")
        raise UserError(f"{name}: a folder without a model: it has {parts}{short}{inside}")
    # File systems may show ranks different states of a run that goes on.
    found = world.from_main(lambda: find_checkpoint(path))
    config = saved_config(found).model
    if place == "checkpoint":
        return NamedModel(name, "checkpoint", found.path, config, found)
    return NamedModel(f"{name} at {found.meta.tokens_seen:,} tokens", "run", found.path, config, found)


def _check_same(name: str, source: Pretrained, world: World) -> None:
    """Raises UserError, on every rank, if hosts have other weights: each rank would compute with those of its own. The
    files of checkpoints and of models on the hub are compared with checksums that all ranks share."""
    if len(set(world.hosts())) == 1:
        return
    found = world.once_per_host(lambda: (source.config, source.digest()), f"reads the weights of {name}")
    main, _, others = world.differing(found)
    for host in others:
        problem = f"the model on {host} is another one than on {main}"
        raise UserError(f"{name}: {problem}; copy the folder of {main} to every host, or name one that all share")


def _on_hub(name: str, path: Path, world: World) -> NamedModel:
    wanted = hub_name(name)
    try:
        hub = world.from_main(lambda: resolve(wanted))
        folder = world.once_per_host(lambda: fetch(hub), f"fetches {hub.repo}")
    except ExpectedError as error:
        if name.partition("@")[0] in SHORT_NAMES or "@" in name:
            raise
        beside = [str(each) for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), beside, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise type(error)(f"no folder {name} here{meant}; on the Hugging Face hub: {error}") from None
    source = Pretrained(folder)
    return NamedModel(f"{hub.repo}@{hub.revision}", "hub", folder, source.config, source, hub)
