"""A corpus that every machine has: the text of Python's standard library, prepared on first use."""

import dataclasses
import sys
from pathlib import Path

from megagpt.config import DataConfig
from megagpt.console import say
from megagpt.data.prepare import prepare
from megagpt.data.shards import MANIFEST
from megagpt.data.sources import open_source
from megagpt.data.stdlib_text import BUILTIN
from megagpt.files import named_path
from megagpt.world import World

_PYTHON = ".".join(map(str, sys.version_info[:3]))
# Share of documents held out. The corpus is small: the usual half per cent would leave too little to validate on.
_BUILTIN_VAL_FRACTION = 0.1


def builtin_folder(data: DataConfig) -> Path:
    """The folder of the built-in corpus, which need not be prepared yet."""
    return named_path(data.cache) / f"{BUILTIN}-python{_PYTHON}"


def with_builtin_folder(data: DataConfig) -> DataConfig:
    """The same config with the folder of its shards for `stdlib`."""
    folder = str(builtin_folder(data))
    sources = tuple(dataclasses.replace(s, path=folder) if s.path == BUILTIN else s for s in data.sources)
    return dataclasses.replace(data, sources=sources)


def prepare_builtin(data: DataConfig, world: World) -> DataConfig:
    """`with_builtin_folder`; the main rank prepares the folder on first use."""
    if all(source.path != BUILTIN for source in data.sources):
        return data
    folder = builtin_folder(data)
    if world.is_main and not (folder / MANIFEST).exists():
        say(f"preparing the text of Python {_PYTHON}'s standard library in {folder}")
        # One worker: starting a process takes longer than encoding this little text.
        prepare(open_source(BUILTIN), folder, val_fraction=_BUILTIN_VAL_FRACTION, workers=1)
    world.barrier()
    return with_builtin_folder(data)
