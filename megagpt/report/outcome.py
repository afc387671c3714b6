"""The plan of a run against its outcome: memory, speed and time, as the run's log has them."""

import math
from typing import NamedTuple

from megagpt.console import duration
from megagpt.report.record import Record, number

_UNKNOWN = "unknown"


class Compared(NamedTuple):
    """One quantity."""

    what: str
    planned: str
    measured: str
    off: str
    """Measured over planned, as a difference in percent; empty if one of them is unknown."""


def plan_against_outcome(record: Record) -> list[Compared]:
    """Rows of the last comparison that the run logged; empty if it logged none, as on a CPU."""
    line = record.plan
    if line is None:
        return []
    rows, gb = list[Compared](), 1e9
    planned, measured = (number(line.get(f"{kind}_memory_bytes")) for kind in ("predicted", "measured"))
    rows.append(_row("peak memory of a rank (GB)", planned / gb, measured / gb, "{:,.1f}"))
    planned, measured = (number(line.get(f"{kind}_tokens_per_second")) for kind in ("predicted", "measured"))
    low, high = (number(line.get(f"predicted_tokens_per_second_{end}")) for end in ("low", "high"))
    row = _row("tokens per second", planned, measured, "{:,.0f}")
    if math.isfinite(low + high):
        row = row._replace(planned=f"{row.planned} ({low:,.0f} to {high:,.0f})")
    rows.append(row)
    seconds = number(line.get("predicted_run_seconds"))
    total = record.config.total_sequences * record.config.model.context
    took, share = float(record.training_seconds[-1]) if len(record.tokens) else math.nan, record.reached / total
    if share >= 1:
        rows.append(_row("days of all steps", seconds / 86_400, took / 86_400, "{:,.3g}"))
    elif math.isfinite(seconds) and math.isfinite(took):
        so_far = f"{duration(took)} for the first {share:.1%} of the tokens"
        rows.append(Compared("days of all steps", f"{seconds / 86_400:,.3g}", so_far, ""))
    return [row for row in rows if row.planned != _UNKNOWN]


def _row(what: str, planned: float, measured: float, form: str) -> Compared:
    one, two = (form.format(value) if math.isfinite(value) and value > 0 else _UNKNOWN for value in (planned, measured))
    return Compared(what, one, two, "" if _UNKNOWN in (one, two) else f"{measured / planned - 1:+.1%}")
