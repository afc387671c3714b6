"""Plans as a table for the terminal."""

import re
from collections.abc import Iterator, Sequence

from megagpt.config import Config
from megagpt.planning.amounts import gigabytes, large, money, time, whole
from megagpt.planning.gpus import CPU
from megagpt.planning.plan import Plan
from megagpt.planning.setting import engine_words, is_same, mode_words

_NAMES = (
    "", "GPUs", "engine", "recomputed", "micro-batch", "GB", "to spare", "tokens/s", "MFU", "time", "GPU-hours", "cost",
)  # fmt: skip
_LEGEND = (
    "GB: of a GPU, at the fullest moment of a step; to spare: GB beside them and a reserve; tight: less than the",
    "reserve is left. recomputed: train.activation_checkpointing. MFU: share of the GPU's peak rate. *: as configured.",
)
_CPU_LEGEND = (
    "GB: of a rank, at the fullest moment of a step; to spare: GB beside them and a reserve; tight: less than the",
    "reserve is left. recomputed: train.activation_checkpointing. *: as configured.",
)
_TENSOR = "x t: t tensor ranks share each matrix product, engine.tensor_ranks=t."
_KEPT = "kept: gathered weights stay until the backward pass, engine.reshard_after_forward=false."


def best_of(plans: Sequence[Plan], by_mode: bool) -> list[Plan]:
    """The first plan of each engine with its sharding, or of each of these and each mode."""
    found: dict[tuple[str, str], Plan] = {}
    for plan in plans:
        config = plan.config
        mode = mode_words(config.train.activation_checkpointing) if by_mode else ""
        found.setdefault((engine_words(config.engine, plan.cluster.gpus), mode), plan)
    return list(found.values())


def table(plans: Sequence[Plan], own: Config, by_gpus: bool = False) -> Iterator[str]:
    """A row for each plan, and a legend. `own`: the config as given; `by_gpus`: with a column for the GPUs' number."""
    rows = [_row(plan, own) for plan in plans]
    priced = any(plan.cost is not None for plan in plans)
    on_cpu = bool(plans) and plans[0].cluster.gpu.name == CPU  # its peak rate is nominal, so that it has no MFU
    rows = [[name.replace("GPU-", "rank-") if on_cpu else name for name in _NAMES], *rows]
    left = {left_engine := _NAMES.index("engine"), _NAMES.index("recomputed")}
    hidden = set() if by_gpus else {_NAMES.index("GPUs")}
    hidden |= set() if priced else {_NAMES.index("cost")}
    hidden |= {_NAMES.index("MFU")} if on_cpu else set()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            if i not in hidden
        ]
        yield "  ".join(cells).rstrip()
    yield from _CPU_LEGEND if on_cpu else _LEGEND
    if any(" x " in row[left_engine] for row in rows):
        yield _TENSOR
    if any(", kept" in row[left_engine] for row in rows):
        yield _KEPT


def _row(plan: Plan, own: Config) -> list[str]:
    config, ranks = plan.config, plan.cluster.gpus
    mark = "*" if is_same(config, own) else ""
    spare = gigabytes(plan.spare) if plan.verdict == "fits" else plan.verdict.replace("does not fit", "no fit")
    # "fsdp in groups of 8 x 8" could be read as one product, so the tensor ranks come first.
    engine = re.sub(r"( in groups of \d+)?, (\d+) tensor ranks", r" x \2\1", engine_words(config.engine, ranks))
    return [
        mark, f"{ranks:,}", engine, mode_words(config.train.activation_checkpointing),
        str(config.micro_batch), gigabytes(plan.memory.total), spare, large(plan.speed.tokens_per_second),
        f"{plan.speed.mfu:.0%}", time(plan.days), whole(plan.gpu_hours), money(plan.cost or 0.0),
    ]  # fmt: skip
