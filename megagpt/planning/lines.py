"""Plans as lines for people, at most 110 characters wide."""

from collections.abc import Iterator, Sequence

from megagpt.planning.gpus import Cluster
from megagpt.planning.plan import Plan
from megagpt.planning.setting import engine_words, mode_words, setting_words

_WIDTH = 110
_LABEL = 13
_GB = 1e9


def heading(plan: Plan) -> Iterator[str]:
    """The run, and the cluster."""
    config, model = plan.config, plan.config.model
    batch = f"{config.train.batch_tokens:,} ({config.batch_sequences:,} sequences of {model.context:,})"
    yield f"{config.run.name}: {model.parameters:,} parameters, {large(config.train.tokens)} tokens in batches of {batch}"
    yield cluster_words(plan.cluster)


def cluster_words(cluster: Cluster) -> str:
    """The cluster as a sentence."""
    gpu, each = cluster.gpu, f"with {cluster.gpu.memory / _GB:.1f} GB each"
    if cluster.gpus == 1:
        return f"1 {gpu.name} {each}"
    if cluster.nodes == 1:
        return f"one node of {cluster.gpus} {gpu.name} {each}"
    usual = " (assumed; --network names another)" if cluster.network == gpu.network else ""
    network = f"network: {cluster.network:g} Gbit/s a GPU{usual}"
    return f"{cluster.gpus:,} {gpu.name} {each}, {cluster.nodes:,} nodes of {cluster.per_node}; {network}"


def plan_lines(plan: Plan) -> Iterator[str]:
    """Memory, step, speed, time and cost of one plan."""
    memory, speed, ranks = plan.memory, plan.speed, plan.cluster.gpus
    low, high = plan.range
    parts = {name: f"{size / _GB:.1f}" for name, size in memory.parts.items()}
    peak = f"{memory.total / _GB:.1f} GB a GPU at the fullest moment, {memory.moment}: "
    yield from _labelled("memory", peak + fit_words(plan))
    yield from _labelled("", "GB: " + _sum(parts))
    shown = {name: seconds_words(taken) for name, taken in speed.seconds.items()}
    batches = f"{plan.accumulation} micro-batch{'es' if plan.accumulation > 1 else ''} of each rank"
    yield from _labelled("step", f"{seconds_words(speed.step)} for {batches}: {_sum(shown)}")
    rates = f"{speed.range[0]:,.0f} to {speed.range[1]:,.0f}"
    each = f"{speed.tokens_per_second / ranks:,.0f} a GPU" if ranks > 1 else ""
    facts = [f"{speed.tokens_per_second:,.0f} tokens/s ({rates})", each, f"MFU {speed.mfu:.0%}"]
    yield from _labelled("speed", ", ".join(filter(None, facts)))
    days = f"{time_words(plan.days)} ({time_words(low * plan.days)} to {time_words(high * plan.days)})"
    yield from _labelled("time", f"{days}, without validations, exams, samples and saves")
    bill = f"{plan.gpu_hours:,.0f} GPU-hours"
    if plan.cost is not None:
        bill += f" = {money(plan.cost)} ({money(low * plan.cost)} to {money(high * plan.cost)})"
        bill += f" at ${plan.price:g} an hour"
    yield from _labelled("bill", f"{bill}; {energy_words(plan.energy)} for the GPUs at full power")
    if plan.config.train.batch_ramp_tokens:
        yield from _labelled("batch ramp", ramp_words(plan))
    yield from _labelled("range", speed.evidence)


def ramp_words(plan: Plan) -> str:
    """What the ramp costs, and why."""
    config, unit = plan.config, plan.cluster.gpus * plan.config.micro_batch
    share = plan.ramp_seconds / plan.seconds
    cost = "" if plan.cost is None else f" or {money(share * plan.cost)}"
    start = config.train.batch_ramp_start // config.model.context
    why = f"it begins with {start:,} sequences a step"
    why += f", and one micro-batch of all ranks is {unit:,}" if unit > start else ""
    return f"costs {time_words(share * plan.days)}{cost} of this ({share:.1%}): {why}"


def fit_words(plan: Plan) -> str:
    """The verdict, with what is left or missing."""
    memory, capacity = plan.memory, plan.cluster.gpu.memory
    with_reserve = f"with a reserve of {memory.reserve / _GB:.1f} GB"
    match plan.verdict:
        case "fits":
            return f"fits {with_reserve}, {plan.spare / _GB:.1f} GB to spare"
        case "tight":
            return f"tight: it fits, but not {with_reserve}, which needs {-plan.spare / _GB:.1f} GB more"
    return f"does not fit this code: {(memory.total - capacity) / _GB:.1f} GB more than the GPU has"


def advice(name: str, given: Sequence[str], plan: Plan, changed: Sequence[str], own: Plan | None) -> Iterator[str]:
    """The recommended setting in a sentence, and what to type. `given`: the overrides that were typed already."""
    words = setting_words(plan.config, plan.cluster.gpus)
    if own is not None and not changed:
        yield "Recommended: as configured; no setting that fits is faster by more than 1%."
        return
    facts = [time_words(plan.days), f"{plan.gpu_hours:,.0f} GPU-hours"]
    facts += [money(plan.cost)] if plan.cost is not None else []
    instead = f", instead of {time_words(own.days)}" if own is not None and own.verdict == "fits" else ""
    verdict = "" if plan.verdict == "fits" else f" ({plan.verdict}: nothing else fits)"
    yield from wrapped(f"Recommended: {words}{verdict}: {', '.join(facts)}{instead}. Type:")
    yield "  " + " ".join(["megagpt train", name, *map(_quoted, [*given, *changed])])


def table(plans: Sequence[Plan], by_gpus: bool = False) -> Iterator[str]:
    """A row for each plan. `by_gpus`: the plans differ in their numbers of GPUs."""
    priced = any(plan.cost is not None for plan in plans)
    names = ["GPUs"] if by_gpus else []
    names += ["engine", "recomputed", "micro-batch", "GB", "to spare", "tokens/s", "MFU", "time", "GPU-hours"]
    names += ["cost"] if priced else []
    rows = [names]
    for plan in plans:
        config, ranks = plan.config, plan.cluster.gpus
        spare = f"{plan.spare / _GB:.1f}" if plan.verdict == "fits" else plan.verdict.replace("does not fit", "no fit")
        row = [f"{ranks:,}"] if by_gpus else []
        row += [engine_words(config.engine, ranks), mode_words(config.train.activation_checkpointing)]
        row += [str(config.micro_batch), f"{plan.memory.total / _GB:.1f}", spare]
        row += [large(plan.speed.tokens_per_second), f"{plan.speed.mfu:.0%}", time_words(plan.days)]
        row += [f"{plan.gpu_hours:,.0f}"] + ([money(plan.cost)] if plan.cost is not None else [])
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = names.index("recomputed") + 1, names.index("engine")
    for row in rows:
        cells = [
            cell.ljust(width) if i in range(texts[1], texts[0]) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    yield "GB: of a GPU at its fullest moment; to spare: GB beside it and the reserve. MFU: share of the GPU's peak rate"
    yield "that the model's own products take. recomputed: train.activation_checkpointing."


def _labelled(label: str, text: str) -> Iterator[str]:
    for i, line in enumerate(_folded(text, _WIDTH - _LABEL - 2)):
        yield f"  {label if i == 0 else '':{_LABEL}}{line}"


def wrapped(text: str) -> Iterator[str]:
    yield from _folded(text, _WIDTH)


def _folded(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def _sum(parts: dict[str, str]) -> str:
    return " + ".join(f"{name} {value}" for name, value in parts.items())


def _quoted(word: str) -> str:
    return f"'{word}'" if set(word) & set(" {}[]*?;&|<>()$`\"\\!#~") else word


def large(value: float) -> str:
    """300B, 3.15M, 52,300."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}"


def seconds_words(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 or not value else f"{value * 1e3:.3g} ms"


def time_words(days: float) -> str:
    """22.1 days; 45 min."""
    minutes = days * 1440
    if minutes < 90:
        return f"{minutes:.0f} min" if minutes >= 1 else f"{minutes * 60:.0f} s"
    return f"{minutes / 60:.1f} h" if days < 3 else f"{days:,.1f} days"


def money(dollars: float) -> str:
    """$18; $670,000; $1.42M."""
    return f"${dollars / 1e6:.2f}M" if dollars >= 999_500 else f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"


def energy_words(kwh: float) -> str:
    return f"{kwh / 1000:,.1f} MWh" if kwh >= 1000 else f"{kwh:,.1f} kWh"
