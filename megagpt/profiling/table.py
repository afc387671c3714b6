"""The table of a profile: for people, for TensorBoard, and as JSON."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from megagpt.config import Config
from megagpt.planning.exchange import exchanged_bytes
from megagpt.planning.setting import vary
from megagpt.profiling.breakdown import Breakdown
from megagpt.profiling.floors import Floor, Work, floor, work
from megagpt.profiling.parts import Part
from megagpt.profiling.rates import DATA_SHEET, Rates
from megagpt.schedule import Cut

_HEAD = ("part", "ms a step", "share", "floor ms", "x floor", "floor from")
# Longest name of an operator that is shown: names of kernels hold all their template's arguments.
_LONGEST = 60
_FLOAT8 = "the floor of the blocks' matrix products is at twice this rate"
_FLOAT8_UNKNOWN = "the peak of such products is unknown, so the blocks' matrix products have no floor"


class Row(NamedTuple):
    """A part of the step."""

    part: str
    seconds: float
    share: float
    """Of the step."""
    floor: Floor | None
    work: Work | None

    def cells(self) -> tuple[str, ...]:
        """The row's texts, one for each column."""
        least, ratio, source = "", "", ""
        if self.floor is not None and self.work is not None:
            least = f"{self.floor.seconds * 1e3:,.3f}"
            ratio = f"{self.seconds / self.floor.seconds:,.1f}" if self.floor.seconds else ""
            amount = self.work.moved or 0 if self.floor.bound == "bytes" else self.work.flops
            source = f"{amount:.3g} {self.floor.bound}"
        elif self.work is not None:
            least = "n/a"
            source = f"{self.work.moved:.3g} bytes sent" if self.work.moved and self.part == Part.EXCHANGE else ""
        return self.part, f"{self.seconds * 1e3:,.3f}", f"{self.share:.1%}", least, ratio, source


class Table(NamedTuple):
    """Everything that a profile says in numbers."""

    title: str
    rows: list[Row]
    """The parts that took time or have a floor; the last row is the whole step."""
    rates: Rates
    largest: dict[Part, list[tuple[str, float]]]
    notes: list[str]

    def as_text(self) -> str:
        """Aligned columns, and below them the largest operators of each part."""
        cells = [_HEAD, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [self.title]
        for line in cells:
            first, *numbers, last = (
                text.ljust(width) if i in (0, len(widths) - 1) else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            lines.append("  ".join([first, *numbers, last]).rstrip())
        return "\n".join([*lines, *self.notes])

    def operators(self) -> str:
        """The operators that take most of each part."""
        lines = ["operators that take most of each part (ms a step; on a GPU, kernels that overlap count twice):"]
        for part in (part for part in Part if self.largest.get(part)):
            lines.append(part)
            for name, seconds in self.largest[part]:
                lines.append(f"  {seconds * 1e3:10,.3f}  {name if len(name) <= _LONGEST else name[:_LONGEST] + '...'}")
        return "\n".join(lines)

    def as_markdown(self) -> str:
        """For TensorBoard's tab "Text"."""
        lines = [_HEAD, ("---", *["---:"] * 4, "---"), *(row.cells() for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([self.title, table, *self.notes])

    def as_json(self) -> dict[str, Any]:
        """The same numbers in SI units."""
        return {
            "title": self.title,
            "rates": self.rates._asdict(),
            "parts": {
                row.part: {
                    "seconds": row.seconds,
                    "share": row.share,
                    "floor_seconds": row.floor.seconds if row.floor else None,
                    "floor_from": row.floor.bound if row.floor else None,
                    "flops": row.work.flops if row.work else None,
                    "bytes": row.work.moved if row.work else None,
                }
                for row in self.rows
            },
            "notes": self.notes,
        }


def make_table(
    config: Config, ranks: int, cuts: Sequence[Cut], found: Breakdown, rates: Rates, title: str, notes: list[str]
) -> Table:
    """The table of rank 0. `cuts`: the micro-batches of each step."""
    micro_batches = statistics.fmean(cut.micro_batches for cut in cuts)
    todo = work(config, ranks, micro_batches, statistics.fmean(cut.sequences for cut in cuts))
    floors = {part: floor(todo[part], rates) for part in todo}
    notes = [f"floors: FLOPs or bytes, whichever takes longer, at {rates}", *notes]
    if config.train.float8 != "none":
        # Only a data sheet's peak says that it is the one of bf16.
        known = rates.flops_source == DATA_SHEET
        floors[Part.PRODUCTS] = floors[Part.PRODUCTS] if known else None
        notes.append(f"train.float8 {config.train.float8}: {_FLOAT8 if known else _FLOAT8_UNKNOWN}")
    if ranks > 1:
        sent = [
            exchanged_bytes(vary(config, train={"micro_batch": cut.size}), ranks, cut.micro_batches) for cut in cuts
        ]
        todo[Part.EXCHANGE] = Work(0, statistics.fmean(sent))
    rows = [
        Row(part, found.seconds[part], found.seconds[part] / found.step_seconds, floors.get(part), todo.get(part))
        for part in Part
        if found.seconds[part] or part in todo or part is Part.HOST
    ]
    least = [known for known in floors.values() if known is not None]
    whole = Floor(sum(known.seconds for known in least), "FLOPs in all")
    flops = sum(part.flops for part in todo.values())
    rows.append(Row("step", found.step_seconds, 1.0, whole, Work(flops, None)))
    return Table(title, rows, rates, found.largest, notes)
