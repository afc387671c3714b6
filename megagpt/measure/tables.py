"""`megagpt parity`: the tables of docs/engines.md, measured again."""

import argparse
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from megagpt.console import warn
from megagpt.errors import ExitCode, UserError
from megagpt.measure.cases import ENGINE_CASES, STEPS, WAYS, Case, EngineCase, difference
from megagpt.measure.crossings import crossing_table
from megagpt.measure.processes import run_cases
from megagpt.measure.worker import memory_config
from megagpt.planning.state import state_bytes

TABLES = ("fp32", "bf16", "residual", "memory", "crossings")
# Those that are measured on the CPU only: they take 4 ranks, and count a process's memory.
_ON_CPU = ("memory", "crossings")
# Largest differences over the compared steps, see docs/engines.md.
LOSS_TOLERANCE = {"fp32": 5e-6, "bf16": 5e-3, "residual": 5e-3}
NORM_TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2, "residual": 5e-2}


def parity(arguments: argparse.Namespace) -> int:
    """Print the tables; exit code 1 if an engine leaves the tolerance. Raises UserError for a table that does not exist
    or is not measured on the device."""
    device, tables = arguments.device, arguments.tables
    if tables is None:
        tables = "fp32,bf16" if device == "cuda" else "fp32,bf16,memory"
    wanted = [name for name in tables.split(",") if name]
    if not wanted:
        raise UserError(f"--tables {tables!r} names no table; valid: {', '.join(TABLES)}")
    for name in wanted:
        if name not in TABLES:
            raise UserError(f"--tables {name!r}: valid: {', '.join(TABLES)}")
        if name in _ON_CPU and device == "cuda":
            raise UserError(f"--tables {name}: is measured on the CPU only; leave it out, or use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    engines = on_gpus(torch.cuda.device_count()) if device == "cuda" else list(ENGINE_CASES.values())
    within = True
    for name in wanted:
        if name in _ON_CPU and device == "cuda":
            warn(f"parity: {name} is measured on the CPU")
        if name == "memory":
            table, same = memory_table(), True
        else:
            table, same = crossing_table() if name == "crossings" else curve_table(engines, name, device)
        _print(table)
        within = within and same
    return ExitCode.DONE if within else ExitCode.DIFFERENT


def on_gpus(gpus: int) -> list[EngineCase]:
    """The cases with one rank on each of that many GPUs, or fewer. A layout of several groups of ranks is left out if
    there are too few GPUs for it; any other case runs on as many as there are."""
    cases = list(ENGINE_CASES.values())
    able = [case for case in cases if case.ranks <= gpus or not {"shard_ranks", "tensor_ranks"} & case.engine.keys()]
    if left_out := [case.name for case in cases if case not in able]:
        warn(f"parity: {gpus} GPU(s) are too few for: {', '.join(left_out)}")
    return [case._replace(ranks=min(case.ranks, gpus)) for case in able]


def curve_table(engines: Sequence[EngineCase], name: str, device: str) -> tuple[list[list[str]], bool]:
    """Title and rows for people: largest difference of the loss (of the gradient norm) from the plain fp32 loop over
    all steps; and whether all are within tolerance. `name`: a precision, or "residual", bf16 whose residual stream is
    bf16, too."""
    precision, residual = ("bf16", "bf16") if name == "residual" else (name, "fp32")
    plain = run_cases("plain", [Case({}, 1)])[0][:STEPS]
    what = "largest difference of the loss (of the gradient norm) from one plain fp32 process"
    heads = ["engine", "ranks", *(f"{accumulation} x {mode}" for accumulation, mode in WAYS), "within tolerance"]
    table = [[f"{name}: {what}, {STEPS} steps"], heads]
    with tqdm(total=len(engines) * len(WAYS), unit="run", desc=name, disable=None) as bar:
        for engine in engines:
            _say(f"{engine.name}, {name}")
            cases = [Case(engine.engine, engine.ranks, *way, precision, device, residual=residual) for way in WAYS]
            found = [difference(curve, plain) for curve in run_cases("curve", cases, bar.update)]
            within = all(a <= LOSS_TOLERANCE[name] and b <= NORM_TOLERANCE[name] for a, b in found)
            shown = [f"{loss:.1e} ({norm:.1e})" for loss, norm in found]
            table.append([engine.name, str(engine.ranks), *shown, "yes" if within else "NO"])
            _show(table)
    return table, all(row[-1] == "yes" for row in table[2:])


def memory_table() -> list[list[str]]:
    """Title and rows for people: bytes per parameter on the main rank, measured / by formula; time of a step."""
    kinds = ("weights", "gradients", "optimizer")
    title = "memory: bytes per parameter on one rank at the fullest point between passes, measured / by formula"
    table = [[title], ["engine", "precision", "ranks", *kinds, "together", "ms per step"]]
    cases = [case for case in ENGINE_CASES.values() if "hybrid" not in case.name]
    grid = [(c.name, ranks, "bf16") for c in cases for ranks in ((c.ranks,) if c.fixed else (1, 2, 4))]
    grid += [(case.name, case.ranks, "fp32") for case in cases]
    for name, ranks, precision in tqdm(grid, unit="run", desc="memory", disable=None):
        _say(f"{name}, {precision}, {ranks} rank(s)")
        case = Case(ENGINE_CASES[name].engine, ranks, 2, "none", precision, timed=True)
        (measured,) = run_cases("memory", [case])
        config = memory_config(case)
        count, formula = config.model.stored_parameters, state_bytes(config, ranks)
        held = {kind: (measured[kind], getattr(formula, kind)) for kind in kinds}
        held["together"] = (sum(measured[kind] for kind in kinds), formula.between_passes)
        cells = [f"{counted / count:.2f} / {computed / count:.2f}" for counted, computed in held.values()]
        table.append([name, precision, str(ranks), *cells, f"{measured['seconds'] * 1e3:.0f}"])
        _show(table)
    return table


def _say(text: str) -> None:
    """A line of progress in a log; a terminal has the bar."""
    if not sys.stderr.isatty():
        warn(f"parity: {text}")


def _show(table: list[list[str]]) -> None:
    """The last row, as it comes: an interruption leaves what was measured."""
    warn("  " + ", ".join(f"{head} {cell}" for head, cell in zip(table[1], table[-1], strict=True)))


def _print(table: list[list[str]]) -> None:
    """A title, then a Markdown table."""
    (title,), *rows = table
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(f"\n{title}\n", *lines, sep="\n")
