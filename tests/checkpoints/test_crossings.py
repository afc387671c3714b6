"""Every engine's checkpoint under every other, on other numbers of ranks."""

import pytest

from megagpt.parity.cases import SETUPS
from megagpt.parity.crossings import PAIRS, PLACES, TOLERANCE, WORLDS, Crossing, Place, Result, cross

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results() -> dict[Crossing, Result]:
    return cross(PAIRS)


def test_the_pairs_are_all_engines_worlds_and_places() -> None:
    """`megagpt parity --tables crossings` makes all of the 324 crossings."""
    assert {(a.setup, b.setup) for a, b in PAIRS} == {(a, b) for a in SETUPS for b in SETUPS}
    assert {(a.ranks, b.ranks) for a, b in PAIRS} == {(a, b) for a in WORLDS for b in WORLDS}
    assert {a for a, _ in PAIRS} == {b for _, b in PAIRS} == set(PLACES)
    assert any(a == b for a, b in PAIRS)


@pytest.mark.parametrize("source", SETUPS)
@pytest.mark.parametrize("target", SETUPS)
def test_what_follows_is_the_plain_run(source: str, target: str, results: dict[Crossing, Result]) -> None:
    """Over 20 steps; to the last bit where engine and world size stay as they were."""
    ((crossing, result),) = ((c, r) for c, r in results.items() if (c[0].setup, c[1].setup) == (source, target))
    assert result.difference <= TOLERANCE, crossing
    if crossing[0] == crossing[1]:
        assert result.same_bits, crossing


def test_every_engine_goes_on_bit_for_bit() -> None:
    """Under itself, on the same number of ranks; two of them are saved and resumed in one process each way."""
    places = [Place(setup, 2) for setup in SETUPS]
    for (place, _), result in cross([(place, place) for place in places]).items():
        assert result.same_bits, place
