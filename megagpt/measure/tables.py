"""`megagpt parity`: the tables of docs/engines.md, measured again."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from megagpt.errors import ExitCode, UserError
from megagpt.measure.cases import ACCUMULATIONS, ACTIVATION_CHECKPOINTING, ENGINE_CASES, STEPS, Case, EngineCase
from megagpt.measure.crossings import crossing_table
from megagpt.measure.processes import run_cases
from megagpt.planning.memory import state_bytes

TABLES = ("fp32", "bf16", "memory", "crossings")
# Largest differences over the compared steps, see docs/engines.md.
LOSS_TOLERANCE = {"fp32": 5e-6, "bf16": 5e-3}
NORM_TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}


def parity(arguments: argparse.Namespace) -> int:
    """Print the tables; exit code 1 if an engine leaves the tolerance."""
    wanted = [name for name in arguments.tables.split(",") if name]
    for name in wanted:
        if name not in TABLES:
            raise UserError(f"--tables {name!r}: valid: {', '.join(TABLES)}")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    engines = list(ENGINE_CASES.values())
    if device == "cuda":
        # One rank per GPU: an engine that wants more ranks than there are GPUs runs on as many as there are.
        count = torch.cuda.device_count()
        engines = [
            dataclasses.replace(s, ranks=min(s.ranks, count)) for s in engines if s.name.find("hybrid") < 0 or count > 3
        ]
    within = True
    for name in wanted:
        if name == "memory":
            _print(memory_table())
            continue
        if name == "crossings":
            table, same = crossing_table()
            _print(table)
            within = within and same
            continue
        results = curves(engines, name, device)
        _print(curve_table(engines, name, results))
        within = within and all(_within(name, r) for r in results.values())
    return ExitCode.DONE if within else ExitCode.DIFFERENT


Curve = Sequence[tuple[float, float]]
Differences = dict[tuple[str, int, str], tuple[float, float]]


def curves(engines: Sequence[EngineCase], precision: str, device: str) -> Differences:
    """Largest difference of loss and of gradient norm from the plain fp32 loop over all steps, for each
    (engine, accumulation, activation checkpointing)."""
    grid = [(s, a, r) for s in engines for a in ACCUMULATIONS for r in ACTIVATION_CHECKPOINTING]
    reference = run_cases("plain", [Case({}, 1)])[0][:STEPS]
    found: Differences = {}
    with tqdm(total=len(grid), unit="run", desc=precision, disable=None) as bar:
        for engine in engines:
            _say(f"{engine.name}, {precision}")
            keys = [(a, r) for s, a, r in grid if s is engine]
            cases = [Case(engine.engine, engine.ranks, a, r, precision, device) for a, r in keys]
            for (a, r), curve in zip(keys, run_cases("curve", cases, bar.update), strict=True):
                found[engine.name, a, r] = difference(curve, reference)
    return found


def difference(curve: Curve, reference: Curve) -> tuple[float, float]:
    """Largest absolute difference of the losses, and of the norms."""
    pairs = list(zip(curve, reference, strict=True))
    loss, norm = (max(abs(a[i] - b[i]) for a, b in pairs) for i in (0, 1))
    return loss, norm


def _within(precision: str, pair: tuple[float, float]) -> bool:
    return pair[0] <= LOSS_TOLERANCE[precision] and pair[1] <= NORM_TOLERANCE[precision]


def curve_table(engines: Sequence[EngineCase], precision: str, results: Differences) -> Iterator[list[str]]:
    """Rows for people: largest difference of the loss (of the gradient norm)."""
    what = "largest difference of the loss (of the gradient norm) from one plain fp32 process"
    yield [f"{precision}: {what}, {STEPS} steps"]
    yield [
        "engine",
        "ranks",
        *(f"{a} x {r}" for a in ACCUMULATIONS for r in ACTIVATION_CHECKPOINTING),
        "within tolerance",
    ]
    for engine in engines:
        cells = [results[engine.name, a, r] for a in ACCUMULATIONS for r in ACTIVATION_CHECKPOINTING]
        shown = [f"{loss:.1e} ({norm:.1e})" for loss, norm in cells]
        yield [engine.name, str(engine.ranks), *shown, "yes" if all(_within(precision, c) for c in cells) else "NO"]


def memory_rows() -> Iterator[tuple[EngineCase, str, dict[str, Any], Any]]:
    """Measured and predicted bytes on the main rank, for each engine, precision and number of ranks."""
    names = [name for name in ENGINE_CASES if "hybrid" not in name]
    grid = [(ENGINE_CASES[name], ranks, "bf16") for name in names for ranks in (1, 2, 4)]
    grid += [(ENGINE_CASES[name], 2, "fp32") for name in names]
    for engine, ranks, precision in tqdm(grid, unit="run", desc="memory", disable=None):
        _say(f"{engine.name}, {precision}, {ranks} rank(s)")
        case = Case(engine.engine, ranks, 2, "none", precision, timed=True)
        (measured,) = run_cases("memory", [case])
        yield dataclasses.replace(engine, ranks=ranks), precision, measured, case


def memory_table() -> Iterator[list[str]]:
    """Rows for people: bytes a parameter on a rank, measured / by formula, and the time of a step."""
    from megagpt.measure.worker import memory_config

    yield ["memory: bytes a parameter on one rank at the fullest point between passes, measured / by formula"]
    yield ["engine", "precision", "ranks", "weights", "gradients", "optimizer", "together", "ms a step"]
    for engine, precision, measured, case in memory_rows():
        config = memory_config(case)
        count, formula = config.model.stored_parameters, state_bytes(config, engine.ranks)
        kinds = ("weights", "gradients", "optimizer")
        cells = [f"{measured[k] / count:.2f} / {getattr(formula, k) / count:.2f}" for k in kinds]
        together = f"{sum(measured[k] for k in kinds) / count:.2f} / {formula.total / count:.2f}"
        yield [engine.name, precision, str(engine.ranks), *cells, together, f"{measured['seconds'] * 1e3:.0f}"]


def _say(text: str) -> None:
    """A line of progress in a log; a terminal has the bar."""
    if not sys.stderr.isatty():
        print(f"parity: {text}", file=sys.stderr, flush=True)


def _print(rows: Iterator[list[str]]) -> None:
    """A title, then a Markdown table."""
    (title,) = next(rows)
    table = list(rows)
    print(f"\n{title}\n")
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for i, row in enumerate(table):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
