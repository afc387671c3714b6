"""Writes a profile's table and picture, as files and for TensorBoard."""

import dataclasses
import io
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from megagpt import __version__
from megagpt.config import Config
from megagpt.files import write_atomic
from megagpt.hardware import device_name
from megagpt.profiling.table import Table
from megagpt.world import World

# Files of a profile, among them traces that were not finished.
_FILES = ("rank_*.json.gz", "rank_*.json.gz.tmp", "parts.txt", "parts.json", "memory.png", "events.out.tfevents.*")


def remove_report(folder: Path) -> None:
    """Remove an earlier profile, which may be of more ranks. Raises OSError."""
    for old in (path for pattern in _FILES for path in folder.glob(pattern)):
        old.unlink()


def circumstances(config: Config, world: World, steps: range, batches: Sequence[int]) -> dict[str, Any]:
    """Everything that the profile's numbers depend on, as `parts.json` has it."""
    versions: dict[str, str | None] = {
        "megagpt": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    versions |= {"cuda": torch.version.cuda, "hip": torch.version.hip} if world.device.type == "cuda" else {}
    return {
        "device": device_name(world.device),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "steps": list(steps),
        "batch_sequences": list(batches),
        "config": dataclasses.asdict(config),
    }


def write_report(folder: Path, table: Table, numbers: dict[str, Any], picture: Image.Image, step: int) -> None:
    """Write `parts.txt`, `parts.json`, `memory.png`, and TensorBoard's events at this step. Raises OSError."""
    write_atomic(folder / "parts.txt", f"{table.as_text()}\n\n{table.operators()}\n".encode())
    write_atomic(folder / "parts.json", json.dumps(numbers, indent=1).encode())
    png = io.BytesIO()
    picture.save(png, "PNG")
    write_atomic(folder / "memory.png", png.getvalue())
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("profile/parts", table.as_markdown(), step)
        image = Summary.Image(
            encoded_image_string=png.getvalue(), height=picture.height, width=picture.width, colorspace=3
        )
        # `add_image` takes pixels, which it would encode once more.
        summary = Summary(value=[Summary.Value(tag="profile/memory", image=image)])
        writer.file_writer.add_summary(summary, step)
