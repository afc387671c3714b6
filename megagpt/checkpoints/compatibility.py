"""Whether a run may resume from a checkpoint under a config: the same model, the same recipe, the same data."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megagpt.checkpoints.checkpoint import OpenCheckpoint
from megagpt.config import Config
from megagpt.errors import UserError

# Keys that decide what is computed, beside the model's shape. The length of the run, its engine, precision and
# intervals are not among them: they may change at any restart.
_RECIPE = {
    "run": ("seed",),
    "train": ("batch_tokens", "batch_ramp_start", "batch_ramp_tokens"),
    "optimizer": None,
    "schedule": None,
    "model": ("dropout",),
}


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
        recipe = _differences(_recipe(saved), _recipe(wanted))
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
    """The differences between the model of a saved config and that of the config."""
    ignored = ("preset", "dropout")  # neither shapes a tensor nor changes what the weights mean

    def shape(tree: dict[str, Any]) -> dict[str, Any]:
        return {f"model.{k}": v for k, v in tree["model"].items() if k not in ignored}

    return _differences(shape(saved), shape(dataclasses.asdict(config)))


def _recipe(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": tree[section].get(key)
        for section, keys in _RECIPE.items()
        for key in (keys or tree[section])
    }


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{key} {saved.get(key)} there, {wanted[key]} here"
        for key in wanted
        if _plain(saved.get(key)) != _plain(wanted[key])
    ]


def _plain(value: Any) -> Any:
    """JSON has lists for tuples."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
