"""Reads a Config from YAML, with overrides from the command line.

    config = load_config("gpt3_xl.yaml", ["train.tokens=1e9", "model.layers=2"])

A file may name another file as its `base` (in the same folder, or by bare name); it then holds only the differences.
Keys at its top that begin with `x-` hold what YAML's `<<: *name` takes from there. Every error names file, key and
value."""

import difflib
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megagpt.config import Config, EngineConfig
from megagpt.config_checks import contradictions
from megagpt.config_marks import For, Was, fields_of, mark_of
from megagpt.config_types import name_problem
from megagpt.config_yaml import dump, kind_below, parse, parse_value
from megagpt.errors import UserError, did_you_mean
from megagpt.models.presets import preset_fields


def config_folders() -> list[Path]:
    """Folders in which a bare config name is looked for, in order."""
    package = Path(__file__).resolve().parent
    return [Path(), Path("configs"), package / "configs", package.parent / "configs"]


def find_config(name: str) -> Path:
    """The file of that path or bare name (`gpt3_xl.yaml`). Raises UserError with the nearest names."""
    path, folders = Path(name), config_folders()
    try:
        for candidate in (folder / file for folder in folders for file in (name, f"{name}.yaml")):
            if candidate.is_file():
                return candidate
        if name and path.is_dir():
            raise UserError(f"config {name!r} is a folder; name a file in it, such as {str(path / 'config.yaml')!r}")
        if not path.parent.is_dir():
            raise UserError(f"config {name!r} not found: there is no folder {str(path.parent)!r}")
    except OSError as error:  # such as a name that is too long
        raise UserError(f"config {name!r} not found: {os.strerror(error.errno or 0)}") from None
    near = [str(file) for file in path.parent.glob("*.y*ml")]
    shipped = [file.name for folder in folders[1:] for file in folder.glob("*.yaml")] if path.name == name else []
    raise UserError(f"config {name!r} not found: {did_you_mean(name, sorted({*near, *shipped}))}")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: `base` leads back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    tree = parse(text, Config, str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not sections such as `model:` and `train:`")
    base = tree.pop("base", None)
    tree = {key: value for key, value in tree.items() if not key.startswith("x-")}
    tree = with_current_keys(tree, str(path))
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base {base!r} is not a file's name")
    beside = path.parent / base
    try:
        base_path = beside if beside.is_file() else find_config(base)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from None
    return _merge(_read_tree(base_path, (*seen, path)), tree)


def override(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """The tree with one `section.key=value` applied. Raises UserError if the text is not of that form."""
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override {text!r} is not of the form section.key=value, such as train.tokens=1e9")
    over: Any = parse_value(value, functools.reduce(kind_below, parts, Config), f"override {text!r}")
    for part in reversed(parts):
        over = {part: over}
    return _merge(tree, with_current_keys(over, f"override {text!r}"))


def _unknown_key(location: tuple[str | int, ...]) -> str:
    """A sentence about the keys that are valid in the section of the key at `location`."""
    kind: Any = Config
    for part in location[:-1]:
        kind = kind_below(kind, str(part))
    word, known = str(location[-1]), fields_of(kind)
    if kind is Config and not difflib.get_close_matches(word, known):
        # A key without its section.
        inner = [f"{section}.{key}" for section, field in known.items() for key in fields_of(field.annotation)]
        if matching := [key for key in inner if key.rpartition(".")[2] == word]:
            return f"did you mean {' or '.join(matching)}?"
    return did_you_mean(word, known)


def _error_text(error: Any) -> str:
    location, value = error["loc"], error["input"]
    key = ".".join(map(str, location)) or "config"
    match error["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key {key}: {_unknown_key(location)}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
        case _ if value is None:
            return f"{key}: it has no value; give it one, or leave it out"
        case "dataclass_type" | "dataclass_exact_type":
            return f"{key}: {value!r} is not a section with keys of its own"
        case "tuple_type":
            return f"{key}: {value!r} is not a list, such as [{{path: data/web}}]"
        case "string_type":
            return f"{key}: {value!r} is not a text"
    message = error["msg"].replace("Input should be", "should be")
    return f"{key}: {value!r} {message}"


@functools.cache
def _renamed() -> list[tuple[str, str, str]]:
    """Section, former name and name of each key that was renamed."""
    sections = [(section, fields_of(field.annotation)) for section, field in fields_of(Config).items()]
    return [(section, was.name, key) for section, keys in sections for key in keys if (was := mark_of(keys[key], Was))]


def with_current_keys(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """The tree with today's names for keys that were renamed. Raises UserError if a key has both of its names."""
    for section, old, new in _renamed():
        values = tree.get(section)
        if isinstance(values, dict) and old in values:
            if new in values:
                raise UserError(f"{where}: {section}.{old} is the old name of {section}.{new}: leave one of them out")
            tree = {**tree, section: {new if key == old else key: value for key, value in values.items()}}
    return tree


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _built(kind: Any, tree: dict[str, Any], where: str) -> Any:
    try:
        # JSON mode is pydantic's strict mode for parsed files: no string passes for a number, no bool for an int.
        return _adapter(kind).validate_json(json.dumps(tree))
    except ValidationError as error:
        errors = error.errors()
        # A list without its bad items is not too short.
        inner = [found for found in errors if found["type"] != "too_short"]
        raise UserError(f"{where}: " + "; ".join(map(_error_text, inner or errors))) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def build_config(tree: dict[str, Any], where: str) -> Config:
    """Check a tree of plain values and make the Config; `where` names it in errors."""
    model = tree.get("model")
    if isinstance(model, dict) and model.get("preset"):
        try:
            tree = {**tree, "model": {**preset_fields(str(model["preset"])), **model}}
        except UserError as error:
            raise UserError(f"{where}: model.preset: {error}") from None
    config: Config = _built(Config, tree, where)
    if problems := list(contradictions(config)):
        raise UserError(f"{where}: " + "; ".join(problems))
    return config


def _other_engine(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """The tree without the file's settings for another engine than the override names."""
    engine, over = tree.get("engine"), override({}, text).get("engine")
    if not isinstance(engine, dict) or not isinstance(over, dict) or "name" not in over:
        return tree
    if over["name"] == engine.get("name", EngineConfig.name):
        return tree
    shared = shared_settings(over["name"])
    return {**tree, "engine": {key: value for key, value in engine.items() if key in shared}}


def shared_settings(name: str) -> set[str]:
    """Keys of the section `engine` that keep the file's value if that engine is chosen on the command line: those that
    several engines have, it among them."""
    marks = {key: mark_of(field, For) for key, field in fields_of(EngineConfig).items()}
    return {key for key, mark in marks.items() if mark and len(mark.engines) > 1 and name in mark.engines}


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config by path or bare name, apply `section.key=value` overrides, check it. Raises UserError."""
    path = find_config(name)
    tree = _overridden(_read_tree(path), overrides)
    run = tree.get("run", {})
    if isinstance(run, dict) and not run.get("name"):
        tree = {**tree, "run": {**run, "name": path.stem}}
    return build_config(tree, _where(path, overrides))


def file_engine(name: str) -> EngineConfig:
    """The section `engine` of a config file as it is without overrides. Raises UserError."""
    path = find_config(name)
    engine: EngineConfig = _built(EngineConfig, _read_tree(path).get("engine") or {}, f"{path}: engine")
    return engine


def load_run(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in the folder of a run, with overrides. The folder may have been moved: its place decides run.name and
    run.folder. Raises UserError if it is not a run's folder."""
    path, place, here = run / "config.yaml", run.resolve(), Path.cwd()
    if not path.is_file():
        raise UserError(f"{run}: not a run's folder (no config.yaml in it)")
    if problem := name_problem(place.name):
        raise UserError(f"{str(run)!r}: the folder's name {place.name!r} {problem}; rename the folder")
    tree = _overridden(_read_tree(path), overrides)
    folder = place.parent.relative_to(here) if place.parent.is_relative_to(here) else place.parent
    return build_config(_merge(tree, {"run": {"name": place.name, "folder": str(folder)}}), _where(path, overrides))


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for text in overrides:
        tree = _other_engine(tree, text)
    for text in overrides:
        tree = override(tree, text)
    return tree


def _where(path: Path, overrides: Sequence[str]) -> str:
    """The file and the overrides, in one line."""
    words = [text if text.isprintable() else repr(text) for text in overrides]
    return f"{path} with {' '.join(words)}" if words else str(path)


def to_yaml(config: Config) -> str:
    """The resolved run, every value spelled out; `load_config` reads it back to an equal Config."""
    return dump(json.loads(json.dumps(asdict(config))))
