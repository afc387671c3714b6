"""`megagpt evaluate --harness` as far as it goes without lm-evaluation-harness."""

import contextlib
import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megagpt.evaluation import harness_tasks
from megagpt.world import World
from tests.conftest import Refusal


def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refusal(["evaluate", str(tmp_path), "--harness", "--tasks", "mmlu"], "install it: ", "[harness]")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--tasks", "piqa", "--download"], ["--download is for the tasks of --harness"]),
        (["--tasks", "piqa", "--include-path", "."], ["--include-path is for the tasks of --harness"]),
        (["--harness"], ["no task is named", "--tasks"]),
        (["--harness", "--tasks", "piqa", "--data", "."], ["--data is not for --harness", "--include-path"]),
        (["--harness", "--tasks", "piqa", "--stride", "4"], ["--stride is not for --harness"]),
        (["--harness", "--tasks", "piqa", "--shots", "paper"], ["--shots paper is not for --harness"]),
    ],
)
def test_options_of_the_other_kind_are_refused(
    options: list[str], parts: list[str], tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    refusal(["evaluate", str(tmp_path), *options], *parts)
    if "--harness" in options:
        refusal(["evaluate", "--harness", "--tasks", "piqa"], "no model is named")


@pytest.mark.parametrize("first", [True, False])
def test_one_rank_of_each_host_fetches_rows_first(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank loads them once, and no rank waits in a collective, which has a time limit."""
    happened: list[str] = []

    class Rank(World):
        def once_per_host(self, function: Any, what: str) -> None:  # type: ignore[override]
            if first:
                function()
            happened.append("host is ready")

        def from_main(self, *arguments: Any) -> None:  # type: ignore[override]
            raise AssertionError("waits in a collective")

    def load(*arguments: Any) -> list[str]:
        happened.append("load")
        return ["task"]

    monkeypatch.setattr(
        harness_tasks,
        "_manager",
        lambda *arguments, **named: SimpleNamespace(all_subtasks=["piqa"], all_tasks=["piqa"]),
    )
    monkeypatch.setattr(harness_tasks, "_load", load)
    monkeypatch.setattr(harness_tasks, "surroundings", lambda *arguments: contextlib.nullcontext())
    rank = Rank(**{field.name: getattr(World.alone("cpu"), field.name) for field in dataclasses.fields(World)})
    assert harness_tasks.load_tasks(harness_tasks.Asked(["piqa"]), rank) == ["task"]
    assert happened == (["load", "host is ready"] if first else ["host is ready", "load"])
