"""Every engine on real gloo ranks beside one plain process: the same losses and gradient norms."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megagpt.measure import worker
from megagpt.measure.cases import ENGINE_CASES, Case
from megagpt.measure.processes import run_cases
from megagpt.measure.tables import difference
from megagpt.measure.worker import Curve
from megagpt.world import join
from tests.engines.reference import assert_same
from tests.processes import run_ranks

# One group: all curves on as many ranks come from one start of these ranks.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("curves")]

OTHERS: dict[str, dict[str, Any]] = {
    "fsdp, gathered once": {"name": "fsdp", "reshard_after_forward": False},
    "fsdp, offload all": {"name": "fsdp", "offload": "all"},
    "fsdp with tensor ranks, offload all": {"name": "fsdp", "offload": "all", "tensor_ranks": 2},
    "zero-1, offload optimizer": {"name": "zero", "stage": 1, "offload": "optimizer"},
    "zero-2, offload optimizer": {"name": "zero", "stage": 2, "offload": "optimizer"},
    "zero-3, offload all": {"name": "zero", "stage": 3, "offload": "all"},
    "zero-3, vectors whole": {"name": "zero", "stage": 3},
}
# `megagpt parity` takes 20 steps.
STEPS = 4
# Micro-batches in a step and activation checkpointing; `megagpt parity` tries 1 and 4 with each mode. Every engine
# checkpoints selectively in bf16.
WAYS = ((1, "none"), (2, "full"))
FP32 = [
    Case(s.engine, s.ranks, accumulation, mode, steps=STEPS)
    for s in ENGINE_CASES.values()
    for accumulation, mode in WAYS
]
BF16 = [Case(s.engine, s.ranks, 2, "selective", "bf16", steps=STEPS) for s in ENGINE_CASES.values()]
OPTIONS = [Case(engine, 2, 2, steps=STEPS) for engine in OTHERS.values()]

Found = list[tuple[Case, Curve]]
Curves = Callable[[dict[str, Any], int, str], Found]


@pytest.fixture(scope="module")
def curves() -> Curves:
    """The curves of (engine, ranks, precision)."""

    @functools.cache
    def on(ranks: int) -> Found:
        cases = [case for case in FP32 + BF16 + OPTIONS if case.ranks == ranks]
        return list(zip(cases, run_cases("curve", cases), strict=True))

    def of(engine: dict[str, Any], ranks: int, precision: str) -> Found:
        found = [(c, curve) for c, curve in on(ranks) if (c.engine, c.precision) == (engine, precision)]
        assert found
        return found

    return of


@pytest.mark.parametrize("name", ENGINE_CASES)
def test_an_fp32_curve_is_that_of_the_plain_loop(name: str, plain: Curve, curves: Curves) -> None:
    """With any micro-batches in a step and any activation checkpointing."""
    for case, curve in curves(ENGINE_CASES[name].engine, ENGINE_CASES[name].ranks, "fp32"):
        assert_same(curve, plain, "fp32", case)


@pytest.mark.parametrize("name", ENGINE_CASES)
def test_a_bf16_curve_stays_close(name: str, plain: Curve, curves: Curves) -> None:
    for case, curve in curves(ENGINE_CASES[name].engine, ENGINE_CASES[name].ranks, "bf16"):
        assert difference(curve, plain[:STEPS])[0] > 1e-5, "bf16 computed in fp32"
        assert_same(curve, plain, "bf16", case)


@pytest.mark.parametrize("name", OTHERS)
def test_options_keep_the_curve(name: str, plain: Curve, curves: Curves) -> None:
    for case, curve in curves(OTHERS[name], 2, "fp32"):
        assert_same(curve, plain, "fp32", case)


def test_hpz_keeps_the_curve(plain: Curve) -> None:
    """ZeRO++'s second copy of the weights, in processes of its own: DeepSpeed makes its groups once."""
    engine = {"name": "zero", "stage": 3, "deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    (curve,) = run_cases("curve", [Case(engine, 4, 2, steps=STEPS)])
    assert_same(curve, plain, "fp32", engine)


def compiled_curve(case: Case) -> Curve:
    """With the compiler's graphs and without its C++: what is tested is the order of wrappers. Inductor itself is tried
    in one process, in test_training."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    with join("cpu") as world:
        return worker.curve(case, world)


@pytest.mark.parametrize("name", ["fsdp", "fsdp 1 x 2 tensor", "zero-3"])
def test_compiled_blocks_keep_the_curve(name: str, plain: Curve) -> None:
    case = Case(ENGINE_CASES[name].engine, 2, 1, "selective", compile=True, steps=STEPS)
    for curve in run_ranks(2, compiled_curve, case):
        assert_same(curve, plain, "fp32", name)
