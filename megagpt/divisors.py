"""Divisors near a number that does not divide, for the advice in error messages."""

import itertools
from collections.abc import Iterable

# Numbers tried: enough for every real shape, and done in a moment.
_TRIED = 100_000


def near_divisors(number: int, near: int) -> list[int]:
    """The two divisors of a number that are nearest to another, in order; fewer if they are too far away."""
    near = min(near, number)
    distances = range(min(number, _TRIED))
    tried = (value for distance in distances for value in dict.fromkeys((near - distance, near + distance)))
    return sorted(itertools.islice((value for value in tried if 0 < value <= number and number % value == 0), 2))


def divisors_around(number: int, near: int) -> list[int]:
    """The largest divisor of a number up to another, and the smallest one above it; fewer if they are too far away."""
    below = (value for value in range(min(near, number), max(0, near - _TRIED), -1) if number % value == 0)
    above = (value for value in range(near + 1, min(number, near + _TRIED) + 1) if number % value == 0)
    return [*itertools.islice(below, 1), *itertools.islice(above, 1)]


def ways_to_divide(sequences: int, context: int, shares: int, size: int | None, group: int = 1) -> str:
    """Changes, each of one key or of the ranks, after which shares of a batch, one for each group of `group` ranks,
    divide it in micro-batches of `size` sequences; None: of any size. If no micro-batch divides it over these ranks,
    those on the nearest ranks are named."""
    unit = shares * (size or 1)
    low = sequences // unit * unit
    ways = [f"train.batch_tokens {_either(batch * context for batch in (low, low + unit) if batch)}"]
    if sequences % (size or 1) == 0:
        ways.append(f"{_either(group * n for n in divisors_around(sequences // (size or 1), shares))} ranks")
    if size and sequences % shares == 0:
        ways.append(f"train.micro_batch {_either(near_divisors(sequences // shares, size))}")
    elif size and (others := divisors_around(sequences, shares)):
        other = min(others, key=lambda other: abs(other - shares))
        ways.append(f"train.micro_batch {_either(near_divisors(sequences // other, size))} on {group * other} ranks")
    return ", or ".join(ways)


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))
