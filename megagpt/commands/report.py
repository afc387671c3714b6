"""plot, report: pictures of runs, and the page that shows one to others."""

import argparse
import functools
from typing import TYPE_CHECKING

from megagpt.commands.files import check_drawing, picture_kind, target_file, write_file
from megagpt.commands.options import Add, Parser, above_zero
from megagpt.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from megagpt.report.record import Record

_AXES = ("tokens", "flops", "hours")


def register(add: Add) -> None:
    sub = add("plot", _plot, "Draw runs' validation losses and exams with reference lines, as one PNG or SVG picture.")
    sub.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder; several share the picture")
    _add_shared(sub, "curves.png", "the picture, .png or .svg")
    sub.add_argument("--exams", metavar="TASK,...", help="draw these exams only (all that were taken)")
    sub.add_argument("--dark", action="store_true", help="light lines on a dark ground")

    sub = add("report", _report, "Write one HTML page that shows a run to others; it needs no network.")
    sub.add_argument("run", metavar="RUN", help="a run's folder")
    _add_shared(sub, None, "the page (RUN/report.html)")
    text = "price of a GPU for an hour: the page then says what the run has cost"
    sub.add_argument(
        "--dollars-per-gpu-hour",
        metavar="PRICE",
        type=functools.partial(above_zero, what="a price above 0, such as 2.5"),
        help=text,
    )


def _add_shared(sub: Parser, out: str | None, what: str) -> None:
    sub.add_argument("--x", choices=_AXES, default="tokens", help="horizontal axis; hours are of the steps (tokens)")
    sub.add_argument("--out", metavar="FILE", default=out, help=what + (f" ({out})" if out else ""))
    text = "whose losses to draw: fineweb-edu, fineweb, none, or auto, by the names of the run's texts (auto)"
    sub.add_argument("--references", metavar="TEXT", default="auto", help=text)


def _plot(arguments: argparse.Namespace) -> int:
    target = target_file(arguments.out, "--out")
    kind = picture_kind(target, "--out")
    check_drawing("plot")
    records = [_record(run) for run in arguments.runs]
    if all(record.is_empty for record in records):
        listed = ", ".join(arguments.runs)
        raise UserError(f"{listed}: nothing to draw: no step is logged yet; wait for the first ones")

    from megagpt.report import figures

    tasks = _wanted_exams(arguments.exams, figures.exam_names(records))
    theme = figures.DARK if arguments.dark else figures.LIGHT
    with figures.themed(theme):
        figure = figures.all_panels(records, arguments.x, arguments.references, theme, tasks)
        data = figures.image(figure, kind)
    write_file(target, data, "--out")
    print(f"wrote {target}")
    return 0


def _wanted_exams(words: str | None, taken: list[str]) -> list[str] | None:
    """The exams to draw; None: all. Raises UserError for one that no run has taken, and if none is named."""
    if words is None:
        return None
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    if not wanted:
        raise UserError(f"--exams {words!r} names no exam; name some, such as hellaswag,lambada, or leave it out")
    for word in wanted:
        if word not in taken:
            way = did_you_mean(word, taken) if taken else "none was taken; leave --exams out"
            raise UserError(f"--exams {word}: no run has taken it: {way}")
    return wanted


def _report(arguments: argparse.Namespace) -> int:
    record = _record(arguments.run)
    check_drawing("report")
    target = target_file(str(record.folder / "report.html") if arguments.out is None else arguments.out, "--out")

    from megagpt.report.page import page

    text = page(record, arguments.x, arguments.references, arguments.dollars_per_gpu_hour)
    write_file(target, text.encode("utf-8", errors="backslashreplace"), "--out")
    print(f"wrote {target}")
    return 0


def _record(name: str) -> "Record":
    from megagpt.files import named_path
    from megagpt.report.record import read_record

    run = named_path(name)
    if not (run / "config.yaml").is_file() and (inside := sorted(run.glob("*/config.yaml"))):
        raise UserError(f"{run}: not a run's folder, but one that holds runs; name a run, such as {inside[0].parent}")
    return read_record(run)
