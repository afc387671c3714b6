"""The memory over the profiled steps, as a picture: one column of pixels for each stretch of time, as high as its
fullest moment, in the colour of the host's activity then."""

import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megagpt.profiling import ranges
from megagpt.profiling.trace import Trace

# Size of the picture and its margins (pixels).
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 1200, 480, 90, 20, 60, 50
_UPDATE, _BETWEEN = "update", "between steps"
# Activity of the host -> its colour, from the palette of Okabe and Ito, which colour-blind people can tell apart.
_COLOURS = {"forward": "#56B4E9", "backward": "#0072B2", _UPDATE: "#E69F00", _BETWEEN: "#999999"}
_RESERVED, _INK, _GRID = "#D55E00", "#222222", "#DDDDDD"
_TICKS = 5


def memory_picture(trace: Trace, title: str) -> Image.Image:
    """On a GPU, the height is what PyTorch has allocated there, and a line shows what it has reserved. On a CPU, only
    what was allocated since the profile began is known."""
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    width, floor = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
    edges = np.linspace(trace.begin, trace.end, width + 1)
    allocated, reserved = fullest(trace, edges)
    top = max(1.0, allocated.max(), reserved.max()) * 1.05
    unit, name = next((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")) if top >= u)

    def height(value: float) -> float:
        return floor - value / top * (floor - _TOP)

    for i in range(_TICKS + 1):
        value = top / 1.05 * i / _TICKS
        draw.line([(_LEFT, height(value)), (_WIDTH - _RIGHT, height(value))], fill=_GRID)
        draw.text((_LEFT - 8, height(value)), f"{value / unit:.4g} {name}", fill=_INK, font=font, anchor="rm")
        x, time = _LEFT + width * i / _TICKS, (trace.end - trace.begin) / 1e6 * i / _TICKS
        draw.text((x, floor + 8), f"{time:,.4g} ms", fill=_INK, font=font, anchor="mt" if i < _TICKS else "rt")
    for x, (value, activity) in enumerate(zip(allocated, activities(trace, edges), strict=True)):
        draw.line([(_LEFT + x, floor), (_LEFT + x, height(value))], fill=_COLOURS[activity])
    if reserved.any():
        draw.line([(_LEFT + x, height(value)) for x, value in enumerate(reserved)], fill=_RESERVED, width=2)
    draw.line([(_LEFT, _TOP), (_LEFT, floor), (_WIDTH - _RIGHT, floor)], fill=_INK)
    draw.text((_LEFT, 10), title, fill=_INK, font=font)
    x = float(_LEFT)
    for label, colour in [*_COLOURS.items(), *([("reserved", _RESERVED)] if reserved.any() else [])]:
        draw.rectangle([x, 36, x + 12, 48], fill=colour)
        draw.text((x + 18, 34), label, fill=_INK, font=font)
        x += 36 + draw.textlength(label, font=font)
    peak = f"peak {allocated.max() / unit:.4g} {name}"
    draw.text((_WIDTH - _RIGHT, 34), peak, fill=_INK, font=font, anchor="ra")
    return picture


def fullest(trace: Trace, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most bytes allocated and reserved in each stretch between two of the edges (ns)."""
    times, *values = np.array([(edges[0], 0, 0), *trace.memory], dtype=np.float64).T
    # The last change before each edge holds at it.
    before = np.searchsorted(times, edges, side="right") - 1
    stretches = [slice(a, b + 1) for a, b in itertools.pairwise(before)]
    allocated, reserved = (np.array([counts[stretch].max() for stretch in stretches]) for counts in values)
    return allocated, reserved


def activities(trace: Trace, edges: np.ndarray) -> list[str]:
    """The host's activity in the middle of each stretch."""
    names = [_BETWEEN] * (len(edges) - 1)
    middles = (edges[:-1] + edges[1:]) / 2
    # A forward pass lies inside its micro-batch; the rest of that is the backward pass.
    known = {ranges.MICRO_BATCH: "backward", ranges.FORWARD: "forward", ranges.UPDATE: _UPDATE}
    for begin, end, name in sorted(trace.phases, key=lambda phase: (phase[0], -phase[1])):
        if name in known:
            first, last = np.searchsorted(middles, (begin, end))
            names[first:last] = [known[name]] * (last - first)
    return names
