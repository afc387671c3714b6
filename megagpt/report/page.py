"""One HTML page that shows a run to others. It needs no network and no script: its pictures are in the file."""

import base64
import datetime
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

import megagpt
from megagpt.config_file import to_yaml
from megagpt.console import duration
from megagpt.references.exams import Reference
from megagpt.report import figures
from megagpt.report.amounts import amount, power, score
from megagpt.report.facts import data_rows, recipe_rows, summary, visible
from megagpt.report.figures import LIGHT
from megagpt.report.history import Bill, Chapter, bill, read_history
from megagpt.report.lines import (
    AUTO,
    all_exam_references,
    corpus_of,
    exam_references,
    has_published_text,
    loss_curves,
    loss_references,
    shots_of,
)
from megagpt.report.outcome import plan_against_outcome
from megagpt.report.record import Axis, Record, some
from megagpt.report.texts import were_changed
from megagpt.training.status import Status, read_status

# Most positions whose samples are shown, and most samples of each.
_POSITIONS, _SAMPLES = 5, 8
# Most events of each kind that are listed.
_EVENTS = 5
_PROMPT = "The meaning of life is"

# Columns of the steps that are drawn, each with its title, its unit, and whether it is a share.
_QUANTITIES = (
    ("tokens_per_second", "Tokens per second", 1, False),
    ("mfu", "Model FLOPs utilisation", 1, True),
    ("peak_memory_bytes", "Peak memory of a rank (GiB)", 2**30, False),
    ("gradient_norm", "Gradient norm", 1, False),
)


@dataclass(frozen=True)
class Picture:
    """A figure in both colour schemes, as data URIs."""

    light: str
    dark: str
    text: str
    """The same in words, for those who do not see it."""


def page(record: Record, axis: Axis, wanted: str, dollars_per_gpu_hour: float | None) -> str:
    """The page's HTML. `wanted`: the references, as of `lines.corpus_of`, which raises UserError."""
    status, chapters = read_status(record.folder, record.config), read_history(record.folder, record)
    corpus = corpus_of(record, wanted)
    cost, drawn = bill(chapters, dollars_per_gpu_hour), loss_curves([record], wanted, axis)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=visible,
    )  # fmt: skip
    return environment.get_template("page.html").render(
        name=record.name, summary=summary(record), machines=_machines(chapters), state=_state(record, status, chapters),
        facts=_facts(record, cost, dollars_per_gpu_hour),
        curves=_curves(record, axis, wanted, [c.from_tokens for c in chapters[1:]]), exams=_exams(record),
        corpus=corpus.name if corpus else "", by_name=wanted == AUTO, curve=corpus.curve if corpus and drawn else None,
        references=_all_references(record, loss_references(record, corpus)),
        samples=_samples(record), speed=_speed(record, axis), speed_rows=_speed_rows(record),
        plan=plan_against_outcome(record),
        data=data_rows(record), changed=were_changed(record), recipe=recipe_rows(record.config), chapters=chapters,
        restarts=max(0, len(chapters) - 1), bill=cost, events=_events(record), load=_load(record, status),
        config=to_yaml(record.config), version=megagpt.__version__,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), duration=duration, amount=amount,
    )  # fmt: skip


def _state(record: Record, status: Status, chapters: list[Chapter]) -> str:
    if status.state == "finished":
        ended = chapters[-1].ended if chapters else None
        return "finished" + (f" on {ended:%Y-%m-%d}" if ended else "")
    return f"{status.text}; {record.reached / status.total_tokens:.1%} of {amount(status.total_tokens)} tokens"


def _machines(chapters: list[Chapter]) -> str:
    """The devices in the order in which they were first used."""
    found = dict.fromkeys(f"{c.ranks} x {c.device}" for c in chapters if c.ranks)
    return f"It ran on {', then on '.join(found)}." if found else ""


def _facts(record: Record, cost: Bill, price: float | None) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, note."""
    facts = []
    if record.validation.values:
        tokens = record.validation.tokens[-1]
        facts.append(("validation loss", _loss(record.validation.values[-1]), f"at {amount(tokens)} tokens"))
    elif len(record.tokens):
        facts.append(("training loss", _loss(record.steps["loss"][-1]), "of the last step"))
    for task, points in list(record.exams.items())[:2]:
        facts.append((task, score(points.values[-1]), f"at {amount(points.tokens[-1])} tokens"))
    step = record.steps["step"][-1] if len(record.tokens) else math.nan
    facts.append(("tokens", amount(record.reached), f"step {step:,.0f}" if math.isfinite(step) else "no step yet"))
    facts.append(("compute", power(record.along("flops", [record.reached])[0]), "FLOPs"))
    if len(record.tokens):
        facts.append(("training", duration(record.training_seconds[-1]), "of steps alone"))
    least = "" if cost.complete else "at least "
    if cost.elapsed:
        facts.append(("run time", duration(cost.elapsed), f"{least}with saves and restarts"))
    if cost.gpu_hours:
        facts.append(("GPU-hours", f"{cost.gpu_hours:,.1f}", f"{least}with saves and restarts"))
    if cost.dollars is not None and price is not None:
        facts.append(("cost", f"${cost.dollars:,.2f}", f"{least}at ${price:,.2f} a GPU-hour"))
    elif price is not None:
        facts.append(("cost", "none", "no GPU is on record"))
    return facts


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _curves(record: Record, axis: Axis, wanted: str, restarts: list[int]) -> list[Picture]:
    pictures = []
    if len(record.tokens) or record.validation.tokens:
        last = (
            f" The last validation loss is {_loss(record.validation.values[-1])}." if record.validation.values else ""
        )
        text = f"Loss against {axis}, with reference lines.{last}"
        pictures.append(_picture(text, figures.draw_losses, [record], axis, wanted, restarts))
    for task, points in record.exams.items():
        text = f"{task} against {axis}, with reference lines. The last score is {score(points.values[-1])}."
        pictures.append(_picture(text, figures.draw_exam, [record], task, axis))
    return pictures


def _speed(record: Record, axis: Axis) -> list[Picture]:
    """Pictures of the columns that have a number."""
    return [
        _picture(f"{title} against {axis}.", figures.draw_quantity, record, column, axis, title, unit, percent)
        for column, title, unit, percent in _QUANTITIES
        if np.isfinite(record.steps[column]).any()
    ]


def _speed_rows(record: Record) -> list[tuple[str, str]]:
    """Speed and memory of the whole run."""
    steps, rows = record.steps, []

    def median(column: str) -> float:
        known = steps[column][np.isfinite(steps[column])]
        return float(np.median(known)) if len(known) else math.nan

    for name, column, form in (
        ("tokens per second, median", "tokens_per_second", "{:,.0f}"),
        ("seconds a step, median", "step_seconds", "{:.3g}"),
        ("model FLOPs utilisation, median", "mfu", "{:.1%}"),
    ):
        if math.isfinite(found := median(column)):
            rows.append((name, form.format(found)))
    memory = steps["peak_memory_bytes"]
    if np.isfinite(memory).any():
        rows.append(("peak memory of a rank", f"{np.nanmax(memory) / 2**30:.2f} GiB"))
    total = np.nansum(steps["step_seconds"])
    if total > 0:
        rows.append(
            ("share of the steps' time spent waiting for data", f"{np.nansum(steps['data_wait_seconds']) / total:.1%}")
        )
    return rows


def _picture(text: str, draw: Callable[..., None], *arguments: Any) -> Picture:
    """`draw` is called with axes, theme and the arguments."""
    with figures.themed(LIGHT):
        figure, axes = figures.one_panel()
        draw(axes, LIGHT, *arguments)
        light = figures.image(figure, "svg")
    return Picture(_address(light), _address(figures.in_dark(light)), text)


def _address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _exams(record: Record) -> list[dict[str, Any]]:
    """A row for each task: the newest score, and beside it the models whose sizes are nearest."""
    rows = []
    for task, points in record.exams.items():
        value, error, items = points.values[-1], points.errors[-1], points.items[-1]
        margin = f" ± {error:.2%}" if value <= 1 else f" ± {error:.2f}"
        beside = exam_references(record, task)
        rows.append({
            "task": task, "how": _how(record, task), "tokens": amount(points.tokens[-1]),
            "items": f"{items:,}" if items else "",
            "score": score(value) + (margin if math.isfinite(error) else ""),
            "gpt2": [_beside(r) for r in beside if r.is_gpt2], "gpt3": [_beside(r) for r in beside if not r.is_gpt2],
        })  # fmt: skip
    return rows


def _how(record: Record, task: str) -> str:
    """How the score was taken, by the names that docs/evaluation.md explains."""
    name, shots = record.newest[task].score, shots_of(record, task)
    parts = ([str(name)] if name else []) + [f"{shots}-shot"]
    return ", ".join(parts + ([] if has_published_text(record, task) else ["not the published text"]))


def _beside(reference: Reference) -> str:
    marks = ([] if reference.same_text else ["other text"]) + ([] if reference.firm else ["unsure"])
    return f"{reference.label}: {score(reference.value)}" + (f" ({', '.join(marks)})" if marks else "")


def _all_references(record: Record, losses: list[Reference]) -> list[dict[str, str]]:
    """Every number that the page shows beside the run's own, and the other sizes and shots of its exams."""
    rows = [{"of": "loss", "value": f"{r.value:.4f}", **_row(r)} for r in losses]
    for task in record.exams:
        known = all_exam_references(record, task, shots=False)
        rows += [{"of": task, "value": score(r.value), **_row(r)} for r in known]
    return rows


def _row(reference: Reference) -> dict[str, str]:
    unsure = "" if reference.firm else "unsure: it has one source only"
    return {"label": reference.label, "how": reference.convention, "source": reference.source, "note": unsure}


def _samples(record: Record) -> list[dict[str, Any]]:
    prompt, shown = record.config.sampling.prompt, []
    with_text = [i for i, (_, texts) in enumerate(record.samples) if texts]
    for i in some(with_text, _POSITIONS):
        tokens, texts = record.samples[i]
        parts = [(prompt, t.removeprefix(prompt)) if t.startswith(prompt) else ("", t) for t in texts[:_SAMPLES]]
        shown.append({"tokens": amount(tokens), "texts": parts, "more": max(0, len(texts) - _SAMPLES)})
    return shown


def _events(record: Record) -> list[str]:
    """Sentences about what did not go as usual."""
    kinds: dict[str, list[str]] = {}
    for line in record.notable:
        text = line.get("reason") or line.get("text")
        what = f"{line['event'].replace('_', ' ')} at {amount(float(line['tokens_seen']))} tokens"
        kinds.setdefault(line["event"], []).append(f"{what}: {text}" if text else what)
    found = []
    for texts in kinds.values():
        found += texts[:_EVENTS]
        if len(texts) > _EVENTS:
            found.append(f"and {len(texts) - _EVENTS:,} more of this kind")
    return found


def _load(record: Record, status: Status) -> dict[str, str] | None:
    """The commands that load the model; None while there is no complete checkpoint. `transformers` has no GPT-2 with
    banded attention, so `export` is then empty."""
    if status.checkpoint is None:
        return None
    run, target = str(record.folder), f"{record.folder}/export"
    export = shlex.join(["megagpt", "export", run, "--to", target])
    return {
        "tokens": amount(status.checkpoint["tokens"]),
        "sample": shlex.join(["megagpt", "sample", run, "--prompt", _PROMPT]),
        "export": export if record.config.model.attention == "dense" else "",
        "folder": repr(target),
    }
