"""Sources at relative paths, of a run that is resumed elsewhere than it was started."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from megagpt.config import DataConfig
from megagpt.config_yaml import value_text
from megagpt.console import say
from megagpt.data.builtin import builtin_folder
from megagpt.data.stdlib_text import BUILTIN
from megagpt.errors import UserError
from megagpt.files import named_path


def locate(data: DataConfig, starts: Sequence[Path]) -> DataConfig:
    """The same config with the place of each relative path that leads nowhere from the current folder, but does from
    one of `starts`, the folders where the run was started. Raises UserError, with the folders, if a path leads nowhere
    from all of them."""
    sources = tuple(dataclasses.replace(s, path=_place(s.path, data, starts)) for s in data.sources)
    cache = data.cache
    if any(source.path == BUILTIN for source in data.sources):
        here = builtin_folder(data)
        cache = next((str(s / data.cache) for s in starts if not here.exists() and (s / here).exists()), cache)
    return dataclasses.replace(data, sources=sources, cache=cache)


def place_from(name: str, starts: Sequence[Path]) -> str:
    """The place of a relative path that leads nowhere from the current folder, but does from one of `starts`; in every
    other case the path itself."""
    path = named_path(name)
    if not path.is_absolute() and not path.exists():
        for start in starts:
            if (start / path).exists():
                say(f"{name}: not in {Path.cwd()}; taken from {start}, where the run was started")
                return str(start / path)
    return name


def _place(name: str, data: DataConfig, starts: Sequence[Path]) -> str:
    if name == BUILTIN or not starts:
        return name
    path = named_path(found := place_from(name, starts))
    if path.is_absolute() or path.exists():
        return found
    places = " or ".join(map(str, [Path.cwd(), *starts]))
    listed = [{"path": "FOLDER" if s.path == name else s.path, "weight": s.weight} for s in data.sources]
    way = shlex.quote(f"data.sources={value_text(listed)}")
    raise UserError(f"{name}: no such folder in {places}; name its place: {way}")
