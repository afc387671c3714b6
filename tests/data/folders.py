"""Folders of shards: written as llm.c writes them, read whole, and described as a config's data section."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megagpt.config import DataConfig, SourceConfig
from megagpt.data.shards import open_stream
from megagpt.errors import UserError

CONTEXT = 8


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_all(folder: Path) -> dict[str, list[int]]:
    streams = {split: open_stream(folder, split) for split in ("train", "val")}
    return {split: stream.read(0, stream.tokens).tolist() for split, stream in streams.items()}


def write_bin(
    path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None
) -> Path:
    """As llm.c's data scripts write it: 256 int32 of header, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return path


def data_of(folders: list[Path], weights: tuple[float, ...] = (0.5, 0.2, 0.3)) -> DataConfig:
    return DataConfig(sources=tuple(SourceConfig(str(f), w) for f, w in zip(folders, weights, strict=False)))
