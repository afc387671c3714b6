"""The texts that a run was trained on, as its incarnations have noted them."""

from typing import Any

from megagpt.exchange.exporting import was_all_data
from megagpt.incarnations import list_incarnations
from megagpt.report.record import Record


def texts_of(record: Record) -> list[dict[str, Any]]:
    """`folder`, `text` and `tokens` of each source, by the newest incarnation that noted them; empty if none did."""
    return next((texts for start in reversed(_starts(record)) if (texts := _texts(start))), [])


def names_of(record: Record) -> list[str]:
    """The names of the run's newest texts: their data sets, else their folders."""
    return _names(texts_of(record)) or [source.path for source in record.config.data.sources]


def all_names_of(record: Record) -> list[str]:
    """The names of all texts that the run may have been trained on; "" for one without a note."""
    if not were_changed(record):
        return names_of(record)
    return [name for start in _starts(record) for name in _names(_texts(start)) or [""]]


def were_changed(record: Record) -> bool:
    """Whether some of the run's tokens are of other data or of another mixture than its newest. A run without any
    record of its starts counts as unchanged."""
    starts = _starts(record)
    newest: dict[str, float] = next((start["data"] for start in reversed(starts) if "data" in start), {})
    return bool(starts) and not was_all_data(newest, record.reached, record.folder)


def _starts(record: Record) -> list[dict[str, Any]]:
    return [incarnation.start() for incarnation in list_incarnations(record.folder)]


def _texts(start: dict[str, Any]) -> list[dict[str, Any]]:
    texts = start.get("texts")
    return texts if isinstance(texts, list) and all(isinstance(text, dict) for text in texts) else []


def _names(texts: list[dict[str, Any]]) -> list[str]:
    return [str(name) for text in texts if (name := text.get("text") or text.get("folder"))]
