"""Comparison of an engine's curve with the plain loop's."""

from megagpt.measure.tables import LOSS_TOLERANCE, NORM_TOLERANCE, difference
from megagpt.measure.worker import Curve


def assert_same(curve: Curve, plain: Curve, precision: str, what: object) -> None:
    loss, norm = difference(curve, plain[: len(curve)])
    assert loss <= LOSS_TOLERANCE[precision], what
    assert norm <= NORM_TOLERANCE[precision], what
