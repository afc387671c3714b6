"""plan: memory, speed, days and cost of a run before it starts."""

import argparse
import functools
import json
import math
from typing import TYPE_CHECKING

from megagpt.commands.options import Add, add_config, count, one_name, split_words
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.planning.gpus import Cluster

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
    sub.add_argument(
        "--gpu", default="h100", metavar="NAME", help="kind of GPU, such as h100, a100-40gb, mi300x (h100)"
    )
    sub.add_argument("--per-node", type=count, default=8, metavar="N", help="GPUs of a node (8)")
    text = "network between nodes, for each GPU (that of the GPU's usual servers)"
    sub.add_argument("--network", type=above_zero, metavar="GBITS", help=text)
    sub.add_argument("--price", type=above_zero, metavar="DOLLARS", help="price of a GPU for an hour")
    sub.add_argument("--days", type=above_zero, metavar="D", help="time in which the run is to end")
    sub.add_argument("--compare", action="store_true", help="rank every engine, sharding and checkpointing mode")
    sub.add_argument("--all", action="store_true", help="with --compare: with every micro-batch that divides")
    sub.add_argument("--explain", action="store_true", help="print each term: value, formula, origin")
    sub.add_argument(
        "--trace", action="store_true", help="also measure the peak, on pretend ranks with the trainer's code"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object instead")
    sub.add_argument("--picture", metavar="FILE", help="draw memory, time and cost, as .png or .svg")
    sub.add_argument("--write", metavar="FILE", help="write the recommended setting as a config")
    for option, field, _, unit, what in _FIGURES:
        sub.add_argument(f"--gpu-{option}", type=above_zero, dest=field, metavar=unit, help=f"of the GPU: {what}")


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _plan(arguments: argparse.Namespace) -> int:
    from megagpt.config_file import load_config
    from megagpt.planning.answer import Question, answer
    from megagpt.planning.lines import answer_lines
    from megagpt.planning.plan import make_plan
    from megagpt.planning.record import answer_record

    names, given = split_words(arguments)
    name = one_name(names, "config, such as gpt3_xl.yaml")
    planner = functools.partial(make_plan, price=arguments.price)
    question = Question(
        load_config(name, given), _cluster(arguments), arguments.gpus is not None, planner, arguments.price,
        name, given, arguments.days, arguments.all,
    )  # fmt: skip
    found = answer(question, with_clusters=arguments.picture is not None)
    if arguments.json:
        print(json.dumps(answer_record(found), indent=2))
    else:
        print("\n".join(answer_lines(found, arguments.compare or arguments.all)))
    return 0


def _cluster(arguments: argparse.Namespace) -> "Cluster":
    """The cluster; without --gpus, one node of the GPU. Raises UserError if the GPUs are no whole nodes."""
    from megagpt.planning.gpus import Cluster, find_gpu

    given = {field: getattr(arguments, field) * unit for _, field, unit, _, _ in _FIGURES if getattr(arguments, field)}
    gpu, per_node = find_gpu(arguments.gpu, **given), arguments.per_node
    gpus = arguments.gpus or per_node
    if gpus > per_node and gpus % per_node:
        low = gpus // per_node * per_node
        sizes = ", ".join(str(size) for size in range(1, min(gpus, 16) + 1) if gpus % size == 0)
        ways = f"use {low:,} or {low + per_node:,} GPUs, or --per-node with one of {sizes}"
        raise UserError(f"--gpus {gpus} are no whole nodes of {per_node}; {ways}")
    return Cluster(gpu, gpus, min(gpus, per_node), arguments.network or 0)
