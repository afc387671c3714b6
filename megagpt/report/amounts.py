"""Numbers as people write them."""

import math

# Letters of large numbers, as English texts write them.
_LETTERS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def amount(value: float) -> str:
    """1.5B, 20M, 300k, 0.25."""
    for size, letter in _LETTERS:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def power(value: float) -> str:
    """8.55e18."""
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}" if value else "0"


def score(value: float) -> str:
    """An accuracy in percent, or a perplexity."""
    if not math.isfinite(value):
        return "unknown"
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:.2f}"
