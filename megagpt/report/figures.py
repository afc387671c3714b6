"""Curves as figures of matplotlib: losses, exams, speed and memory of one or several runs."""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megagpt.report.amounts import amount, power, score
from megagpt.report.lines import Level, exam_levels, has_published_text, loss_curves, loss_levels, shots_of
from megagpt.report.record import Axis, Bins, Points, Record, binned, some

# Most points of a curve of validations or exams that are drawn: about one for each pixel.
_MOST_POINTS = 600
# Part of a run in which the loss falls most: it would leave no room for the rest.
_FALL = 0.1
# Largest part of a reference curve beside an unfinished run, in lengths of what the run has done.
_AHEAD = 3.0
# Points of a curve of which all are in view, and of which each has a mark.
_FEW, _MARKED = 4, 60
_AXIS_LABELS = {"tokens": "tokens", "flops": "FLOPs of training", "hours": "hours of training"}
# Width and height of one panel (inches).
_PANEL = (5.6, 4.0)


@dataclass(frozen=True)
class Theme:
    """The colours of a picture. Those of the runs are from the palette of Okabe and Ito, which colour-blind people can
    tell apart."""

    ink: str
    paper: str
    grid: str
    reference: str
    runs: tuple[str, ...]


LIGHT = Theme(
    "#222222", "#ffffff", "#dddddd", "#666666",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#222222"),
)  # fmt: skip
DARK = Theme(
    "#e6e6e6", "#1b1d21", "#3a3d43", "#a8a8a8",
    ("#56b4e9", "#e69f00", "#2fbf93", "#cc79a7", "#f0e442", "#d55e00", "#e6e6e6"),
)  # fmt: skip
# Dashes of the reference lines, in turn.
_DASHES = ((0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 3)))


def themed(theme: Theme) -> contextlib.AbstractContextManager[None]:
    """Figures that are made and written in the block have these colours. Names of runs are texts, not formulas; text in
    an SVG stays text."""
    settings: dict[Any, Any] = {
        "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "megagpt", "font.size": 10,
        "font.family": ["DejaVu Sans"], "text.color": theme.ink, "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.grid, "xtick.color": theme.ink, "ytick.color": theme.ink, "xtick.labelsize": 9,
        "ytick.labelsize": 9, "axes.titlesize": 11, "legend.fontsize": 8.5, "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper, "savefig.facecolor": theme.paper, "axes.grid": True, "grid.color": theme.grid,
        "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.labelcolor": theme.ink, "lines.linewidth": 1.6,
    }  # fmt: skip
    return mpl.rc_context(settings)


def all_panels(
    records: Sequence[Record], axis: Axis, wanted: str, theme: Theme, tasks: Sequence[str] | None = None
) -> Figure:
    """One picture: the losses, and a panel for each exam. `wanted`: the references, as of `corpus_of`; `tasks`: the
    exams to show; None: all."""
    shown = [task for task in exam_names(records) if tasks is None or task in tasks]
    count = 1 + len(shown)
    columns = min(3, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(columns * _PANEL[0], rows * _PANEL[1]), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    draw_losses(grid[0], theme, records, axis, wanted)
    for axes, task in zip(grid[1:], shown, strict=False):
        draw_exam(axes, theme, records, task, axis)
    for axes in grid[count:]:
        axes.remove()
    return figure


def exam_names(records: Sequence[Record]) -> list[str]:
    """The exams that one of the runs has taken."""
    return list(dict.fromkeys(task for record in records for task in record.exams))


def names(records: Sequence[Record]) -> list[str]:
    """The runs' names; their folders if two runs have the same name."""
    found = [record.name for record in records]
    return found if len(set(found)) == len(found) else [str(record.folder) for record in records]


def one_panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_PANEL, layout="constrained")
    return figure, figure.subplots()


def draw_losses(
    axes: Axes, theme: Theme, records: Sequence[Record], axis: Axis, wanted: str, restarts: Sequence[int] = ()
) -> None:
    """Validation losses; behind them the training losses, with the range of the steps if there is one run only.
    `restarts`: positions in tokens that get a mark."""
    alone = len(records) == 1
    curves: list[tuple[np.ndarray, np.ndarray]] = []
    for record, name, colour in zip(records, names(records), _colours(theme), strict=False):
        steps = binned(record.tokens, record.steps["loss"])
        along = record.along(axis, steps.tokens)
        curves.append((along, steps.mean))
        if alone:
            axes.fill_between(along, steps.low, steps.high, color=colour, alpha=0.15, linewidth=0)
        (line,) = axes.plot(along, steps.mean, color=colour, alpha=0.45, linewidth=1.0)
        points = record.validation
        if alone and len(along):
            line.set_label("training")
        elif not points.tokens:
            line.set_label(f"{name}: no validation yet" if len(along) else f"{name}: no step yet")
        if points.tokens:
            along, shown = _points(record, points, axis)
            curves.append((along, shown))
            label = f"{'validation' if alone else name}: {shown[-1]:.4f} at {amount(points.tokens[-1])} tokens"
            marks: dict[str, Any] = {"marker": "o", "markersize": 3} if len(shown) <= _MARKED else {}
            axes.plot(along, shown, color=colour, label=label, **marks)
    references = _draw_loss_references(axes, theme, records, axis, wanted)
    _limit(axes, curves, references)
    if restarts:
        places, where = records[0].along(axis, restarts), axes.get_xaxis_transform()
        signs: dict[str, Any] = {"marker": "^", "markersize": 7, "linestyle": "none", "clip_on": False, "zorder": 5}
        axes.plot(places, np.zeros(len(places)), transform=where, color=theme.reference, label="a restart", **signs)
    title = "Loss" if alone else "Validation loss (pale: training loss)"
    _finish(axes, title, axis, "nats per token")


def _draw_loss_references(axes: Axes, theme: Theme, records: Sequence[Record], axis: Axis, wanted: str) -> list[float]:
    """Draw the lines and curves of others; returns the losses that should be in view."""
    levels, end = loss_levels(records, wanted), max((_planned_end(record, axis) for record in records), default=0.0)
    in_view = [level.value for level in levels]
    for curve in loss_curves(records, wanted, axis):
        places, values = np.array(curve.places), np.array(curve.values)
        shown = places <= end
        if shown.any():
            axes.plot(places[shown], values[shown], color=theme.reference, label=curve.label, linewidth=1.2)
            in_view.append(values[shown].min())
    _levels(axes, levels, theme)
    return in_view


def draw_exam(axes: Axes, theme: Theme, records: Sequence[Record], task: str, axis: Axis) -> None:
    """A task's scores, each with one standard error to both sides."""
    in_view: list[float] = []
    for record, name, colour in zip(records, names(records), _colours(theme), strict=False):
        points = record.exams.get(task)
        if points is None:
            continue
        along, shown = _points(record, points, axis)
        errors = np.array([points.errors[i] for i in some(range(len(points.values)), _MOST_POINTS)])
        axes.fill_between(along, shown - errors, shown + errors, color=colour, alpha=0.2, linewidth=0)
        label = f"{name if len(records) > 1 else 'this run'}: {score(shown[-1])}{_how(record, task)}"
        axes.plot(along, shown, color=colour, label=label, marker="o" if len(shown) <= _MARKED else "", markersize=3)
        in_view += [value for value in shown if math.isfinite(value)]
    levels = exam_levels(records, task)
    _levels(axes, levels, theme)
    in_view += [level.value for level in levels]
    accuracy = bool(in_view) and max(in_view) <= 1
    if accuracy:
        digits = 0 if max(in_view) - min(in_view) > 0.03 else 1
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=digits))
    _finish(axes, task, axis, "accuracy ± its standard error" if accuracy else "score ± its standard error")


def _how(record: Record, task: str) -> str:
    """The difference between a run's exam and the usual one, for a legend."""
    shots = shots_of(record, task)
    parts = [f"{shots}-shot"] if shots else []
    parts += [] if has_published_text(record, task) else ["not the published text"]
    return f" ({', '.join(parts)})" if parts else ""


def draw_quantity(
    axes: Axes, theme: Theme, record: Record, column: str, axis: Axis, title: str, unit: float, percent: bool
) -> None:
    """A column of the steps in a unit: its mean over short stretches, and its range. `percent`: it is a share."""
    found = binned(record.tokens, record.steps[column] / unit)
    along, colour = record.along(axis, found.tokens), theme.runs[0]
    low, high = _usual(found)
    shade = found.low.clip(low, high), found.high.clip(low, high)
    axes.fill_between(along, *shade, color=colour, alpha=0.2, linewidth=0)
    axes.plot(along, found.mean, color=colour)
    axes.set_ylim(bottom=0, top=high * 1.08 if high > 0 else None)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high > 0.03 else 1))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    _finish(axes, title, axis, "")


def _usual(found: Bins) -> tuple[float, float]:
    """The range in which all means lie, and most of the values: a single odd step would flatten the curve."""
    means = found.mean[np.isfinite(found.mean)]
    if not len(means):
        return 0.0, 0.0
    highs = found.high[np.isfinite(found.high)]
    return 0.0, float(max(means.max(), np.quantile(highs, 0.9)))


def image(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a PNG or an SVG file; the same figure gives the same bytes. Called inside `themed`."""
    buffer = io.BytesIO()
    quiet: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    with warnings.catch_warnings():
        # A letter that the font lacks is a box in a PNG; in an SVG the viewer's fonts have it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format=kind, dpi=150, **quiet)
    return buffer.getvalue()


def in_dark(svg: bytes) -> bytes:
    """An SVG of the light theme with the colours of the dark one."""
    light, dark = ((t.paper, t.ink, t.grid, t.reference, *t.runs) for t in (LIGHT, DARK))
    other = dict(zip(light, dark, strict=True))
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: other.get(found[0], found[0]), svg.decode()).encode()


def _colours(theme: Theme) -> Iterator[str]:
    while True:
        yield from theme.runs


def _points(record: Record, points: Points, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    chosen = some(range(len(points.values)), _MOST_POINTS)
    values = np.array([points.values[i] for i in chosen], dtype=np.float64)
    return record.along(axis, [points.tokens[i] for i in chosen]), np.where(np.isfinite(values), values, np.nan)


def _planned_end(record: Record, axis: Axis) -> float:
    """The place at which the run will end; less while most of it is still to come, so that its own curve shows."""
    times = min(_AHEAD, max(1.0, record.config.train.tokens / max(1, record.reached)))
    return float(record.along(axis, [record.reached])[0] * times)


def _limit(axes: Axes, curves: list[tuple[np.ndarray, np.ndarray]], levels: list[float]) -> None:
    """Leave the steep beginning out of view, if there is more. `curves`: places and values."""
    in_view = list(levels)
    known = [(along[finite], shown[finite]) for along, shown in curves if (finite := np.isfinite(shown)).any()]
    longest = max((along[-1] for along, _ in known), default=0.0)
    for along, shown in known:
        # The half of a run that is much shorter than another one is in view, too.
        late = shown[along >= min(_FALL * longest, along[-1] / 2)] if len(shown) > _FEW else shown
        in_view += [late.max(), shown.min()]
    if in_view:
        room = max(0.05 * (max(in_view) - min(in_view)), 0.01)
        axes.set_ylim(min(in_view) - room, max(in_view) + room)


def _levels(axes: Axes, levels: list[Level], theme: Theme) -> None:
    for i, level in enumerate(levels):
        dashes = _DASHES[i % len(_DASHES)]
        axes.axhline(level.value, color=theme.reference, linestyle=dashes, linewidth=1.2, label=level.label)


def _finish(axes: Axes, title: str, axis: Axis, unit: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(_AXIS_LABELS[axis])
    axes.set_ylabel(unit)
    axes.set_xlim(left=0)
    if axis == "tokens":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    elif axis == "flops":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    # Named by hand: matplotlib takes a name that begins with "_" for one of its own.
    labels = {line: str(line.get_label()) for line in axes.lines}
    handles = [line for line, label in labels.items() if not re.fullmatch(r"_child\d+", label)]
    if handles:
        # Below the curves, so that it hides none.
        where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.16), "borderaxespad": 0.0}
        axes.legend(handles, [labels[line] for line in handles], **where)
