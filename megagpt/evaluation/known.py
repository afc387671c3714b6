"""The scores of published models, to print beside a model's own."""

import contextlib
import importlib
from typing import Any


def known_scores(task: str, score: str, shots: int) -> list[dict[str, Any]]:
    """What is known of a task by that score and with that many shots (0, 1 or more): label, value, convention and
    source of each."""
    with contextlib.suppress(ModuleNotFoundError):
        exams = importlib.import_module("megagpt.references.exams")
        fields = ("label", "value", "convention", "source", "model", "firm", "same_text")
        return [{key: getattr(found, key) for key in fields} for found in exams.references(task, score, shots)]
    return []
