"""A profile of a few steps of an engine, in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from megagpt.config_file import build_config
from megagpt.data.loader import Batch
from megagpt.engines.engine import build_engine
from megagpt.profiling import rates
from megagpt.profiling.profiler import StepProfiler
from megagpt.world import World

# An operator that runs between the profiled steps only, as a validation would.
BETWEEN_STEPS = "aten::i0"
Parts = dict[str, dict[str, Any]]
Profiled = Callable[..., Parts]


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with a data sheet: measuring takes a second."""
    monkeypatch.setattr(rates, "peak_flops", lambda *device: 1e12)
    monkeypatch.setattr(rates, "memory_bandwidth", lambda device: 1e11)


@pytest.fixture
def profiled(tmp_path: Path) -> Profiled:
    """Profiles the steps 3 and 4 of a model of that shape and gives `parts.json`'s parts; the files are in tmp_path."""

    def profile(train: dict[str, Any] | None = None, **shape: Any) -> Parts:
        model = {"layers": 1, "width": 32, "heads": 2, "context": 32, **shape}
        tokens = 2 * model["context"]
        limits = {"tokens": 8 * tokens, "batch_tokens": tokens, "micro_batch": 2, "precision": "fp32", "device": "cpu"}
        config = build_config({"run": {"name": "test"}, "model": model, "train": limits | (train or {})}, "test")
        engine = build_engine(config, World.alone())
        rows = torch.randint(model.get("vocab_size", 50257), (2, model["context"] + 1))
        batch = Batch([(rows[:, :-1], rows[:, 1:].contiguous())], 2, tokens)
        profiler = StepProfiler(engine, range(3, 5), tmp_path, rates.find_rates(config, torch.device("cpu")))
        graphs = []
        for step in range(1, 5):
            torch.ones(2).i0()
            profiler.begin(step)
            engine.train_step(batch, 1e-3)
            assert profiler.end(step, 2) == (step == 4)
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs == [graphs[0]] * 4, "compiled again because of the profile"
        profiler.write()
        assert not profiler.problem
        parts: Parts = json.loads((tmp_path / "parts.json").read_text())["parts"]
        return parts

    return profile
