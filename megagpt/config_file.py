"""Reads a Config from YAML, with overrides from the command line.

    config = load_config("gpt3_xl.yaml", ["train.tokens=1e9", "model.layers=2"])

A file may name another file as its `base` (in the same folder, or by bare name); it then holds only the differences.
Every error names file, key and value."""

import functools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from megagpt.config import Config, EngineConfig, SourceConfig, contradictions
from megagpt.config_marks import Was, fields_of, mark_of
from megagpt.errors import UserError, did_you_mean
from megagpt.models.presets import preset_fields


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are numbers (`5e8`, `1_000`) and whose duplicate keys are errors."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    value = float(loader.construct_scalar(node).replace("_", ""))
    # 5e8 is read as a whole number, for token counts; 1.0e-4 is not whole, and 2.0, without exponent, stays a float.
    return int(value) if value.is_integer() and "e" in node.value.lower() else value


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_FLOAT = "tag:yaml.org,2002:float"
_FLOATS = r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$|^[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)$"
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != _FLOAT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT, re.compile(_FLOATS), list("-+0123456789."))
_Loader.add_constructor(_FLOAT, _number)
_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: {getattr(error, 'problem', None) or 'not valid YAML'}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None


def config_folders() -> list[Path]:
    """Folders in which a bare config name is looked for, in order."""
    package = Path(__file__).resolve().parent
    return [Path(), Path("configs"), package / "configs", package.parent / "configs"]


def find_config(name: str) -> Path:
    """The file of that path or bare name (`gpt3_xl.yaml`). Raises UserError with the nearest names."""
    for folder in config_folders():
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = sorted({p.name for folder in config_folders()[1:] for p in folder.glob("*.yaml")})
    raise UserError(f"config {name!r} not found: {did_you_mean(name, known)}")


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
    tree = _parse_yaml(text, str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not sections such as `model:` and `train:`")
    base = tree.pop("base", None)
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
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"override {text!r} is not of the form section.key=value, such as train.tokens=1e9")
    over: Any = _parse_yaml(value, f"override {text!r}")
    for part in reversed(key.split(".")):
        over = {part: over}
    return _merge(tree, with_current_keys(over, f"override {text!r}"))


def _valid_names(location: tuple[str | int, ...]) -> list[str]:
    """The keys that are valid in the section of the key at `location`."""
    kind: Any = Config
    for part in location[:-1]:  # the only list is that of the sources
        kind = fields_of(kind)[part].annotation if isinstance(part, str) else SourceConfig
    return list(fields_of(kind))


def _error_text(error: Any) -> str:
    location, value = error["loc"], error["input"]
    key = ".".join(map(str, location)) or "config"
    match error["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key {key}: {did_you_mean(str(location[-1]), _valid_names(location))}"
        case "missing":
            return f"{key} is missing"
        case "dataclass_type" | "dataclass_exact_type":
            return f"{key}: {value!r} is not a section with keys of its own"
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
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


def build_config(tree: dict[str, Any], where: str) -> Config:
    """Check a tree of plain values and make the Config; `where` names it in errors."""
    model = tree.get("model")
    if isinstance(model, dict) and model.get("preset"):
        try:
            tree = {**tree, "model": {**preset_fields(str(model["preset"])), **model}}
        except UserError as error:
            raise UserError(f"{where}: model.preset: {error}") from None
    try:
        # JSON mode is pydantic's strict mode for parsed files: no string passes for a number, no bool for an int.
        config = TypeAdapter(Config).validate_json(json.dumps(tree))
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_error_text(e) for e in error.errors())) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    if problems := list(contradictions(config)):
        raise UserError(f"{where}: " + "; ".join(problems))
    return config


def _other_engine(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """The tree without the file's settings for another engine than the override names."""
    engine, over = tree.get("engine"), override({}, text).get("engine")
    if not isinstance(engine, dict) or not isinstance(over, dict) or "name" not in over:
        return tree
    return tree if over["name"] == engine.get("name", EngineConfig.name) else {**tree, "engine": {}}


def load_config(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a config by path or bare name, apply `section.key=value` overrides, check it. Raises UserError."""
    path = find_config(name)
    tree = _read_tree(path)
    for text in overrides:
        tree = _other_engine(tree, text)
    for text in overrides:
        tree = override(tree, text)
    where = str(path) + (f" with {' '.join(overrides)}" if overrides else "")
    config = build_config(tree, where)
    if not config.run.name:
        config = replace(config, run=replace(config.run, name=path.stem))
    return config


def to_yaml(config: Config) -> str:
    """The resolved run, every value spelled out; `load_config` reads it back to an equal Config."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False, allow_unicode=True)
