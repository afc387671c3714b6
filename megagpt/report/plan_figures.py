"""A plan as a picture: memory of a GPU by part, time and cost against the number of GPUs."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megagpt.planning.amounts import money, time, whole
from megagpt.planning.plan import Plan
from megagpt.planning.setting import engine_words, mode_words
from megagpt.report.figures import Theme

_GB = 1e9
# Most bars in a picture: more have no room for their names.
_MOST_BARS = 10
# Width of the picture, and heights of the memory's panel and of the two below it (inches).
_WIDTH, _HEIGHTS = 9.5, (4.6, 3.2)


def plan_picture(bars: Sequence[Plan], curve: Sequence[Plan], shown: Plan, theme: Theme) -> Figure:
    """One picture. `bars`: plans whose memory is drawn; `curve`: the best plan on each number of GPUs; `shown`: the
    recommended plan, which gets a mark."""
    figure = Figure(figsize=(_WIDTH, sum(_HEIGHTS)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=_HEIGHTS, squeeze=False).flatten()
    config, cluster = shown.config, shown.cluster
    figure.suptitle(f"{config.run.name} on {cluster.gpu.name}", x=0.01, ha="left")
    _draw_memory(upper.subplots(), list(bars)[:_MOST_BARS], theme)
    left, right = lower.subplots(1, 2)
    _draw_curve(left, curve, shown, [plan.days for plan in curve], shown.days, theme)
    left.set_yscale("log")
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_title("Time to the last token", loc="left")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: time(value)))
    costs = [plan.gpu_hours if plan.cost is None else plan.cost for plan in curve]
    priced = shown.cost is not None
    _draw_curve(right, curve, shown, costs, shown.gpu_hours if shown.cost is None else shown.cost, theme)
    right.set_title(f"Cost at ${shown.price:g} an hour" if priced else "GPU-hours", loc="left")
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: money(value) if priced else whole(value)))
    return figure


def _draw_memory(axes: Axes, plans: Sequence[Plan], theme: Theme) -> None:
    """A bar for each plan, of the parts at its fullest moment, with the reserve on top, and the GPU's memory."""
    by_gpus = len({plan.cluster.gpus for plan in plans}) > 1
    names = list(dict.fromkeys(name for plan in plans for name, size in plan.memory.parts.items() if size))
    bottoms = [0.0] * len(plans)
    places = range(len(plans))
    for i, name in enumerate(names):
        sizes = [plan.memory.parts.get(name, 0.0) / _GB for plan in plans]
        colour, hatch = theme.runs[i % len(theme.runs)], "//" if i >= len(theme.runs) else ""
        axes.barh(places, sizes, left=bottoms, color=colour, hatch=hatch, edgecolor=theme.paper, label=name, height=0.7)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    reserves = [plan.memory.reserve / _GB for plan in plans]
    axes.barh(places, reserves, left=bottoms, color=theme.grid, edgecolor=theme.paper, label="reserve", height=0.7)
    capacity = plans[0].cluster.gpu.memory / _GB
    label = f"{plans[0].cluster.gpu.name}: {capacity:.1f} GB"
    axes.axvline(capacity, color=theme.ink, linestyle=(0, (6, 2)), linewidth=1.2, label=label)
    most = max(bottom + reserve for bottom, reserve in zip(bottoms, reserves, strict=True))
    axes.set_xlim(0, min(max(most, capacity) * 1.03, 2.5 * capacity))
    axes.set_yticks(list(places), [_bar_name(plan, by_gpus) for plan in plans])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("GB")
    axes.set_title("Memory of a GPU at the fullest moment of a step", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3)


def _bar_name(plan: Plan, by_gpus: bool) -> str:
    config, gpus = plan.config, plan.cluster.gpus
    mode = mode_words(config.train.activation_checkpointing)
    number = f"{gpus:,} GPUs: " if by_gpus else ""
    return f"{number}{engine_words(config.engine, gpus)},\n{mode}, micro-batch {config.micro_batch}"


def _draw_curve(
    axes: Axes, plans: Sequence[Plan], shown: Plan, values: Sequence[float], value: float, theme: Theme
) -> None:
    """Values against the number of GPUs, with the 80% range as a band."""
    gpus, colour = [plan.cluster.gpus for plan in plans], theme.runs[0]
    lows, highs = ([v * plan.range[end] for v, plan in zip(values, plans, strict=True)] for end in (0, 1))
    axes.fill_between(gpus, lows, highs, color=colour, alpha=0.2, linewidth=0, label="80% range")
    axes.plot(gpus, values, color=colour, marker="o", markersize=3)
    mark = {"color": theme.runs[1], "marker": "o", "markersize": 7, "linestyle": "none"}
    axes.plot([shown.cluster.gpus], [value], label="recommended", **mark)  # type: ignore[arg-type]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
    axes.set_xlabel("GPUs")
    axes.legend(loc="best")
