"""The reference of the engines' curves."""

import pytest

from megagpt.measure.cases import CLIP, STEPS, Case
from megagpt.measure.worker import Curve
from megagpt.measure.worker import plain as plain_curve


@pytest.fixture(scope="session")
def plain() -> Curve:
    """Loss and gradient norm of each step in one plain loop, in this process."""
    curve = plain_curve(Case({}, 1))
    assert len(curve) == STEPS
    assert all(norm > CLIP for _, norm in curve), "clipping is not active in every step"
    assert curve[-1][0] < curve[0][0] - 0.1, "nothing is learned"
    return curve
