"""Every engine's checkpoint under every other, on other numbers of ranks."""

import pytest

from megagpt.measure.cases import ENGINE_CASES
from megagpt.measure.crossings import SETTINGS, TOLERANCE, WORLDS, Crossing, Result, Setting, cross

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("crossings")]


ANY_RANKS = [name for name, case in ENGINE_CASES.items() if not case.fixed]
LAYOUTS = [setting for setting in SETTINGS if ENGINE_CASES[setting.engine].fixed]
# Every pair of engines once, every pair of world sizes equally often.
PAIRS = [
    (Setting(source, WORLDS[(i + j) % 3]), Setting(target, WORLDS[(i + j // 3 + 2 * (j % 3)) % 3]))
    for i, source in enumerate(ANY_RANKS)
    for j, target in enumerate(ANY_RANKS)
]
# Every layout of tensor ranks from and to one of them, which also goes to and comes from what others cut otherwise.
HUB = Setting("fsdp 2 x 2 tensor", 4)
OTHERS = [Setting("ddp", 1), Setting("fsdp hybrid 2 x 2", 4), Setting("zero-3", 2)]
OF_LAYOUTS = [pair for other in [*LAYOUTS, *OTHERS] if other != HUB for pair in ((HUB, other), (other, HUB))]
# The same engine on the same ranks resumes bit for bit.
SAME = [(same, same) for same in [*(Setting(name, 2) for name in ANY_RANKS), *LAYOUTS] if (same, same) not in PAIRS]
CROSSINGS = PAIRS + OF_LAYOUTS + SAME


@pytest.fixture(scope="module")
def results() -> dict[Crossing, Result]:
    return cross(CROSSINGS, steps=2, saved_at=2)


def test_the_pairs_have_every_engine_and_every_world_size() -> None:
    """`megagpt parity --tables crossings` makes all of the crossings."""
    assert {(a.engine, b.engine) for a, b in PAIRS} == {(a, b) for a in ANY_RANKS for b in ANY_RANKS}
    assert {(a.ranks, b.ranks) for a, b in PAIRS} == {(a, b) for a in WORLDS for b in WORLDS}
    for side in (0, 1):
        assert {pair[side] for pair in PAIRS} | set(LAYOUTS) == set(SETTINGS)
        assert {pair[side] for pair in OF_LAYOUTS} >= {*LAYOUTS, *OTHERS}
    assert any(a == b for a, b in PAIRS)


@pytest.mark.parametrize(("source", "target"), dict.fromkeys((a.engine, b.engine) for a, b in CROSSINGS))
def test_a_resumed_run_is_the_plain_run(source: str, target: str, results: dict[Crossing, Result]) -> None:
    """Over 2 steps, `megagpt parity` over 20; to the last bit where engine and number of ranks stay as they were."""
    found = {c: r for c, r in results.items() if (c[0].engine, c[1].engine) == (source, target)}
    assert found
    assert source != target or any(a == b for a, b in found)
    for (before, after), result in found.items():
        assert result.difference <= TOLERANCE, (before, after)
        if before == after:
            assert result.same_bits, before
