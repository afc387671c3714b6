"""The scores of published models, to print beside a model's own."""

from typing import Any

from megagpt.references.exams import references


def known_scores(task: str, score: str, shots: int, same_text: bool = True) -> list[dict[str, Any]]:
    """The published scores of a task by that score and with that many shots (0, 1 or more): label, value, convention
    and source of each. `same_text`: whether the rows have the text that the published scores are of."""
    fields = ("label", "value", "convention", "source", "model", "shots", "firm", "same_text")
    found = [{key: getattr(reference, key) for key in fields} for reference in references(task, score, shots)]
    return [{**reference, "same_text": reference["same_text"] and same_text} for reference in found]
