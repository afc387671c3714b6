"""Whether a run may resume from a checkpoint under a config: the same model, the same recipe, the same data."""

from dataclasses import asdict, dataclass
from typing import Any

from pydantic_core import to_jsonable_python

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
    """--allow-recipe-change: another learning rate, schedule, batch, seed, dropout, residual or float8 from here on."""


def check(found: OpenCheckpoint, config: Config, fingerprints: list[str], allowed: Allowed) -> list[str]:
    """The differences that are allowed, for the log. Raises UserError naming the others, and the options for them."""
    saved, wanted, seen = found.meta.config, asdict(config), found.meta.tokens_seen
    model = _differences(_marked(saved, Change.SHAPE), _marked(wanted, Change.SHAPE))
    recipe, data = changes(found, config, fingerprints)
    if past := _differences(_skips_before(saved, seen), _skips_before(wanted, seen)):
        way = "only stretches at or past that position may change"
        raise UserError(f"{found.path} has seen {seen} tokens, and before them {past[0]}: {way}")
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
        problem = "belongs to another run than this config"
        raise UserError(f"{found.path}: {problem}: {'; '.join(refused)}. {'; '.join(ways)}")
    return recipe + data


def changes(found: OpenCheckpoint, config: Config, fingerprints: list[str]) -> tuple[list[str], list[str]]:
    """The differences of the recipe, and those of the data."""
    if not found.meta.sequences_seen:  # before the first sequence there is nothing that a change could contradict
        return [], []
    saved, wanted = found.meta.config, asdict(config)
    recipe = _differences(_marked(saved, Change.RECIPE), _marked(wanted, Change.RECIPE))
    return recipe, _differences(_order(saved, found.meta.data), _order(wanted, fingerprints))


def _order(tree: dict[str, Any], fingerprints: list[str] | None) -> dict[str, Any]:
    """The values that decide the order of the data."""
    data = tree["data"]
    weights = [source["weight"] for source in data["sources"]]
    return {"data.sources weights": weights, "data.skip": data.get("skip", []), "data": fingerprints}


def _skips_before(tree: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The stretches that were left out before a position."""
    return {"data.skip": [stretch for stretch in tree["data"].get("skip", ()) if stretch["at"] < tokens]}


def _marked(tree: dict[str, Any], change: Change) -> dict[str, Any]:
    """The values of the keys with that mark, by `section.key`. A key that is newer than the checkpoint has its default:
    every new key's default is what the code did before."""
    values = {}
    for key in keys_marked(change):
        section, name = key.name.split(".")
        values[key.name] = tree[section].get(name, key.default_value)
    return values


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    # The saved values come from JSON, which has lists for tuples.
    differ = [key for key in wanted if to_jsonable_python(saved.get(key)) != to_jsonable_python(wanted[key])]
    return [f"{key} is {saved.get(key)} in the checkpoint, {wanted[key]} now" for key in differ]
