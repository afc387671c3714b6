"""`megagpt bench`: training steps of megagpt, `transformers` and a plain loop on equal work, or of megagpt in many
settings. The rows alternate, so that a machine that is slower for a while is slower for all of them."""

import argparse
import itertools
import os
import time
from typing import Any

import torch

from megagpt import launchers
from megagpt.config import Config
from megagpt.config_file import build_config, override
from megagpt.console import duration, warn
from megagpt.errors import Killed, UserError
from megagpt.measure.processes import run_ranks
from megagpt.measure.report import Entry, Report, check_json
from megagpt.measure.steps import OUT_OF_MEMORY, Measured, Row, measure
from megagpt.measure.sweep import ACCUMULATION, batches, check_batches, chosen_axes, describe, ends, first_settings

IMPLEMENTATIONS = ("megagpt", "plain", "transformers")
# Config keys that bench's own arguments decide -> these arguments.
_ARGUMENTS = {
    "model.preset": "PRESET",
    "model.context": "--context",
    "train.tokens": "--batch and --accumulation",
    "train.batch_tokens": "--batch and --accumulation",
    "train.micro_batch": "--batch",
    "train.precision": "--precision",
    "train.compile": "--compile",
    "train.device": "--device",
    "engine.name": "--engine",
}


def bench(arguments: argparse.Namespace) -> int:
    """Print a table of the rows, and each of them as it comes. Memory that runs out ends a row, any other error all of
    them; in a sweep, no error ends more than its row. Raises UserError for an impossible model, batch or
    implementation, for an override of a key that an argument decides, on several ranks, and if no row could be
    measured."""
    if (size := launchers.find_rank(os.environ).size) > 1:
        advice = "start it without torchrun or srun; a run's metrics.jsonl has the tokens/s of all its ranks"
        raise UserError(f"bench measures one rank, and the launcher has started {size}: {advice}")
    against = [name for name in dict.fromkeys(arguments.against.split(",")) if name]
    for name in against:
        if name not in IMPLEMENTATIONS[1:]:
            raise UserError(f"--against {name!r}: valid: {', '.join(IMPLEMENTATIONS[1:])}")
    check_json(arguments.json)
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    sweeps, default = arguments.sweep is not None, arguments.compile is None
    report = Report("cuda" if on_gpu else "cpu", arguments.json, sweeps, default, arguments.overrides)
    if arguments.sweep is None:
        _compare(arguments, against, report)
    else:
        if against:
            raise UserError("--sweep measures megagpt in many settings: leave out --against")
        _sweep(arguments, report)
    if not any(entry.rounds for entry in report.entries):
        first = report.entries[0]
        advice = f"; use a smaller --batch than {arguments.batch}" if first.failure == OUT_OF_MEMORY else ""
        raise UserError(f"no row could be measured: {first.row}: {first.failure}{advice}")
    report.print()
    return 0


def _compare(arguments: argparse.Namespace, against: list[str], report: Report) -> None:
    """The rows of each precision and implementation, in turn."""
    arguments.accumulation = arguments.accumulation or 1
    for config in _configs(arguments):
        _check_equal_work(against, config)
        for name in ("megagpt", *against):
            tuned = name == "megagpt" or arguments.same_allocator
            report.entries.append(Entry(Row(name, config, arguments.steps, tuned)))
    rounds = arguments.rounds or 2
    for turn in range(1, rounds + 1):
        for entry in report.entries:
            _run(entry, report, turn, rounds)
            if entry.failure not in ("", OUT_OF_MEMORY):
                raise UserError(f"{entry.row}: {entry.failure}")


def _check_equal_work(against: list[str], config: Config) -> None:
    """Raises UserError if some implementation would compute something else than megagpt."""
    model, train = config.model, config.train
    if "plain" in against and (model.dropout or model.attention != "dense"):
        raise UserError("--against plain has dense attention and no dropout: leave out these overrides, or plain")
    if "transformers" in against and model.attention != "dense":
        raise UserError("--against transformers has dense attention: leave out this override, or transformers")
    for key, value, theirs in (("residual", train.residual, "fp32"), ("float8", train.float8, "none")):
        if against and value != theirs:
            text = f"train.{key} is {value}, and the others compute with {theirs}: unequal numerics"
            raise UserError(f"--against {','.join(against)}: {text}; leave out this override, or --against")


def _sweep(arguments: argparse.Namespace, report: Report) -> None:
    """Lines of growing batches, one for each combination of the other axes. Further rounds repeat the rows of the
    first one."""
    axes = chosen_axes(arguments, [key for text in arguments.overrides for key in _keys(text)])
    precisions, rounds = dict.fromkeys(arguments.precision or ("bf16",)), arguments.rounds or 1
    arguments.accumulation = arguments.accumulation or (ACCUMULATION if "batch" in axes else 1)
    check_batches(axes, arguments)
    sizes = batches(axes, arguments)
    warn(describe(axes, sizes, report.device_type))
    rows = rounds * len(precisions) * len(list(first_settings(axes, arguments.batch))) * len(sizes)
    for precision, setting in itertools.product(precisions, first_settings(axes, arguments.batch)):
        line: list[Entry] = []
        for batch in sizes:
            if line and ends(line, report):
                break
            setting = setting._replace(batch=batch)
            config = _config(setting.applied(arguments), precision)
            row = Row("megagpt", config, arguments.steps, tuned_allocator=True)
            overrides = [*setting.overrides(), *([f"train.precision={precision}"] if len(precisions) > 1 else [])]
            line.append(Entry(row, str(setting), overrides))
            report.entries.append(line[-1])
            start = time.monotonic()
            _run(line[-1], report, 1, rounds)
            if sum(len(entry.rounds) for entry in report.entries) == 1 and line[-1].rounds:
                took = time.monotonic() - start
                compiler = ", and the compiler's time comes on top" if "compile" in axes else ""
                text = f"this row took {duration(took)}; at most {rows} rows like it take {duration(took * rows)}"
                warn(f"  {text}{compiler}")
    for turn in range(2, rounds + 1):
        for entry in report.entries:
            _run(entry, report, turn, rounds)


def _run(entry: Entry, report: Report, turn: int, rounds: int) -> None:
    """Measure a row once more, unless it has failed."""
    if entry.failure:
        return
    warn(f"round {turn} of {rounds}: {entry} ...")
    measured: Measured | None = None
    failure = ""
    try:
        for found in run_ranks(1, measure, entry.row, method="spawn"):
            if isinstance(found, Measured):
                measured = found
            elif isinstance(found, str):
                failure = found
            else:
                entry.hear(found)
    except Killed as error:
        # The kernel, as far as one can know: a CPU's row takes the host's memory.
        entry.hear([str(error)])
        failure = OUT_OF_MEMORY if report.device_type == "cpu" else str(error)
    except UserError as error:
        failure = str(error)
    if measured is None:
        entry.failure = failure
    else:
        entry.rounds.append(measured)
        if failure:
            entry.hear([f"its matrix products were not timed: {failure}"])
    report.show(entry)


def _configs(arguments: argparse.Namespace) -> list[Config]:
    """One for each of --precision; without it, for fp32 and bf16, as far as the overrides allow them."""
    if arguments.precision:
        return [_config(arguments, precision) for precision in dict.fromkeys(arguments.precision)]
    configs, problems = [], []
    for precision in ("fp32", "bf16"):
        try:
            configs.append(_config(arguments, precision))
        except UserError as error:
            problems.append(error)
    if not configs:
        raise problems[0]
    return configs


def _config(arguments: argparse.Namespace, precision: str) -> Config:
    for text in arguments.overrides:
        for key in _keys(text):
            if key in _ARGUMENTS:
                raise UserError(f"bench takes {key} from {_ARGUMENTS[key]}: leave out the override {text}")
    context = [f"model.context={arguments.context}"] if arguments.context else []
    tree: dict[str, Any] = {"model": {"preset": arguments.model}, "engine": {"name": arguments.engine}}
    for text in [*context, *(t for t in arguments.overrides if t.startswith("model."))]:
        tree = override(tree, text)
    tokens = arguments.accumulation * arguments.batch * build_config(tree, "bench").model.context
    train = {"tokens": tokens, "batch_tokens": tokens, "micro_batch": arguments.batch, "precision": precision}
    tree["train"] = {**train, "device": arguments.device}
    if arguments.compile is not None:
        tree["train"]["compile"] = arguments.compile
    for text in arguments.overrides:
        tree = override(tree, text)
    config = build_config(tree, "bench")
    if (size := config.engine.tensor_ranks) > 1:
        raise UserError(f"engine.tensor_ranks {size}: bench measures one rank; leave it out")
    return config


def _keys(text: str) -> list[str]:
    """The keys that an override sets."""
    sections = override({}, text).items()
    return [f"{section}.{name}" for section, values in sections if isinstance(values, dict) for name in values]
