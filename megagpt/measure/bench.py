"""`megagpt bench`: training steps of megagpt, `transformers` and a plain loop on equal work, or of megagpt in many
settings. The rows alternate, so that a machine that is slower for a while is slower for all of them."""

import argparse
import itertools
from typing import Any

import torch

from megagpt.config import Config
from megagpt.config_file import build_config, override
from megagpt.console import warn
from megagpt.errors import UserError
from megagpt.measure.processes import run_ranks
from megagpt.measure.report import Entry, Report, check_json
from megagpt.measure.steps import OUT_OF_MEMORY, Row, measure
from megagpt.measure.sweep import chosen_axes, describe, ends, first_settings

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
    implementation, for an override of a key that an argument decides, and if no row could be measured."""
    against = [name for name in dict.fromkeys(arguments.against.split(",")) if name]
    for name in against:
        if name not in IMPLEMENTATIONS[1:]:
            raise UserError(f"--against {name!r}: valid: {', '.join(IMPLEMENTATIONS[1:])}")
    check_json(arguments.json)
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    report = Report("cuda" if on_gpu else "cpu", arguments.json, arguments.sweep is not None, arguments.compile is None)
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
    for precision in dict.fromkeys(arguments.precision or ("fp32", "bf16")):
        config = _config(arguments, precision)
        if "plain" in against and (config.model.dropout or config.model.attention != "dense"):
            raise UserError("--against plain has dense attention and no dropout: leave out these overrides, or plain")
        for name in ("megagpt", *against):
            tuned = name == "megagpt" or arguments.same_allocator
            report.entries.append(Entry(Row(name, config, arguments.steps, tuned)))
    rounds = arguments.rounds or 2
    for turn in range(1, rounds + 1):
        for entry in report.entries:
            _run(entry, report, turn, rounds)
            if entry.failure not in ("", OUT_OF_MEMORY):
                raise UserError(f"{entry.row}: {entry.failure}")


def _sweep(arguments: argparse.Namespace, report: Report) -> None:
    """Lines of growing batches, one for each combination of the other axes. Further rounds repeat the rows of the
    first one."""
    axes = chosen_axes(arguments, [key for text in arguments.overrides for key in _keys(text)])
    precisions, rounds = dict.fromkeys(arguments.precision or ("bf16",)), arguments.rounds or 1
    warn(describe(axes, arguments.batch, report.device_type))
    for precision, setting in itertools.product(precisions, first_settings(axes, arguments.batch)):
        line: list[Entry] = []
        while not line or ("batch" in axes and not ends(line, report)):
            config = _config(setting.applied(arguments), precision)
            row = Row("megagpt", config, arguments.steps, tuned_allocator=True)
            overrides = [*setting.overrides(), *([f"train.precision={precision}"] if len(precisions) > 1 else [])]
            line.append(Entry(row, str(setting), overrides))
            report.entries.append(line[-1])
            _run(line[-1], report, 1, rounds)
            setting = setting._replace(batch=2 * setting.batch)
    for turn in range(2, rounds + 1):
        for entry in report.entries:
            _run(entry, report, turn, rounds)


def _run(entry: Entry, report: Report, turn: int, rounds: int) -> None:
    """Measure a row once more, unless it has failed."""
    if entry.failure:
        return
    warn(f"round {turn} of {rounds}: {entry} ...")
    try:
        (found,) = run_ranks(1, measure, entry.row, method="spawn")
    except UserError as error:
        found = str(error)
    if isinstance(found, str):
        entry.failure = found
    else:
        entry.rounds.append(found)
    report.show(entry)


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
    return build_config(tree, "bench")


def _keys(text: str) -> list[str]:
    """The keys that an override sets."""
    sections = override({}, text).items()
    return [f"{section}.{name}" for section, values in sections if isinstance(values, dict) for name in values]
