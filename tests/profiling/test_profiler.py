"""A profile of real steps: its parts, its files, and that the engine is as it was."""

import contextlib
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters

from megagpt.config_file import build_config
from megagpt.engines.engine import build_engine
from megagpt.profiling import memory_picture, ranges
from megagpt.profiling.parts import Part
from megagpt.profiling.trace import Trace
from megagpt.world import World
from tests.profiling.conftest import Parts, Profiled

pytestmark = pytest.mark.usefixtures("known_rates")


def largest(parts: Parts) -> str:
    """The part that takes longest. All parts add up to the step, and a floor is no time that was beaten."""
    step = parts.pop("step")
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(step["seconds"], rel=1e-9)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    known = [part["floor_seconds"] for part in parts.values() if part["floor_seconds"]]
    assert step["floor_seconds"] == pytest.approx(sum(known))
    return max(parts, key=lambda name: parts[name]["seconds"])


def test_a_wide_vocabulary_makes_the_head_the_largest_part(profiled: Profiled) -> None:
    parts = profiled(width=64)
    assert largest(parts) == Part.HEAD
    assert parts[Part.HEAD]["share"] > 0.4
    assert parts[Part.HEAD]["flops"] == 6 * 50304 * 64 * 64


def test_wide_blocks_make_their_matrix_products_the_largest_part(profiled: Profiled) -> None:
    parts = profiled(vocab_size=256, width=384, context=128, heads=8)
    assert largest(parts) == Part.PRODUCTS
    assert parts[Part.PRODUCTS]["flops"] == 6 * 12 * 384**2 * 256


def test_a_long_context_makes_attention_the_largest_part(profiled: Profiled) -> None:
    parts = profiled(vocab_size=256, context=768, layers=4)
    assert largest(parts) == Part.ATTENTION


@pytest.mark.slow
def test_compiled_blocks_are_profiled_as_they_run(profiled: Profiled) -> None:
    """They are not compiled again, and their products and attention still have lines of their own."""
    counters.clear()
    parts = profiled({"compile": True}, vocab_size=256, width=128, context=128, layers=2)
    assert counters["stats"]["unique_graphs"] > 0
    largest(parts)
    for part in (Part.PRODUCTS, Part.ATTENTION, Part.BLOCKS):
        assert parts[part]["seconds"] > 0


def test_the_files_show_the_same_steps(profiled: Profiled, tmp_path: Path) -> None:
    profiled(vocab_size=256)
    with gzip.open(tmp_path / "rank_0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [name for name in names if name.startswith("ProfilerStep#")] == ["ProfilerStep#3", "ProfilerStep#4"]
    assert [names.count(name) for name in (ranges.MICRO_BATCH, ranges.FORWARD, ranges.BLOCK, ranges.UPDATE)] == [2] * 4
    text = (tmp_path / "parts.txt").read_text()
    assert text.startswith("test: steps 3 to 4 of 2 sequences, rank 0 of 1, ddp on 1 x cpu\n")
    assert "floors: FLOPs or bytes, whichever takes longer, at 1 TFLOP/s (data sheet), 100 GB/s (data sheet)" in text
    assert re.search(r"\nblocks, matrix products\n +[\d.]+  aten::", text)
    board = EventAccumulator(str(tmp_path), {"images": 0, "tensors": 0})
    board.Reload()
    (shown,) = board.Images("profile/memory")
    assert (shown.step, shown.encoded_image_string) == (4, (tmp_path / "memory.png").read_bytes())
    (table,) = board.Tensors("profile/parts/text_summary")
    assert b"| blocks, matrix products |" in table.tensor_proto.string_val[0]
    # A second profile of the same steps replaces the first.
    profiled(vocab_size=256)
    assert len(list(tmp_path.glob("events.*"))) == 1


def test_the_engine_is_left_as_it_was() -> None:
    model = {"layers": 2, "width": 32, "heads": 2, "context": 32, "vocab_size": 256}
    train = {"tokens": 64, "batch_tokens": 64, "precision": "fp32", "device": "cpu"}
    engine = build_engine(build_config({"model": model, "train": train}, "test"), World.alone())

    def methods() -> list[Any]:
        owners = [engine, engine.model, *engine.model.blocks]
        return [dict(vars(owner)) for owner in owners]

    before = methods()
    with contextlib.suppress(RuntimeError), ranges.marked(engine):
        assert methods() != before
        raise RuntimeError
    assert methods() == before


def test_the_picture_shows_the_memory_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = [(0, 600, ranges.MICRO_BATCH), (0, 300, ranges.FORWARD), (700, 900, ranges.UPDATE)]
    trace = Trace(0, 1000, 1, [], True, phases, [(100, 2**20, 4 * 2**20), (500, 3 * 2**20, 4 * 2**20), (501, 0, 0)])
    edges = np.linspace(0, 1000, 11)
    allocated, reserved = memory_picture.fullest(trace, edges)
    assert (allocated / 2**20).tolist() == [1, 1, 1, 1, 3, 3, 0, 0, 0, 0]
    assert (reserved / 2**20).tolist() == [4] * 6 + [0] * 4
    assert memory_picture.activities(trace, edges) == [
        *["forward"] * 3, *["backward"] * 3, "between steps", *["update"] * 2, "between steps",
    ]  # fmt: skip
    picture = memory_picture.memory_picture(trace, "a title")
    assert isinstance(picture, Image.Image)
    blue, ground = (0x56, 0xB4, 0xE9), (255, 255, 255)
    column = memory_picture._LEFT + 270  # a quarter of the time: 1 MiB of 4
    heights = [y for y in range(picture.height) if picture.getpixel((column, y)) == blue]
    whole = picture.height - memory_picture._TOP - memory_picture._BOTTOM
    assert len(heights) == pytest.approx(whole / 4 / 1.05, abs=3)
    assert picture.getpixel((memory_picture._LEFT + 5, picture.height - memory_picture._BOTTOM - 5)) in (blue, ground)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_gpu_whose_kernels_are_not_traced_is_named(
    profiled: Profiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megagpt.profiling import profiler

    monkeypatch.setattr(profiler.StepProfiler, "_on_gpu", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(AssertionError):
        profiled(vocab_size=256)
    assert "the trace has no kernels; set KINETO_LOG_LEVEL=0 to see why" in capsys.readouterr().err
    assert not list(tmp_path.glob("rank*"))
