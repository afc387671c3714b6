"""Sequence number to source and index: permutations, exact shares, no repetition in an epoch, at any size."""

import collections
import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.order import integer_weights, interleave, locate, permute

WEIGHTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=9)
HUGE = 10**11


# --- permute ---------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 5000), key=st.lists(st.integers(0, 2**40), max_size=3))
@settings(max_examples=200, deadline=None)
def test_permute_is_a_permutation(size: int, key: list[int]) -> None:
    result = permute(np.arange(size), size, *key)
    assert result.dtype == np.int64
    assert np.array_equal(np.sort(result), np.arange(size))


@pytest.mark.parametrize("size", [*range(1, 20), 63, 64, 65, 255, 256, 257, 4095, 4096, 4097])
def test_permute_is_a_permutation_near_powers_of_two(size: int) -> None:
    for key in range(20):
        assert set(permute(np.arange(size), size, key).tolist()) == set(range(size))


def test_permute_depends_on_every_part_of_the_key() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (11, 0, 0), (1, 10, 0)]
    rows = [tuple(permute(np.arange(1000), 1000, *key).tolist()) for key in keys]
    assert len(set(rows)) == len(keys)
    for first, second in itertools.combinations(rows, 2):
        # Two independent permutations agree in one place on average.
        assert sum(a == b for a, b in zip(first, second, strict=True)) < 12


@pytest.mark.parametrize("size", [500, 1024, 4097, 100_000])
def test_permute_looks_shuffled(size: int) -> None:
    """Displacement, neighbours, fixed points, ascents and halves are those of random permutations."""
    result = permute(np.arange(size), size, "seed", 3)
    index = np.arange(size)
    # A random permutation's mean displacement is size / 3, with a deviation of about 0.3 sqrt(size).
    assert abs(np.mean(np.abs(result - index)) - size / 3) < 2 * np.sqrt(size)
    assert np.sum(result == index) < 12
    assert np.sum(np.abs(np.diff(result)) == 1) < 15
    assert abs(np.mean(np.diff(result) > 0) - 0.5) < 5 / np.sqrt(12 * size)
    assert abs(np.corrcoef(index, result)[0, 1]) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(result[:-1], result[1:])[0, 1]) < 5 / np.sqrt(size)
    # Half of the first half stays in it.
    stay = np.mean(result[: size // 2] < size // 2)
    assert abs(stay - 0.5) < 5 * 0.5 / np.sqrt(size / 2)


def test_permute_reaches_every_permutation_equally_often() -> None:
    seen = collections.Counter(tuple(permute(np.arange(3), 3, key).tolist()) for key in range(3000))
    assert len(seen) == 6
    # Chi-square with 5 degrees of freedom: 30 is passed by chance once in 100,000.
    assert sum((count - 500) ** 2 / 500 for count in seen.values()) < 30


@given(
    size=st.integers(1, 3 * HUGE),
    numbers=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20),
    key=st.integers(),
)
@settings(max_examples=100, deadline=None)
def test_permute_is_injective_and_vectorised_at_any_size(size: int, numbers: list[float], key: int) -> None:
    index = np.unique(np.array([int(x * size) for x in numbers]))
    result = permute(index, size, key)
    assert result.min() >= 0
    assert result.max() < size
    assert len(np.unique(result)) == len(index)
    one_by_one = [permute(index[i : i + 1], size, key).item() for i in range(len(index))]
    assert result.tolist() == one_by_one


def test_permute_spreads_a_huge_range_evenly() -> None:
    result = permute(np.arange(100_000), HUGE, 0)
    assert len(np.unique(result)) == 100_000
    counts, _ = np.histogram(result, bins=100, range=(0, HUGE))
    assert np.sum((counts - 1000.0) ** 2 / 1000) < 180  # chi-square with 99 degrees of freedom: 180 is one in 10^6


def test_permute_takes_no_numbers_and_one_number() -> None:
    assert permute(np.arange(0), 10, 1).tolist() == []
    assert permute(np.arange(1), 1, 1).tolist() == [0]


# --- integer_weights -------------------------------------------------------------------------------------------------


@given(st.lists(st.decimals("0.000001", "100000", places=6), min_size=1, max_size=8))
@settings(deadline=None)
def test_integer_weights_keep_the_exact_proportion(weights: list[object]) -> None:
    exact = [Fraction(str(w)) for w in weights]
    result = integer_weights(tuple(float(w) for w in exact))
    assert all(isinstance(w, int) and w > 0 for w in result)
    assert [w * exact[0] for w in result] == [result[0] * w for w in exact]
    assert np.gcd.reduce(result) == 1


def test_integer_weights_are_the_smallest() -> None:
    assert integer_weights((1.0,)) == [1]
    assert integer_weights((0.6, 0.4)) == [3, 2]
    assert integer_weights((0.1, 0.2, 0.3)) == [1, 2, 3]
    assert integer_weights((3.0, 3.0)) == [1, 1]


# --- interleave ------------------------------------------------------------------------------------------------------


def check_interleaved(weights: list[int], first: int, count: int) -> None:
    """Every source is near its exact share at every prefix up to first + count, and no sequence of it is left out.

    `before` counts the sequences that the source already had, so it alone tells how far each source is.
    """
    source, before = interleave(np.arange(first, first + count), weights)
    assert source.dtype == before.dtype == np.int64
    total = sum(weights)
    bound = (len(weights) - 1).bit_length()  # log2 of the number of sources, rounded up
    expected: dict[int, int] = {}
    for n, (s, b) in enumerate(zip(source.tolist(), before.tolist(), strict=True), start=first):
        assert expected.get(s, b) == b, "numbers within a source must count up by one"
        expected[s] = b + 1
        for prefix, got in ((n, b), (n + 1, b + 1)):
            assert abs(got - Fraction(prefix * weights[s], total)) <= bound
    for s, weight in enumerate(weights):
        # A source without any of `count` sequences must have a small weight.
        if s not in expected:
            assert count * weight <= (2 * bound + 1) * total
    if first == 0:
        counts = collections.Counter(source.tolist())
        assert expected == dict(counts), "numbers within a source start at 0"


@given(weights=WEIGHTS)
@settings(max_examples=100, deadline=None)
def test_interleave_keeps_exact_shares_from_the_start(weights: list[int]) -> None:
    check_interleaved(weights, 0, 600)


@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=20), first=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_interleave_keeps_exact_shares_from_anywhere(weights: list[int], first: int) -> None:
    check_interleaved(weights, first, 300)


@given(weights=WEIGHTS, first=st.integers(HUGE // 2, HUGE))
@settings(max_examples=100, deadline=None)
def test_interleave_keeps_exact_shares_at_huge_numbers(weights: list[int], first: int) -> None:
    check_interleaved(weights, first, 200)


@pytest.mark.parametrize(
    "weights",
    [(2_500_000_000.0, 7_000_000_001.0), (1.3e12, 1.8e11, 5.0e9 + 1), (123456.789012, 0.333333, 77777.000001)],
    ids=["two", "trillions", "decimals"],
)
def test_interleave_takes_token_counts_as_weights(weights: tuple[float, ...]) -> None:
    """A natural choice of weights: each corpus by its size."""
    for first in (0, 10**6, 300 * 10**6):
        check_interleaved(integer_weights(weights), first, 200)


def test_interleave_takes_numbers_in_any_order() -> None:
    numbers = np.random.default_rng(0).permutation(2000)
    source, before = interleave(numbers, [5, 1, 3])
    ordered_source, ordered_before = interleave(np.arange(2000), [5, 1, 3])
    assert np.array_equal(source, ordered_source[numbers])
    assert np.array_equal(before, ordered_before[numbers])


# --- locate ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    pairs=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_no_sequence_comes_twice_in_an_epoch(pairs: list[tuple[int, int]], seed: int) -> None:
    sizes, weights = [size for size, _ in pairs], [weight for _, weight in pairs]
    source, index = locate(np.arange(400), sizes, weights, seed)
    assert source.dtype == index.dtype == np.int64
    for s, size in enumerate(sizes):
        mine = index[source == s]
        assert np.all((mine >= 0) & (mine < size))
        for start in range(0, len(mine), size):
            epoch = mine[start : start + size].tolist()
            assert len(set(epoch)) == len(epoch)


def test_epochs_sources_and_seeds_are_shuffled_differently() -> None:
    source, index = locate(np.arange(4000), [500, 500], [1, 1], seed=7)
    epochs = [tuple(index[source == s][e * 500 : (e + 1) * 500].tolist()) for s in (0, 1) for e in range(4)]
    _, other = locate(np.arange(4000), [500, 500], [1, 1], seed=8)
    epochs.append(tuple(other[source == 0][:500].tolist()))
    for first, second in itertools.combinations(epochs, 2):
        assert sorted(first) == sorted(second) == list(range(500))
        assert sum(a == b for a, b in zip(first, second, strict=True)) < 12


@given(numbers=st.lists(st.integers(0, HUGE), min_size=1, max_size=20), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_locate_is_the_same_for_many_numbers_and_for_one(numbers: list[int], seed: int) -> None:
    sizes, weights = [300_000_000, 7, 50_000, 1], [700_000, 1, 299_998, 1]
    source, index = locate(np.array(numbers), sizes, weights, seed)
    for n, s, p in zip(numbers, source.tolist(), index.tolist(), strict=True):
        one_source, one_index = locate(np.array([n]), sizes, weights, seed)
        assert (one_source.item(), one_index.item()) == (s, p)
        assert 0 <= p < sizes[s]


def test_locate_takes_no_numbers() -> None:
    source, index = locate(np.arange(0), [3, 4], [1, 1], 0)
    assert len(source) == len(index) == 0
