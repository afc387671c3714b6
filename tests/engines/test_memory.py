"""Bytes that a rank's tensors hold, against the closed form."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from megagpt.measure.cases import ENGINE_CASES, Case
from megagpt.measure.processes import run_cases
from megagpt.measure.worker import memory_config
from megagpt.planning.state import state_bytes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("memory")]

ENGINES = [case for name, case in ENGINE_CASES.items() if "hybrid" not in name]
CASES = [Case(engine.engine, engine.ranks, 2, "none", p) for engine in ENGINES for p in ("fp32", "bf16")]
CASES += [Case(ENGINE_CASES[name].engine, 4, 2, "none", "bf16") for name in ("fsdp", "zero-3")]
Memory = Callable[[Case], dict[str, Any]]


@pytest.fixture(scope="module")
def memory() -> Memory:
    """The bytes counted on rank 0 in a case. Cases on equally many ranks share one start of ranks."""

    @functools.cache
    def on(ranks: int) -> list[dict[str, Any]]:
        return run_cases("memory", [case for case in CASES if case.ranks == ranks])

    return lambda case: on(case.ranks)[[c for c in CASES if c.ranks == case.ranks].index(case)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.engine}, {c.precision}, {c.ranks} rank(s)")
def test_a_rank_holds_what_the_formula_says(case: Case, memory: Memory) -> None:
    """Counted on the process's live tensors, kind by kind."""
    formula = state_bytes(memory_config(case), case.ranks)
    for kind in ("weights", "gradients", "optimizer"):
        assert memory(case)[kind] == pytest.approx(getattr(formula, kind), rel=0.05), kind
