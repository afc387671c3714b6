"""Shared by several tests: a small corpus, a small run, and the reading of its metrics."""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from megagpt.cli import main
from megagpt.data.prepare import prepare
from megagpt.data.sources import open_source
from tests import processes

Tiny = Callable[..., Path]
"""Type of the fixture `tiny`: (**sections) -> path of a config."""
Refusal = Callable[..., str]
"""Type of the fixture `refusal`: (arguments, *parts) -> the line."""


def pytest_configure() -> None:
    settings.register_profile("any machine", deadline=None)  # a busy one takes its time
    settings.load_profile("any machine")
    torch.set_num_threads(1)  # two threads of a busy machine wait for each other
    gc.disable()  # until all tests are imported: they stay


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that need a cluster, kill again and again, or are about time as slow ones. Files with slow tests
    come first: at the end, when one of two processes has nothing left to do, the other one is nearly done."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("cluster", "drill", "timing")):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Imports and tests live as long as the process: Python's collector need not look at them in each run."""
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # a run ends by unfreezing all
    gc.enable()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> Tiny:
    """Writes a tiny run's config and gives its path."""
    return lambda **sections: write_tiny(tmp_path, corpus, **sections)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs a command that must be refused, with exit code 2 and one line that has all the parts; gives the line."""

    def refused(arguments: list[str], *parts: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("megagpt: error: ")
        assert error.count("\n") == 1, error
        for part in parts:
            assert part in error
        return error

    return refused


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    """Kills what a test has started and left."""
    yield
    processes.end_all()


def make_corpus(folder: Path) -> Path:
    """A prepared corpus of about 60,000 tokens in 200 documents."""
    rows = [
        json.dumps({"text": f"Document {i}: " + " ".join(str(i * j % 997) for j in range(150))}) for i in range(200)
    ]
    (folder / "text.jsonl").write_text("\n".join(rows))
    prepare(open_source(str(folder / "text.jsonl")), folder / "shards", val_fraction=0.1, workers=1)
    return folder / "shards"


def write_tiny(folder: Path, corpus: Path, **sections: Any) -> Path:
    """The config of a tiny run below `folder`: 20 steps of 4 sequences of 32 tokens, but for what `sections` say."""
    tree: dict[str, Any] = {
        "model": {"layers": 2, "width": 32, "heads": 2, "context": 32},
        "run": {"folder": str(folder / "runs"), "name": "tiny"},
        "data": {"sources": [{"path": str(corpus)}]},
        "train": {"tokens": 2560, "batch_tokens": 128, "micro_batch": 4, "precision": "fp32", "device": "cpu"},
        "schedule": {"warmup_tokens": 512, "decay_end_tokens": 2560},
        "validation": {"every_tokens": 0, "tokens": 640},
        "sampling": {"samples": 1, "max_tokens": 4, "every_tokens": 0},
        "checkpoint": {"every_tokens": 0},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def metrics(run: Path, event: str = "step") -> list[dict[str, Any]]:
    """The lines of that event in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]
