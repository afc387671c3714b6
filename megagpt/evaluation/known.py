"""The scores of published models, to print beside a model's own."""

from typing import Any

from megagpt.references.exams import references


def known_scores(task: str, score: str, shots: int) -> list[dict[str, Any]]:
    """The known numbers of a task by that score and with that many shots (0, 1 or more): label, value, convention and
    source of each."""
    fields = ("label", "value", "convention", "source", "model", "firm", "same_text")
    return [{key: getattr(found, key) for key in fields} for found in references(task, score, shots)]
