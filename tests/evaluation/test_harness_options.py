"""Options that `megagpt evaluate --harness` refuses before lm-evaluation-harness is imported."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Refusal


def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refusal(["evaluate", str(tmp_path), "--harness", "--tasks", "mmlu"], "pip install 'megagpt[harness]'")


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
