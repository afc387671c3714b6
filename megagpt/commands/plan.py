"""plan: memory, speed, days and cost of a run before it starts."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.commands.files import check_drawing, picture_kind, target_file, write_file
from megagpt.commands.options import Add, above_zero, add_config, count, one_name, split_words
from megagpt.console import warn
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.config import Config
    from megagpt.planning.answer import Answer
    from megagpt.planning.gpus import Cluster
    from megagpt.planning.measured import Own

# Options that give a GPU's figures: option, field of `Gpu`, its unit in the field's own, what it is.
_FIGURES = (
    ("memory", "memory", 1e9, "GB", "memory that a program can use"),
    ("tflops", "half", 1e12, "TFLOP/s", "dense bf16 products"),
    ("fp32-tflops", "fp32", 1e12, "TFLOP/s", "fp32 products"),
    ("bandwidth", "bandwidth", 1e12, "TB/s", "bandwidth of its memory"),
    ("link", "link", 1e9, "GB/s", "to the other GPUs of a node, one way"),
    ("watts", "watts", 1.0, "W", "power"),
)


def register(add: Add) -> None:
    text = "Plan a run before it starts: what fits, how fast it is, how many days it takes, what it costs."
    sub = add("plan", _plan, text)
    add_config(sub)
    text = "number of GPUs; without it, the smallest cluster that fits, the cheapest, and the one that meets --days"
    sub.add_argument("--gpus", type=count, metavar="N", help=text)
    text = "kind of GPU, such as h100, a100-40gb, mi300x (h100; with --calibrate, the run's)"
    sub.add_argument("--gpu", metavar="NAME", help=text)
    sub.add_argument("--per-node", type=count, default=8, metavar="N", help="GPUs of a node (8)")
    text = "network between nodes, for each GPU (that of the GPU's usual servers)"
    sub.add_argument("--network", type=above_zero, metavar="GBITS", help=text)
    sub.add_argument("--price", type=above_zero, metavar="DOLLARS", help="price of a GPU for an hour")
    sub.add_argument("--days", type=above_zero, metavar="D", help="time in which the run is to end")
    sub.add_argument(
        "--compare", action="store_true", help="rank every engine, sharding, checkpointing mode, tensor ranks"
    )
    sub.add_argument("--all", action="store_true", help="with --compare: with every micro-batch that divides")
    text = "take the constants from the measured speed of a run of any size on such devices, CPUs too"
    sub.add_argument("--calibrate", metavar="RUN", help=text)
    sub.add_argument("--explain", action="store_true", help="print each term: value, formula, origin")
    sub.add_argument(
        "--trace", action="store_true", help="also measure the peak, on pretend ranks with the trainer's code"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object instead")
    sub.add_argument("--picture", metavar="FILE", help="draw memory, time and cost, as .png or .svg")
    sub.add_argument("--write", metavar="FILE", help="write the recommended setting as a config")
    for option, field, _, unit, what in _FIGURES:
        sub.add_argument(f"--gpu-{option}", type=above_zero, dest=field, metavar=unit, help=f"of the GPU: {what}")


def _plan(arguments: argparse.Namespace) -> int:
    from megagpt.config_file import file_engine, load_config
    from megagpt.planning.answer import Question, answer
    from megagpt.planning.lines import answer_lines
    from megagpt.planning.plan import Planner
    from megagpt.planning.record import answer_record

    names, given = split_words(arguments)
    name = one_name(names, "config, such as gpt3_xl.yaml")
    picture = target_file(arguments.picture, "--picture") if arguments.picture is not None else None
    written = target_file(arguments.write, "--write") if arguments.write is not None else None
    if picture is not None:
        picture_kind(picture, "--picture")
        check_drawing("plan --picture")
    config, own = load_config(name, given), _own(arguments)
    cluster = _cluster(arguments, own, config)
    if own:
        own.check(config, cluster)
    planner = Planner(arguments.price, own.calibration if own else None)
    question = Question(
        config, cluster, arguments.gpus is not None, planner, arguments.price,
        name, given, file_engine(name), arguments.days, arguments.compare, arguments.all,
    )  # fmt: skip
    found = answer(question, with_clusters=picture is not None)
    if arguments.trace and found.explained is not None:
        from megagpt.planning.trace import check_trace

        check_trace(found.explained.config)
    if not arguments.json:
        print("\n".join(answer_lines(found, arguments.explain)), flush=True)
    traced = _trace(found, arguments.json) if arguments.trace else None
    if arguments.json:
        record = answer_record(found, arguments.explain)
        print(json.dumps(record if traced is None else {**record, "trace": traced}, indent=2))
    if written is not None:
        _write(found, written)
    if picture is not None:
        _draw(found, picture)
    return 0


def _trace(found: "Answer", silent: bool) -> dict[str, Any] | None:
    """Trace the explained plan, and print the result unless `silent`; the result as values."""
    from megagpt.planning.amounts import gigabytes, wrapped

    plan = found.explained
    if plan is None:
        return None
    ranks, formula = plan.cluster.gpus, plan.memory.total
    warn(f"tracing a step of {plan.config.run.name} on {ranks:,} pretend rank(s): seconds, or two minutes for 175B")
    from megagpt.planning.trace import trace

    traced = trace(plan.config, ranks)
    if not silent:
        peak, moment = f"{gigabytes(traced.peak)} GB at the peak, in {traced.moment}", f"{traced.seconds:.0f} s"
        words = f"Traced in {moment}: {peak}; the formula says {gigabytes(formula)}, {formula / traced.peak - 1:+.1%}."
        print("\n".join(["", *wrapped(words)]))
    return {**dataclasses.asdict(traced), "formula": formula}


def _write(found: "Answer", target: Path) -> None:
    from megagpt.planning.written import config_text

    text = config_text(found.question, found.shown, str(target))
    write_file(target, text.encode("utf-8", errors="surrogateescape"), "--write")
    _wrote(target)


def _draw(found: "Answer", target: Path) -> None:
    from megagpt.planning.tables import best_of
    from megagpt.report import figures
    from megagpt.report.plan_figures import plan_picture

    clusters, shown = found.clusters, found.shown
    assert clusters is not None
    bars = best_of(found.plans, by_mode=False) if found.question.fixed else clusters.plans
    if found.own is not None and found.question.fixed:
        bars = [found.own, *(plan for plan in bars if plan is not found.own)]
    with figures.themed(figures.LIGHT):
        figure = plan_picture(bars, clusters.plans, shown, figures.LIGHT)
        data = figures.image(figure, picture_kind(target, "--picture"))
    write_file(target, data, "--picture")
    _wrote(target)


def _wrote(target: Path) -> None:
    """On stderr: with --json, stdout is one JSON object."""
    warn(f"wrote {target}")


def _figures(arguments: argparse.Namespace) -> dict[str, float]:
    """The GPU's figures that were given, by the fields of `Gpu`."""
    return {field: getattr(arguments, field) * unit for _, field, unit, _, _ in _FIGURES if getattr(arguments, field)}


def _own(arguments: argparse.Namespace) -> "Own | None":
    """The constants of --calibrate. Raises UserError."""
    if arguments.calibrate is None:
        return None
    from megagpt.files import named_path
    from megagpt.planning.gpus import CPU, find_gpu
    from megagpt.planning.measured import own_constants

    given = find_gpu(arguments.gpu, **_figures(arguments)) if arguments.gpu not in (None, CPU) else None
    own = own_constants(named_path(arguments.calibrate), given, arguments.network or 0)
    if own.gpu.name == CPU:  # its ranks share its cores, so that another number of them is not planned
        arguments.gpus = arguments.gpus or own.run.ranks
    return own


def _can_start(config: "Config", ranks: int) -> bool:
    try:
        config.check_ranks(ranks)
    except UserError:
        return False
    return True


def _cluster(arguments: argparse.Namespace, own: "Own | None", config: "Config") -> "Cluster":
    """The cluster; without --gpus, one node of the GPU. Raises UserError if the GPUs are no whole nodes, with the
    nearest numbers over which the batch can be divided."""
    from megagpt.planning.gpus import CPU, Cluster, find_gpu
    from megagpt.planning.search import gpu_counts

    if own and own.gpu.name == CPU and arguments.gpu in (None, CPU):
        if given := [f"--gpu-{option}" for option, field, *_ in _FIGURES if getattr(arguments, field)]:
            raise UserError(
                f"{', '.join(given)}: a figure of a GPU, and --calibrate {own.run.name} ran on a CPU; leave it out"
            )
        return Cluster(own.gpu, arguments.gpus, arguments.gpus)
    if arguments.gpu == CPU:
        raise UserError("--gpu cpu: the speed of a CPU is known from a run of its own only; add --calibrate RUN")
    name = arguments.gpu if arguments.gpu is not None else own.gpu.name if own else "h100"
    gpu, per_node = find_gpu(name, **_figures(arguments)), arguments.per_node
    gpus = arguments.gpus or per_node
    if gpus > per_node and gpus % per_node:
        counts = [n for n in gpu_counts(config, per_node) if _can_start(config, n)] or gpu_counts(config, per_node)
        near = [*[n for n in counts if n < gpus][-1:], *[n for n in counts if n > gpus][:1]]
        sizes = ", ".join(str(size) for size in range(1, min(gpus, 16) + 1) if gpus % size == 0)
        ways = f"use {' or '.join(map(str, near))} GPUs, or --per-node with one of {sizes}"
        raise UserError(f"--gpus {gpus} are no whole nodes of {per_node}; {ways}")
    return Cluster(gpu, gpus, min(gpus, per_node), arguments.network or 0)
