"""Every engine's checkpoint under every other, on other numbers of ranks."""

import pytest

from megagpt.measure.cases import ENGINE_CASES
from megagpt.measure.crossings import SETTINGS, TOLERANCE, WORLDS, Crossing, Result, Setting, cross

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("crossings")]


# Every pair of engines once, every pair of world sizes equally often.
PAIRS = [
    (Setting(source, WORLDS[(i + j) % 3]), Setting(target, WORLDS[(i + j // 3 + 2 * (j % 3)) % 3]))
    for i, source in enumerate(ENGINE_CASES)
    for j, target in enumerate(ENGINE_CASES)
]
# The same engine on the same number of ranks resumes bit for bit.
SAME = [
    (Setting(name, 2), Setting(name, 2)) for name in ENGINE_CASES if (Setting(name, 2), Setting(name, 2)) not in PAIRS
]


@pytest.fixture(scope="module")
def results() -> dict[Crossing, Result]:
    return cross(PAIRS + SAME, steps=3, saved_at=4)


def test_the_pairs_have_every_engine_and_every_world_size() -> None:
    """`megagpt parity --tables crossings` makes all of the 324 crossings."""
    assert {(a.engine, b.engine) for a, b in PAIRS} == {(a, b) for a in ENGINE_CASES for b in ENGINE_CASES}
    assert {(a.ranks, b.ranks) for a, b in PAIRS} == {(a, b) for a in WORLDS for b in WORLDS}
    assert {a for a, _ in PAIRS} == {b for _, b in PAIRS} == set(SETTINGS)
    assert any(a == b for a, b in PAIRS)


@pytest.mark.parametrize("target", ENGINE_CASES)
@pytest.mark.parametrize("source", ENGINE_CASES)
def test_a_resumed_run_is_the_plain_run(source: str, target: str, results: dict[Crossing, Result]) -> None:
    """Over 3 steps, `megagpt parity` over 20; to the last bit where engine and number of ranks stay as they were."""
    found = {c: r for c, r in results.items() if (c[0].engine, c[1].engine) == (source, target)}
    assert found
    assert (source != target) or any(a == b for a, b in found)
    for (before, after), result in found.items():
        assert result.difference <= TOLERANCE, (before, after)
        if before == after:
            assert result.same_bits, before
