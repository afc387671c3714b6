"""A setting: the keys of a config that decide how a run is computed, and not what is computed. Other values of them
train the same run."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from megagpt.config import Config, EngineConfig
from megagpt.config_file import shared_settings
from megagpt.config_types import AUTO
from megagpt.config_yaml import value_text

T = TypeVar("T")

# Keys of `train` that belong to a setting.
_TRAIN = ("micro_batch", "activation_checkpointing")


def vary(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with other values, which are not checked: `vary(config, train={"micro_batch": 4})`."""
    changed = {name: _with(getattr(config, name), values) for name, values in sections.items()}
    return _with(config, changed)


def _with(section: T, values: dict[str, Any]) -> T:
    # dataclasses.replace checks all values again, which takes longer than planning with them.
    made = copy.copy(section)
    vars(made).update(values)
    return made


def tensor_sizes(config: Config, per_node: int) -> list[int]:
    """The numbers of tensor ranks, above one, that can share the model and divide a node's GPUs."""
    if config.train.float8 != "none":
        return []
    return [size for size in config.model.ways_to_split() if size > 1 and per_node % size == 0]


def is_same(config: Config, own: Config) -> bool:
    """Whether a config has the setting of another one, whose micro-batch may be auto."""
    size, mode = own.train.micro_batch, own.train.activation_checkpointing
    same = config.engine == own.engine and config.train.activation_checkpointing == mode
    return same and size in (AUTO, config.train.micro_batch)


def overrides(config: Config, wanted: Config, engine_of_file: EngineConfig | None = None) -> list[str]:
    """The overrides that give `config` the setting of `wanted`; empty if they have the same. `engine_of_file`: the
    section `engine` to which they are applied; that of `config` if None."""
    engine, other = dataclasses.asdict(engine_of_file or config.engine), dataclasses.asdict(wanted.engine)
    if other["name"] != engine["name"]:  # on the command line, another name drops the file's settings of an engine
        kept = {key: engine[key] for key in ("name", *shared_settings(other["name"]))}
        engine = {**dataclasses.asdict(EngineConfig()), **kept}
    changed = [f"engine.{key}={value_text(value)}" for key, value in other.items() if value != engine[key]]
    for key in _TRAIN:
        value = getattr(wanted.train, key)
        if value != getattr(config.train, key):
            changed.append(f"train.{key}={value_text(value)}")
    return changed


def typed(given: Sequence[str], config: Config, wanted: Config, engine_of_file: EngineConfig) -> list[str]:
    """The overrides that give the file of `config`, which is the file with those `given`, the setting of `wanted`: each
    key once. `engine_of_file`: the file's section `engine`."""
    changed = overrides(config, wanted, engine_of_file)
    replaced = {word.partition("=")[0] for word in changed}
    kept = {word: word.partition("=")[0] for word in given}
    return [*(w for w, key in kept.items() if key not in replaced and key.split(".")[0] != "engine"), *changed]


def engine_words(engine: EngineConfig, ranks: int) -> str:
    """The engine with its sharding, as one short name: "fsdp in groups of 8"."""
    words: str = engine.name
    if engine.name == "zero":
        words += f" stage {engine.stage}"
    if engine.name == "fsdp" and engine.shard_ranks not in (0, ranks):
        words += f" in groups of {engine.shard_ranks}"
    if engine.tensor_ranks > 1:
        words += f", {engine.tensor_ranks} tensor ranks"
    if engine.name == "fsdp" and not engine.reshard_after_forward:
        words += ", kept"
    if engine.offload != "none":
        words += f", offload {engine.offload}"
    return words


def mode_words(mode: str | dict[str, int]) -> str:
    """The value of `train.activation_checkpointing` as one word."""
    return mode if isinstance(mode, str) else f"every {mode['every']}"


def setting_words(config: Config, ranks: int) -> str:
    """The setting as part of a sentence."""
    mode = mode_words(config.train.activation_checkpointing)
    engine = engine_words(config.engine, ranks)
    return f"{engine}, activation checkpointing {mode}, micro-batch {config.micro_batch}"
