"""Learning rate and batch size against closed forms and the counts that the papers' recipes imply."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config import Config
from megagpt.config_file import build_config, load_config
from megagpt.schedule import (
    Cut,
    batch_sequences,
    cut,
    learning_rate,
    ramp_efficiency,
    sizes_ahead,
    step_count,
    steps_to_profile,
)


def run(**sections: Any) -> Config:
    return build_config({"model": {"layers": 1, "width": 8, "heads": 1, "context": 8}, **sections}, "here")


def test_cosine_is_the_closed_form() -> None:
    config = load_config("gpt3_xl")
    assert learning_rate(config, 375_000_000) == pytest.approx(2.0e-4)
    assert learning_rate(config, 187_500_000) == pytest.approx(1.0e-4)
    middle = 375_000_000 + (260_000_000_000 - 375_000_000) // 2
    assert learning_rate(config, middle) == pytest.approx(2.0e-4 * 0.55, rel=1e-6)
    assert learning_rate(config, 260_000_000_000) == pytest.approx(2.0e-5)
    assert learning_rate(config, 300_000_000_000) == pytest.approx(2.0e-5)


def test_gpt2_matches_the_public_reproduction_step_by_step() -> None:
    """Its schedule is written in steps: lr(it), it from 0, warm-up (it + 1) / 715, cosine to 19,073."""
    config = load_config("gpt2_124m")

    def published(it: int) -> float:
        if it < 715:
            return 6e-4 * (it + 1) / 715
        return 6e-5 + 0.5 * (1 + math.cos(math.pi * (it - 715) / (19073 - 715))) * (6e-4 - 6e-5)

    for it in (0, 1, 357, 713, 714):
        assert learning_rate(config, (it + 1) * 524288) == pytest.approx(published(it), rel=1e-9)
    for it in (716, 5000, 12000, 19072):
        # A rate of the tokens after the step is the published one of the next step number.
        assert learning_rate(config, it * 524288) == pytest.approx(published(it), rel=1e-9)


def test_wsd_and_constant_are_the_closed_form() -> None:
    schedule = {"warmup_tokens": 100, "decay_start_tokens": 600, "decay_end_tokens": 1000, "floor_ratio": 0.0}
    train = {"tokens": 1200, "batch_tokens": 8}
    wsd = run(schedule={"shape": "wsd", **schedule}, train=train, optimizer={"lr": 1.0})
    rates = [learning_rate(wsd, t) for t in (50, 100, 350, 600, 800, 900, 1000, 1100)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.5, 0.25, 0, 0])
    constant = run(schedule={"shape": "constant", "warmup_tokens": 100}, train=train, optimizer={"lr": 1.0})
    assert [learning_rate(constant, t) for t in (50, 100, 1200)] == [0.5, 1, 1]


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 500), st.integers(1, 500), st.integers(0, 2000))
def test_rates_stay_between_zero_and_the_peak(shape: str, warmup: int, decay: int, tokens: int) -> None:
    schedule = {"shape": shape, "warmup_tokens": warmup, "decay_end_tokens": warmup + decay}
    if shape == "wsd":
        schedule["decay_start_tokens"] = warmup
    config = run(schedule=schedule, train={"tokens": 2000, "batch_tokens": 8}, optimizer={"lr": 1.0})
    rate = learning_rate(config, tokens)
    assert 0 <= rate <= 1
    if tokens >= warmup:
        assert rate >= 0.1 - 1e-12


def test_step_counts_of_the_papers_recipe() -> None:
    """Continuous arithmetic: the ramp takes 4e9 / (B - b) ln(B / b) steps, the rest one batch each."""
    config = load_config("gpt3_125m")
    assert step_count(config, 4_000_000_000) == pytest.approx(22_563, rel=1e-3)
    assert step_count(config, 375_000_000) == pytest.approx(7_146, rel=1e-3)
    assert step_count(config) == pytest.approx(587_139, rel=1e-3)
    plain = load_config("gpt3_125m", ["train.batch_ramp_tokens=0", "train.batch_ramp_start=0"])
    assert step_count(plain) == 572_205
    assert step_count(load_config("gpt2_124m")) == 19_073


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 4000), st.integers(40, 600))
def test_ramp_grows_linearly_and_steps_add_up(start: int, more: int, ramp: int, sequences: int) -> None:
    train = {"tokens": 8 * sequences * 10, "batch_tokens": 8 * (start + more)}
    if ramp:
        train |= {"batch_ramp_start": 8 * start, "batch_ramp_tokens": ramp}
    if train["tokens"] < train["batch_tokens"]:
        return
    config = run(train=train, schedule={"shape": "constant"})
    seen = steps = 0
    previous = 0
    while seen < config.total_sequences:
        batch = batch_sequences(config, seen)
        exact = start + more * min(1.0, 8 * seen / ramp) if ramp else start + more
        assert abs(batch - exact) <= 0.6  # half a sequence, and half a token of the ramp
        assert batch >= previous
        previous = batch
        assert step_count(config, seen * 8) == steps
        seen = min(config.total_sequences, seen + batch)
        steps += 1
    assert step_count(config) == steps


@given(st.integers(1, 4000), st.integers(1, 200), st.integers(1, 200))
def test_a_compiled_model_has_few_sizes(sequences: int, shares: int, micro_batch: int) -> None:
    """At most two between a power of two and its double, and less than half larger than the longest share needs."""
    exact, compiled = (cut(sequences, shares, micro_batch, compiled) for compiled in (False, True))
    assert compiled.micro_batches == exact.micro_batches
    assert exact.size <= compiled.size <= min(micro_batch, exact.size * 1.5)
    few = {micro_batch} | {size * 2**power for power in range(8) for size in (1, 3)}
    assert compiled.size in few
    if exact.size == micro_batch:
        assert compiled == exact


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 3000), st.integers(1, 9), st.booleans())
def test_the_ramps_arithmetic_is_counted_without_a_walk(
    start: int, more: int, ramp: int, shares: int, compiled: bool
) -> None:
    train = {"tokens": 8000, "batch_tokens": 8 * (start + more), "batch_ramp_start": 8 * start, "micro_batch": 5}
    config = run(train=train | {"batch_ramp_tokens": ramp}, schedule={"shape": "constant"})
    seen, computed, sizes = 0, 0, []
    while seen * 8 < ramp:
        batch = batch_sequences(config, seen)
        micro_batches, size = cut(batch, shares, 5, compiled)
        seen, computed = seen + batch, computed + shares * micro_batches * size
        sizes.append(size)
    assert ramp_efficiency(config, shares, compiled) == pytest.approx(seen / computed, rel=1e-12)
    last = cut(start + more, shares, 5, compiled).size

    def cut_of(sequences: int) -> Cut:
        return cut(sequences, shares, 5, compiled)

    assert sizes_ahead(config, 0, cut_of) >= {*sizes, last}
    assert sizes_ahead(config, seen, cut_of) == {last}


@pytest.mark.parametrize(
    ("text", "taken", "compiled", "left", "said"),
    [("", 0, True, range(0), ""), ("1-4", 0, False, range(1, 5), ""), ("5-8", 6, False, range(7, 9), ""),
     ("3-4", 0, True, range(3, 5), ""), ("1-4", 0, True, range(3, 5), "step 3 is the first that is profiled"),
     ("5-8", 5, True, range(8, 9), "step 8 is the first that is profiled"),
     ("1-2", 0, True, range(0), "no profile"),
     ("5-8", 8, True, range(0), "lie before step 8, from which this run resumes: no profile")],
)  # fmt: skip
def test_steps_that_compile_are_not_profiled(
    text: str, taken: int, compiled: bool, left: range, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steps_to_profile(text, taken, compiled) == left
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(said) == bool(printed)
