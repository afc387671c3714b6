"""Writes a profile's table and picture, as files and for TensorBoard."""

import io
import json
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from megagpt.files import write_atomic
from megagpt.profiling.memory_picture import memory_picture
from megagpt.profiling.table import Table
from megagpt.profiling.trace import Trace


def write_report(folder: Path, table: Table, trace: Trace, memory_title: str, step: int) -> None:
    """Write `parts.txt`, `parts.json`, `memory.png`, and TensorBoard's events at this step in place of earlier ones.
    Raises OSError."""
    write_atomic(folder / "parts.txt", f"{table.as_text()}\n\n{table.operators()}\n".encode())
    write_atomic(folder / "parts.json", json.dumps(table.as_json(), indent=1).encode())
    picture = memory_picture(trace, memory_title)
    png = io.BytesIO()
    picture.save(png, "PNG")
    write_atomic(folder / "memory.png", png.getvalue())
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("profile/parts", table.as_markdown(), step)
        image = Summary.Image(
            encoded_image_string=png.getvalue(), height=picture.height, width=picture.width, colorspace=3
        )
        # `add_image` takes pixels, which it would encode once more.
        summary = Summary(value=[Summary.Value(tag="profile/memory", image=image)])
        writer.file_writer.add_summary(summary, step)
