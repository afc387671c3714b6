"""The loss scale against PyTorch's own scaler."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megagpt.engines.loss_scale import LossScale, loss_scale

LARGEST = 2.0**24
REFERENCE = torch.amp.GradScaler("cpu")  # for its documented defaults

# Stretches of equal outcomes: (finite, how many steps). Long finite ones reach past one growth interval, and two.
STRETCHES = st.lists(
    st.one_of(
        st.tuples(st.just(True), st.one_of(st.integers(1, 30), st.integers(1990, 2010), st.integers(3990, 4010))),
        st.tuples(st.just(False), st.integers(1, 20)),
    ),
    max_size=6,
)


def reference_scales(start: float, outcomes: list[bool]) -> list[float]:
    """The scale after each step, by the kernel behind torch.amp.GradScaler, kept within [1, 2^24]."""
    scale, tracker = torch.full((1,), start), torch.zeros(1, dtype=torch.int32)
    growth, backoff = REFERENCE.get_growth_factor(), REFERENCE.get_backoff_factor()
    scales = []
    for finite in outcomes:
        found_inf = torch.full((1,), 0.0 if finite else 1.0)
        torch._amp_update_scale_(scale, tracker, found_inf, growth, backoff, REFERENCE.get_growth_interval())
        scale.clamp_(1.0, LARGEST)
        scales.append(scale.item())
    return scales


def scales_of(scale: LossScale, outcomes: list[bool]) -> list[float]:
    scales = []
    for finite in outcomes:
        scale.update(finite)
        scales.append(scale.value)
    return scales


def test_pytorchs_scaler_has_its_documented_defaults() -> None:
    assert (REFERENCE.get_growth_factor(), REFERENCE.get_backoff_factor()) == (2.0, 0.5)
    assert REFERENCE.get_growth_interval() == 2000


def test_fp16_starts_where_pytorchs_scaler_starts() -> None:
    scale = loss_scale("fp16")
    assert scale.dynamic
    assert scale.value == REFERENCE.get_scale() == 65536.0


@given(stretches=STRETCHES, power=st.integers(0, 24))
@settings(max_examples=40, deadline=None)
@example(stretches=[(True, 1999), (False, 1), (True, 2000)], power=16)  # an overflow resets the count
@example(stretches=[(True, 2000)] * 3, power=23)  # the largest
@example(stretches=[(False, 20), (True, 2000)], power=16)  # the smallest
@pytest.mark.slow
def test_every_step_is_that_of_pytorchs_scaler(stretches: list[tuple[bool, int]], power: int) -> None:
    outcomes = [finite for finite, steps in stretches for _ in range(steps)]
    assert scales_of(LossScale(True, 2.0**power), outcomes) == reference_scales(2.0**power, outcomes)


def test_the_scale_stays_between_1_and_2_to_the_24() -> None:
    scale = loss_scale("fp16")
    assert scales_of(scale, [False] * 20)[15:] == [1.0] * 5
    grown = scales_of(scale, [True] * 2000 * 26)
    assert grown[1998:2000] == [1.0, 2.0]
    assert grown[24 * 2000 - 2 : 24 * 2000] == [LARGEST / 2, LARGEST]
    assert set(grown[24 * 2000 :]) == {LARGEST}
    assert scales_of(scale, [False]) == [LARGEST / 2]


@given(first=STRETCHES, second=STRETCHES)
@settings(max_examples=20, deadline=None)
def test_value_and_good_steps_suffice_to_resume(first: list[tuple[bool, int]], second: list[tuple[bool, int]]) -> None:
    before, after = ([f for f, steps in stretches for _ in range(steps)] for stretches in (first, second))
    whole = scales_of(loss_scale("fp16"), before + after)
    cut = loss_scale("fp16")
    scales_of(cut, before)
    assert scales_of(LossScale(True, cut.value, cut.good_steps), after) == whole[len(before) :]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_are_not_scaled(precision: str) -> None:
    scale = loss_scale(precision)
    assert not scale.dynamic
    assert set(scales_of(scale, [True] * 4001 + [False] * 3)) == {1.0}
