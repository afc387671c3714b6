"""Every key of the config with its default, its values and its meaning: what `megagpt config --keys` shows."""

import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from megagpt.config import Config, SkipConfig, SourceConfig
from megagpt.config_marks import Change, For, Values, fields_of, mark_of
from megagpt.errors import UserError, did_you_mean

_WIDTH, _INDENT = 100, "    "  # columns
_LISTS = {"data.sources": SourceConfig, "data.skip": SkipConfig}
_TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "mapping"}
_BOUNDS = {annotated_types.Gt: ">", annotated_types.Ge: ">=", annotated_types.Lt: "<", annotated_types.Le: "<="}


@dataclass(frozen=True)
class Key:
    """One key of the config."""

    name: str
    """Such as train.tokens, or data.sources[].path for the items of a list."""
    field: FieldInfo

    @property
    def text(self) -> str:
        return " ".join((self.field.description or "").split())

    @property
    def default_value(self) -> Any:
        """PydanticUndefined if there is none."""
        return self.field.get_default(call_default_factory=True, validated_data={})

    @property
    def default(self) -> str:
        """As YAML; "required" if there is none."""
        value = self.default_value
        if value is PydanticUndefined:
            return "required"
        text = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=10**6, allow_unicode=True)
        return text.removesuffix("...\n").strip()

    @property
    def values(self) -> str:
        """Type or allowed values, and bounds."""
        named = mark_of(self.field, Values)
        bounds = [f"{sign} {getattr(mark, kind.__name__.lower()):g}" for mark in self.field.metadata
                  for kind, sign in _BOUNDS.items() if isinstance(mark, kind)]  # fmt: skip
        return " ".join([named.text if named else _type_text(self.field.annotation), " and ".join(bounds)]).strip()

    def lines(self) -> Iterator[str]:
        """Lines for people."""
        mark = mark_of(self.field, For)
        only = f"engine.name {' or '.join(mark.engines)} only; " if mark else ""
        yield f"{self.name} = {self.default}"
        change = mark_of(self.field, Change)
        yield f"{_INDENT}{self.values}; {only}{change.value if change else ''}"
        yield textwrap.indent(textwrap.fill(self.text, _WIDTH, break_on_hyphens=False), _INDENT)


def all_keys() -> list[Key]:
    """Every key, in the order of config.py."""
    keys = []
    for section, field in fields_of(Config).items():
        keys += [Key(f"{section}.{name}", inner) for name, inner in fields_of(field.annotation).items()]
    for name, item in _LISTS.items():
        at = next(i for i, key in enumerate(keys) if key.name == name)
        keys[at + 1 : at + 1] = [Key(f"{name}[].{inner}", field) for inner, field in fields_of(item).items()]
    return keys


def keys_marked(change: Change) -> list[Key]:
    """All keys with that mark."""
    return [key for key in all_keys() if mark_of(key.field, Change) is change]


def find_keys(word: str) -> list[Key]:
    """The keys that have a word in their name or their text. Raises UserError if there is none."""
    keys = all_keys()
    found = [key for key in keys if word.lower() in f"{key.name} {key.text}".lower()]
    if not found:
        names = dict.fromkeys(name for key in keys for name in (key.name.rpartition(".")[2], key.name))
        raise UserError(f"no key of the config has {word!r} in its name or text: {did_you_mean(word, names)}")
    return found


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list"
    kind = get_origin(annotation) or annotation
    if kind is types.UnionType:
        return " or ".join(_type_text(part) for part in get_args(annotation))
    return _TYPES[kind]
