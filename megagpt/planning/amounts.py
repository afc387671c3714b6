"""Amounts as people write them, to three digits: a plan is no better. Lines of text for the terminal."""

import math
import textwrap

# Columns of a line.
WIDTH = 110

_LETTERS = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


def large(value: float) -> str:
    """300B, 3.15M, 52,300."""
    for size, letter in _LETTERS:
        if value >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return whole(value)


def whole(value: float) -> str:
    """310,000; 42; 8.5."""
    return f"{_three(value):,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """9.98 s; 43.7 ms."""
    return f"{whole(value)} s" if value >= 1 or not value else f"{value * 1e3:.3g} ms"


def time(days: float) -> str:
    """22.1 days; 5.3 hours; 45 min; 1.3 s."""
    minutes = days * 1440
    if minutes < 1:
        return seconds(minutes * 60)
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.3g} hours" if days < 3 else f"{whole(days)} days"


def money(dollars: float) -> str:
    """$18; $671,000; $1.42M."""
    if dollars >= 999_500:
        return f"${dollars / 1e6:,.3g}M" if dollars < 999.5e6 else f"${_three(dollars / 1e6):,.0f}M"
    return f"${whole(dollars)}" if dollars >= 10 else f"${dollars:.2f}"


def energy(kwh: float) -> str:
    """190 kWh; 1.5 MWh."""
    return f"{whole(kwh / 1000)} MWh" if kwh >= 999.5 else f"{whole(kwh)} kWh"


def gigabytes(size: float) -> str:
    """Bytes in GB of 1e9, without the unit."""
    return f"{size / 1e9:,.1f}"


def _three(value: float) -> float:
    """The value, rounded to three digits."""
    return round(value, 2 - math.floor(math.log10(value))) if value > 0 else value


def wrapped(text: str, label: str = "", indent: int = 0) -> list[str]:
    """The text in lines. `label`: in front of it, in a column of `indent` characters."""
    first = f"  {label:{indent - 3}} " if indent else ""
    inner = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=inner, break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip
