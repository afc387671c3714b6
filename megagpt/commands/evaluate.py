"""evaluate: exams of a model."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from megagpt.commands.evaluate_harness import (
    add_harness,
    check_model,
    check_places,
    evaluate_by_harness,
    facts,
    refuse_without_harness,
)  # fmt: skip
from megagpt.commands.options import Add, add_device, add_model, count
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.evaluation.exam import Exam
    from megagpt.evaluation.task import Task, TextTask
    from megagpt.world import World

# Exams that the papers and the open reproduction are compared by.
_DEFAULT = "hellaswag,lambada,piqa,arc_easy,arc_challenge,winogrande"


def register(add: Add) -> None:
    sub = add("evaluate", _evaluate, "Hold exams: HellaSwag, LAMBADA, ... Works under torchrun and deepspeed too.")
    add_model(sub, optional=True)  # `--tasks list` needs none
    text = f"names with commas, also text:FILE; `list`, without MODEL, shows all (those in --data, or {_DEFAULT})"
    sub.add_argument("--tasks", help=text)
    text = "solved examples in front of each row; paper: as many as in GPT-3's few-shot setting (0)"
    sub.add_argument("--shots", type=_shots, metavar="K", help=text)
    text = "file of rows that the examples are drawn from (the task's training rows)"
    sub.add_argument("--shots-from", metavar="FILE", default="", help=text)
    text = "folder of exam rows; without it they come from the Hugging Face hub"
    sub.add_argument("--data", metavar="DIR", default="", help=text)
    text = "rows of each task, drawn by a constant seed; of a text, its first windows (all)"
    sub.add_argument("--limit", type=count, default=0, metavar="N", help=text)
    sub.add_argument("--seed", type=lambda text: count(text, least=0), help="decides the examples (0)")
    text = "of texts: tokens that each window scores behind the ones before (the model's context)"
    sub.add_argument("--stride", type=count, default=0, metavar="TOKENS", help=text)
    sub.add_argument("--json", metavar="FILE", help="write the results, with all references")
    sub.add_argument("--rows", metavar="FILE", help="write each row's texts and log-likelihoods, as JSON lines")
    text = "of matrix products, whatever the model was trained in (fp32)"
    sub.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=text)
    text = "on several ranks: ddp, the whole model on each; fsdp or zero (stage 3), sharded (ddp)"
    sub.add_argument("--engine", choices=("ddp", "fsdp", "zero"), default="ddp", help=text)
    text = "tokens of a forward pass (512 on a CPU, 16384 on a GPU); other values change last bits, not printed digits"
    sub.add_argument("--batch-tokens", type=count, default=0, metavar="N", help=text)
    add_device(sub)
    add_harness(sub)


def _shots(text: str) -> int:
    return -1 if text == "paper" else count(text, least=0)


def _evaluate(arguments: argparse.Namespace) -> int:
    from megagpt.world import fail_together, join

    if arguments.harness:
        return evaluate_by_harness(arguments)
    if arguments.tasks == "list":
        return _list()
    try:
        check_model(arguments)
        refuse_without_harness(arguments)
        names = arguments.tasks.split(",") if arguments.tasks is not None else []
        tasks = _tasks([name.strip() for name in names], arguments.data)
        _refuse_idle(arguments, tasks)
        arguments.shots, arguments.seed = arguments.shots or 0, arguments.seed or 0
        check_places(arguments)
    except UserError as error:
        fail_together(error)
    with join(arguments.device) as world:
        _hold(arguments, tasks, world)
    return 0


def _list() -> int:
    from megagpt.evaluation.tasks import GROUPS, TASKS

    for task in TASKS.values():
        local = f"{task.source.names[0]}.jsonl"
        print(f"{task.name:22} {task.source.repository}, {task.source.path}; in --data: {local}")
    for name, members in GROUPS.items():
        print(f"{name:22} {'every task without a colon' if name == 'all' else ', '.join(members)}")
    print(f"{'text:FILE':22} the perplexity of your own text file")
    return 0


def _tasks(names: list[str], data: str) -> "list[Task | TextTask]":
    """The tasks of those names; without names, those that the folder has rows of. Raises UserError."""
    from megagpt.evaluation.rows import is_there
    from megagpt.evaluation.tasks import find_tasks

    if names:
        return find_tasks(names)
    if not data:
        return find_tasks(_DEFAULT.split(","))
    found = [task for task in find_tasks(["all"]) if is_there(task.source, data, task.fits)]
    if not found:
        known = ", ".join(f"{task.source.names[0]}.jsonl" for task in find_tasks(_DEFAULT.split(",")))
        raise UserError(f"{data}: holds no exam rows that are known by their names, such as {known}")
    return found


def _refuse_idle(arguments: argparse.Namespace, tasks: "list[Task | TextTask]") -> None:
    """Raises UserError for an option that would change nothing."""
    from megagpt.evaluation.task import TextTask

    if not arguments.shots:
        for option, given in {"--shots-from": arguments.shots_from, "--seed": arguments.seed is not None}.items():
            if given:
                raise UserError(f"{option} is for solved examples; add --shots K, or leave it out")
    if arguments.stride and not any(isinstance(task, TextTask) for task in tasks):
        raise UserError("--stride is for texts, such as wikitext2 or text:FILE; add one to --tasks, or leave it out")


def _check_same(tasks: "list[Task | TextTask]", data: str, world: "World") -> None:
    """Raises UserError, on every rank, if a host's folder has rows of other exams: its ranks would hold those."""
    main, expected, others = world.differing([task.name for task in tasks])
    for host, names in others.items():
        lists = f"{', '.join(names)} on {host}, but {', '.join(expected)} on {main}"
        raise UserError(f"--data {data}: has rows of {lists}; copy the same files to every host, or name --tasks")


def _hold(arguments: argparse.Namespace, tasks: "list[Task | TextTask]", world: "World") -> None:
    from megagpt.console import say
    from megagpt.evaluation.exam import Settings, prepare
    from megagpt.evaluation.examinee import opened
    from megagpt.evaluation.report import ShownProgress, table
    from megagpt.exchange.named import open_model
    from megagpt.files import write_atomic

    _check_same(tasks, arguments.data, world)
    found = open_model(arguments.model, world)
    a = arguments
    settings = Settings(a.data, a.shots, a.shots_from, a.limit, a.seed, a.stride)
    say(f"reading {len(tasks)} exam(s): {', '.join(task.name for task in tasks)}")
    exams: list[Exam] = [prepare(task, settings, found.config.context, world) for task in tasks]
    how = f"{arguments.precision}, {world.size} x {world.device.type}"
    say(f"loading {found.label}: {found.config.parameters:,} parameters, {how}")
    results = []
    with contextlib.ExitStack() as stack:
        rows = stack.enter_context(_written(arguments.rows, world))
        model = stack.enter_context(opened(found, world, arguments.engine, arguments.precision))
        for exam in exams:
            progress = ShownProgress(exam.name, exam.items, world.is_main)
            with contextlib.closing(progress):
                held = exam.hold(model, world, progress, arguments.batch_tokens)
            assert held is not None  # nothing interrupts it
            result, scores = held
            results.append(result)
            if rows is not None:
                rows.writelines(json.dumps(line) + "\n" for line in exam.rows(scores))
    say("\n".join(["", *table(results, found.config)]))
    if arguments.json and world.is_main:
        values = {**facts(arguments, found, world), "results": [result.as_json() for result in results]}
        write_atomic(Path(arguments.json), (json.dumps(values, indent=1) + "\n").encode())


@contextlib.contextmanager
def _written(name: str | None, world: "World") -> Iterator[IO[str] | None]:
    """The file for the rows, on the main rank."""
    if not name or not world.is_main:
        yield None
        return
    with Path(name).open("w", encoding="utf-8") as file:
        yield file
