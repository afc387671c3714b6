"""The part of evaluate that is for lm-evaluation-harness, and what it shares with the part for our own exams."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.commands.options import Parser
    from megagpt.evaluation.harness_tasks import Asked
    from megagpt.exchange.named import NamedModel
    from megagpt.world import World

# Options that only our own exams have, and what the harness has instead.
_OWN = {
    "data": "the harness brings its rows itself (--download), or a task's yaml file names them (--include-path)",
    "shots_from": "a task's yaml file says where its examples come from",
    "stride": "the harness has one stride: the model's context",
}


def add_harness(sub: "Parser") -> None:
    text = "hold exams of lm-evaluation-harness, by its names of tasks, groups and tags; needs the extra harness"
    sub.add_argument("--harness", action="store_true", help=text)
    text = "with --harness: a folder of yaml files that declare more of its tasks; may be given again"
    sub.add_argument("--include-path", metavar="DIR", action="append", default=[], help=text)
    text = "with --harness: fetch rows that are not in the Hugging Face cache, of no pinned version, from any host"
    sub.add_argument("--download", action="store_true", help=text)


def refuse_without_harness(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that need --harness."""
    for option in ("include_path", "download"):
        if getattr(arguments, option):
            raise UserError(f"--{option.replace('_', '-')} is for the tasks of --harness; add that, or leave it out")


def evaluate_by_harness(arguments: argparse.Namespace) -> int:
    from megagpt.console import voice
    from megagpt.evaluation.harness_tasks import all_names, check_installed
    from megagpt.world import fail_together, join

    try:
        check_installed()
        if arguments.tasks == "list":
            with voice(to_stderr=True):
                names = all_names(arguments.include_path)
            print("\n".join(names))
            return 0
        check_model(arguments)
        asked = _asked(arguments)
        check_places(arguments)
    except UserError as error:
        fail_together(error)
    with join(arguments.device) as world:
        _hold(arguments, asked, world)
    return 0


def _asked(arguments: argparse.Namespace) -> "Asked":
    from megagpt.evaluation.harness_tasks import Asked

    for option, instead in _OWN.items():
        if getattr(arguments, option):
            raise UserError(f"--{option.replace('_', '-')} is not for --harness: {instead}; leave it out")
    names = list(dict.fromkeys(name.strip() for name in (arguments.tasks or "").split(",") if name.strip()))
    if not names:
        raise UserError(
            "--harness: no task is named; name some, such as --tasks hellaswag,mmlu; --tasks list shows all"
        )
    if arguments.shots is not None and arguments.shots < 0:
        raise UserError("--shots paper is not for --harness: it does not know the paper's numbers; give a number")
    return Asked(
        names, arguments.include_path, arguments.shots, arguments.limit, arguments.seed, arguments.download
    )  # fmt: skip


def _hold(arguments: argparse.Namespace, asked: "Asked", world: "World") -> None:
    from megagpt.console import say
    from megagpt.evaluation.examinee import opened
    from megagpt.evaluation.harness_exams import hold
    from megagpt.evaluation.harness_tasks import load_tasks
    from megagpt.evaluation.report import table
    from megagpt.exchange.named import open_model
    from megagpt.files import write_atomic

    found = open_model(arguments.model, world)
    say("importing lm-evaluation-harness: some seconds")
    tasks = load_tasks(asked, world)
    how = f"{arguments.precision}, {world.size} x {world.device.type}"
    say(f"loading {found.label}: {found.config.parameters:,} parameters, {how}")
    sharded = world.size > 1 and arguments.engine != "ddp"
    with opened(found, world, arguments.engine, arguments.precision) as model:
        held = hold(tasks, asked, model, found.config, world, sharded, arguments.batch_tokens)  # type: ignore[arg-type]
    if held is None:
        return
    say("\n".join(["", *table(held.results, found.config)]))
    if arguments.json:
        results = [result.as_json() for result in held.results]
        values = {**facts(arguments, found, world), "results": results, "harness": held.whole}
        write_atomic(Path(arguments.json), (json.dumps(values, indent=1) + "\n").encode())
    if arguments.rows:
        with Path(arguments.rows).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in held.rows)


def check_model(arguments: argparse.Namespace) -> None:
    """Raises UserError if no model is named."""
    if arguments.model is None:
        way = "such as runs/gpt2_124m or gpt2; only --tasks list needs none"
        raise UserError(f"no model is named; name a run, a checkpoint, a folder or a model of the hub, {way}")


def check_places(arguments: argparse.Namespace) -> None:
    """Raises UserError if there is no such device, or if results cannot be written where they should."""
    from megagpt.world import check_device

    check_device(arguments.device, "--device")
    for option in ("json", "rows"):
        _check_writable(getattr(arguments, option), f"--{option}")


def _check_writable(name: str | None, option: str) -> None:
    if name is not None and (Path(name).is_dir() or not Path(name).parent.is_dir()):
        problem = "is a folder" if Path(name).is_dir() else f"{Path(name).parent} is no folder"
        raise UserError(f"{option} {name}: {problem}; name a file in a folder that exists")


def facts(arguments: argparse.Namespace, found: "NamedModel", world: "World") -> dict[str, Any]:
    """The values of --json beside the results."""
    import torch

    from megagpt import __version__
    from megagpt.files import now

    chosen = ("precision", "engine", "shots", "limit", "seed")
    return {
        "model": found.label, "parameters": found.config.parameters, "written": now(),
        "versions": {"megagpt": __version__, "torch": torch.__version__},
        **{name: getattr(arguments, name) for name in chosen}, "ranks": world.size,
    }  # fmt: skip
