"""Whether a run may resume from a checkpoint under a config: the same model, the same recipe, the same data."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megagpt.checkpoints.checkpoint import OpenCheckpoint
from megagpt.config import Config
from megagpt.config_keys import keys_marked
from megagpt.config_marks import Change
from megagpt.errors import UserError


@dataclass(frozen=True)
class Allowed:
    """Differences that the user intends."""

    data: bool = False
    """--allow-data-change: other shards, sources or weights from here on."""
    recipe: bool = False
    """--allow-recipe-change: another learning rate, schedule, batch, seed or dropout from here on."""


def check(found: OpenCheckpoint, config: Config, fingerprints: list[str], allowed: Allowed) -> list[str]:
    """The differences that are allowed, for the log. Raises UserError naming all that are not, with the options that
    would allow them."""
    meta = found.meta
    saved, wanted = meta.config, dataclasses.asdict(config)
    model = model_differences(saved, config)
    recipe, data = [], []
    if meta.sequences_seen:  # before the first sequence there is nothing that a change could contradict
        recipe = _differences(_marked(saved, Change.RECIPE), _marked(wanted, Change.RECIPE))
        data = _differences(
            {"data.sources weights": [s["weight"] for s in saved["data"]["sources"]], "data": meta.data},
            {"data.sources weights": [s["weight"] for s in wanted["data"]["sources"]], "data": fingerprints},
        )
    refused, ways = list(model), []
    if model:
        ways.append("another model needs another run.name")
    if recipe and not allowed.recipe:
        refused += recipe
        ways.append("--allow-recipe-change resumes with the new recipe")
    if data and not allowed.data:
        refused += data
        ways.append("--allow-data-change resumes with the new data")
    if refused:
        raise UserError(
            f"{found.path}: belongs to another run than this config: {'; '.join(refused)}. {'; '.join(ways)}"
        )
    return recipe + data


def model_differences(saved: dict[str, Any], config: Config) -> list[str]:
    """The differences between the shape of a saved config's model and that of the config's."""
    return _differences(_marked(saved, Change.SHAPE), _marked(dataclasses.asdict(config), Change.SHAPE))


def _marked(tree: dict[str, Any], change: Change) -> dict[str, Any]:
    """The values of the keys with that mark, by `section.key`."""
    keys = [(name, *name.split(".")) for name in keys_marked(change)]
    return {name: tree[section].get(key) for name, section, key in keys}


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{key} {saved.get(key)} there, {wanted[key]} here"
        for key in wanted
        if _plain(saved.get(key)) != _plain(wanted[key])
    ]


def _plain(value: Any) -> Any:
    """JSON has lists for tuples."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
