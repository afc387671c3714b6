"""A profile of real steps: its parts, its files, and that the engine is as it was."""

import contextlib
import gzip
import json
import re
from collections import defaultdict
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
from megagpt.profiling.trace import Trace, read_trace
from megagpt.world import World
from tests.profiling.conftest import BETWEEN_STEPS, Parts, Profiled

pytestmark = pytest.mark.usefixtures("known_rates")


def check_sums(parts: Parts) -> None:
    """All parts add up to the step, and so do the floors."""
    step = parts.pop("step")
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(step["seconds"], rel=1e-9)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    known = [part["floor_seconds"] for part in parts.values() if part["floor_seconds"]]
    assert step["floor_seconds"] == pytest.approx(sum(known))


def places(trace: Trace) -> dict[str, set[Part]]:
    """The parts in which each operator of the steps is found."""
    found: dict[str, set[Part]] = defaultdict(set)
    for span in trace.spans:
        if trace.in_a_step(span.begin):
            found[span.name].add(span.part)
    return found


def test_each_operator_of_real_steps_is_in_its_part(profiled: Profiled, tmp_path: Path) -> None:
    parts = profiled(width=64, layers=2)
    check_sums(parts)
    assert parts[Part.HEAD]["flops"] == 6 * 50304 * 64 * 64
    assert parts[Part.PRODUCTS]["flops"] == 6 * 2 * 12 * 64**2 * 64
    trace = read_trace(tmp_path / "rank_0.json.gz")
    found = places(trace)
    assert found["aten::addmm"] == {Part.PRODUCTS}
    assert found["aten::mm"] == {Part.PRODUCTS, Part.HEAD}
    assert found["aten::native_layer_norm"] == {Part.BLOCKS, Part.HEAD}
    assert found["aten::gelu"] == found["aten::gelu_backward"] == {Part.BLOCKS}
    assert found["aten::embedding"] == {Part.EMBEDDING}
    assert found["aten::_fused_adamw_"] == {Part.OPTIMIZER}
    for direction in ("", "_backward"):
        assert found[f"aten::_scaled_dot_product_flash_attention_for_cpu{direction}"] == {Part.ATTENTION}
    assert BETWEEN_STEPS in {span.name for span in trace.spans}
    assert BETWEEN_STEPS not in found


@pytest.mark.slow
@pytest.mark.xdist_group("compiler")
def test_compiled_parts_are_profiled_as_they_run(
    profiled: Profiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not compiled again. Products and attention keep their parts, and the graphs are where they belong."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # processes that would each import PyTorch
    torch._dynamo.reset()
    counters.clear()
    parts = profiled({"compile": True})
    assert counters["stats"]["unique_graphs"] > 0
    check_sums(parts)
    found = places(read_trace(tmp_path / "rank_0.json.gz"))
    assert found["aten::mm"] == {Part.PRODUCTS, Part.HEAD}
    assert found["aten::_scaled_dot_product_flash_attention_for_cpu"] == {Part.ATTENTION}
    graphs = [parts for name, parts in found.items() if name.startswith("## Call CompiledFxGraph")]
    # Of the blocks, those of forward and backward; those of the last LayerNorm and of the softmax.
    assert all(len(parts) == 1 for parts in graphs)
    assert set.union(*graphs) == {Part.BLOCKS, Part.HEAD}
    assert found["CompiledFunctionBackward"] == {Part.BLOCKS, Part.HEAD}


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
    found = json.loads((tmp_path / "parts.json").read_text())
    assert (found["device"], found["ranks"], found["steps"], found["batch_sequences"]) == ("cpu", 1, [3, 4], [2, 2])
    assert found["versions"]["torch"] == torch.__version__
    assert found["config"]["model"]["width"] == 32


def test_a_second_profile_replaces_the_first(profiled: Profiled, tmp_path: Path) -> None:
    """The first one was of more ranks, and was killed while one of them wrote."""
    for old in ("rank_7.json.gz", "rank_8.json.gz.tmp", "parts.json", "events.out.tfevents.1"):
        (tmp_path / old).write_text("old")
    profiled(vocab_size=256)
    left = [path.name for path in tmp_path.iterdir() if "tfevents" not in path.name]
    assert sorted(left) == ["memory.png", "parts.json", "parts.txt", "rank_0.json.gz"]
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
    trace = Trace([(0, 1000)], [], True, phases, [(100, 2**20, 4 * 2**20), (500, 3 * 2**20, 4 * 2**20), (501, 0, 0)])
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
