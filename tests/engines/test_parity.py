"""Every engine on real gloo ranks beside one plain process: losses, gradient norms, bytes held, skipped steps."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megagpt.engines.engine import Engine, build_engine
from megagpt.measure.cases import CLIP, LR, SETUPS, STEPS, Case, share
from megagpt.measure.processes import run_cases
from megagpt.measure.tables import LOSS_TOLERANCE, NORM_TOLERANCE, difference
from megagpt.measure.worker import memory_config
from megagpt.planning.memory import state_bytes
from megagpt.world import World, join
from tests.ranks import run_ranks

Curve = list[list[float]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain() -> Curve:
    """Loss and gradient norm of 20 steps in one plain process."""
    curve = run_cases("plain", [Case({}, 1)])[0][:STEPS]
    assert len(curve) == STEPS
    assert all(norm > CLIP for _, norm in curve), "clipping is not active in every step"
    assert curve[-1][0] < curve[0][0] - 0.1, "nothing is learned"
    return list(curve)


def assert_same(curve: Curve, plain: Curve, precision: str, what: object) -> None:
    loss, norm = difference(curve, plain)
    assert loss <= LOSS_TOLERANCE[precision], what
    assert norm <= NORM_TOLERANCE[precision], what


# Ranks are started once for all curves on as many of them: most of a start is imports.
OTHERS: dict[str, dict[str, Any]] = {
    "fsdp, gathered once": {"name": "fsdp", "reshard_after_forward": False},
    "fsdp, offload all": {"name": "fsdp", "offload": "all"},
    "zero-1, offload optimizer": {"name": "zero", "stage": 1, "offload": "optimizer"},
    "zero-2, offload optimizer": {"name": "zero", "stage": 2, "offload": "optimizer"},
    "zero-3, offload all": {"name": "zero", "stage": 3, "offload": "all"},
    "zero-3, vectors whole": {"name": "zero", "stage": 3},
}
# `megagpt parity` makes all six.
WAYS = ((1, "none"), (4, "full"), (4, "selective"))
FP32 = [Case(s.engine, s.ranks, accumulation, mode) for s in SETUPS.values() for accumulation, mode in WAYS]
BF16 = [Case(s.engine, s.ranks, 4, "selective", "bf16") for s in SETUPS.values()]
OPTIONS = [Case(engine, 2, 2) for engine in OTHERS.values()]


@functools.cache
def curves(ranks: int) -> list[tuple[Case, Curve]]:
    """The curves of all of these on so many ranks."""
    cases = [case for case in FP32 + BF16 + OPTIONS if case.ranks == ranks]
    return list(zip(cases, run_cases("curve", cases), strict=True))


def curves_of(engine: dict[str, Any], ranks: int, precision: str) -> list[tuple[Case, Curve]]:
    found = [(c, curve) for c, curve in curves(ranks) if (c.engine, c.precision) == (engine, precision)]
    assert found
    return found


@pytest.mark.parametrize("name", SETUPS)
def test_fp32_is_the_plain_loop(name: str, plain: Curve) -> None:
    """Whatever the micro-batches in a step and the activation checkpointing."""
    for case, curve in curves_of(SETUPS[name].engine, SETUPS[name].ranks, "fp32"):
        assert_same(curve, plain, "fp32", case)


@pytest.mark.parametrize("name", SETUPS)
def test_bf16_stays_close(name: str, plain: Curve) -> None:
    for case, curve in curves_of(SETUPS[name].engine, SETUPS[name].ranks, "bf16"):
        assert difference(curve, plain)[0] > 1e-5, "bf16 computed in fp32"
        assert_same(curve, plain, "bf16", case)


@pytest.mark.parametrize("name", OTHERS)
def test_options_do_not_change_the_curve(name: str, plain: Curve) -> None:
    for case, curve in curves_of(OTHERS[name], 2, "fp32"):
        assert_same(curve, plain, "fp32", case)


def test_hpz_does_not_change_the_curve(plain: Curve) -> None:
    """ZeRO++'s second copy of the weights, in processes of its own: DeepSpeed makes its groups once."""
    engine = {"name": "zero", "stage": 3, "deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    (curve,) = run_cases("curve", [Case(engine, 4, 2)])
    assert_same(curve, plain, "fp32", engine)


@pytest.mark.parametrize("name", ["fsdp", "zero-3"])
def test_compiled_blocks_do_not_change_the_curve(name: str, plain: Curve) -> None:
    setup = SETUPS[name]
    (curve,) = run_cases("curve", [Case(setup.engine, setup.ranks, 1, "selective", compile=True)])
    assert_same(curve, plain, "fp32", name)


MEMORY = [Case(SETUPS[n].engine, 2, 2, "none", p) for n in SETUPS if "hybrid" not in n for p in ("fp32", "bf16")] + [
    Case(SETUPS[n].engine, ranks, 2, "none", "bf16") for n, ranks in (("fsdp", 4), ("zero-3", 4))
]


@functools.cache
def memory(ranks: int) -> list[dict[str, Any]]:
    return run_cases("memory", [case for case in MEMORY if case.ranks == ranks])


@pytest.mark.parametrize("case", MEMORY, ids=lambda c: f"{c.engine}, {c.precision}, {c.ranks} rank(s)")
def test_a_rank_holds_what_the_formula_says(case: Case) -> None:
    """Counted on the process's live tensors, against the closed form, kind by kind."""
    measured = memory(case.ranks)[[c for c in MEMORY if c.ranks == case.ranks].index(case)]
    formula = state_bytes(memory_config(case), case.ranks)
    for kind in ("weights", "gradients", "optimizer"):
        assert measured[kind] == pytest.approx(getattr(formula, kind), rel=0.05), kind


# --- inside a rank ---


def small(name: str, **changes: Any) -> Case:
    return dataclasses.replace(Case(SETUPS[name].engine, SETUPS[name].ranks), **changes)


def on_each(function: Callable[[Case, World], Any], cases: list[Case]) -> list[Any]:
    """A rank's results of all cases, one after another."""
    with join("cpu") as world:
        return [function(case, world) for case in cases]


def on_two_ranks(function: Callable[[Case, World], Any], cases: list[Case]) -> list[tuple[Any, Any]]:
    """Both ranks' results, case by case."""
    return list(zip(*run_ranks(2, on_each, function, cases), strict=True))


def stage_3_partitions(case: Case, world: World) -> list[str]:
    """Names of the parameters of which this rank holds more than its part."""
    engine = build_engine(case.config(), world)
    engine.train_step(share(0, world.rank, case), LR)
    return [
        name
        for name, p in engine.model.named_parameters()
        if p.numel() or p.ds_persist or p.ds_tensor.numel() > -(-p.ds_numel // world.size)  # type: ignore[attr-defined]
    ]


def test_stage_3_partitions_every_parameter() -> None:
    assert on_two_ranks(stage_3_partitions, [small("zero-3")]) == [([], [])]


def evaluating(case: Case, world: World) -> tuple[list[float], list[str]]:
    """The loss of a batch as evaluation sees it, and names of the weights that stayed gathered afterwards."""
    engine = build_engine(case.config(), world)
    before = {key: s.flat.numel() for key, s in engine.state().items()}
    with engine.evaluation() as model:
        ((tokens, targets),) = share(0, 0, dataclasses.replace(case, ranks=1)).micro_batches
        losses = [float(model(tokens, targets)) for _ in range(2)]
    after = {key: s.flat.numel() for key, s in engine.state().items()}
    engine.train_step(share(0, world.rank, case), LR)
    return losses, [key for key in before if before[key] != after[key]]


def test_evaluation_is_the_same_and_leaves_nothing_gathered() -> None:
    """Under each engine, with compiled blocks that it goes around."""
    names = ("fsdp", "zero-2", "zero-3")
    reference, *others = on_two_ranks(evaluating, [small("ddp"), *(small(name, compile=True) for name in names)])
    for name, ranks in zip(names, others, strict=True):
        for losses, gathered in ranks:
            assert losses == pytest.approx(reference[0][0], abs=1e-3), name  # a sum of 512 losses
            assert gathered == [], name


class _BadGradient(torch.autograd.Function):
    """The same value; the gradient is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0] * math.nan


def _step(engine: Engine, world: World, case: Case, step: int, bad: str = "") -> tuple[float, float, bool]:
    """One step, in which rank 1's loss or gradient is bad if asked for."""
    forward = engine.model.forward
    if bad and world.rank == 1:
        spoil = (lambda loss: loss * math.inf) if bad == "loss" else _BadGradient.apply
        engine.model.forward = lambda *arguments: spoil(forward(*arguments))  # type: ignore[method-assign]
    result = engine.train_step(share(step, world.rank, case), LR)
    engine.model.forward = forward  # type: ignore[method-assign]
    return result.loss, result.gradient_norm, result.updated


Results = list[tuple[float, float, bool]]


def skipping(case: Case, world: World) -> tuple[Results, Results]:
    """Three steps, before the second of which a bad loss and a bad gradient come; and the same without them."""
    runs: list[Results] = []
    for bad in (["loss", "gradient"], []):
        engine = build_engine(case.config(), world)
        results = [_step(engine, world, case, 0)]
        results += [_step(engine, world, case, 1, kind) for kind in bad]
        runs.append(results + [_step(engine, world, case, step) for step in (1, 2)])
    return runs[0], runs[1]


def test_a_bad_rank_skips_the_step_on_every_rank() -> None:
    """And the steps after it are those of a run that never saw it."""
    cases = [small(name, accumulation=2) for name in ("ddp", "fsdp", "zero-1", "zero-2", "zero-3")]
    cases.append(small("zero-1", precision="bf16", accumulation=2))
    for case, ranks in zip(cases, on_two_ranks(skipping, cases), strict=True):
        for results, clean in ranks:
            assert [updated for *_, updated in results] == [True, False, False, True, True], case
            assert not math.isfinite(results[1][0]), case
            assert math.isfinite(results[2][0]), case
            assert [results[0], *results[3:]] == clean, case


def half_precision(case: Case, world: World) -> tuple[list[tuple[float, float, bool]], list[float]]:
    """Steps in fp16 from a loss scale that overflows at first; the results, and the scale after each step."""
    if case.engine["name"] == "zero":
        from megagpt.engines.deepspeed_library import load_deepspeed

        # CPUs without fp16 instructions do it all the same, slowly.
        load_deepspeed(on_gpu=False).get_accelerator().is_fp16_supported = lambda: True
    engine = build_engine(case.config(), world)
    engine.loss_scale.value = 2.0**24
    results, scales = [], []
    for _ in range(14):
        results.append(_step(engine, world, case, sum(updated for *_, updated in results)))
        scales.append(engine.loss_scale.value)
    return results, scales


def test_fp16_scales_the_loss(plain: Curve) -> None:
    cases = [small(name, precision="fp16", accumulation=2) for name in ("ddp", "fsdp", "zero-1", "zero-2", "zero-3")]
    for case, ((results, scales), other) in zip(cases, on_two_ranks(half_precision, cases), strict=True):
        assert (str(results), scales) == (str(other[0]), other[1]), case  # as text: not-a-number equals itself
        skipped = [not updated for *_, updated in results]
        assert skipped[0], case
        assert not skipped[-1], case
        for i, scale in enumerate(scales):
            assert scale == 2.0**24 / 2 ** sum(skipped[: i + 1]), case
        kept = [[loss, norm] for loss, norm, updated in results if updated]
        assert_same(kept, plain[: len(kept)], "bf16", case)
