"""The corpus that is on every machine: the text of Python's standard library, prepared on first use."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from megagpt.config import DataConfig
from megagpt.data.prepare import prepare
from megagpt.data.shards import MANIFEST
from megagpt.data.sources import open_source
from megagpt.world import World

BUILTIN = "stdlib"
# One document in ten: of so small a corpus, validation needs more than a half per cent.
_BUILTIN_VAL_FRACTION = 0.1


def prepare_builtin(data: DataConfig, world: World, say: Callable[[str], None]) -> DataConfig:
    """The same config with `stdlib` replaced by its shards, which the main rank prepares on first use."""
    if all(source.path != BUILTIN for source in data.sources):
        return data
    version = ".".join(map(str, sys.version_info[:3]))
    folder = Path(data.cache).expanduser() / f"{BUILTIN}-python{version}"
    if world.is_main and not (folder / MANIFEST).exists():
        say(f"preparing the text of Python {version}'s standard library in {folder}")
        # So little text is encoded sooner than processes start.
        prepare(open_source(BUILTIN), folder, val_fraction=_BUILTIN_VAL_FRACTION, workers=1)
    world.barrier()
    sources = tuple(
        dataclasses.replace(source, path=str(folder)) if source.path == BUILTIN else source for source in data.sources
    )
    return dataclasses.replace(data, sources=sources)
