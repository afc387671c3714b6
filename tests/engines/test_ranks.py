"""Inside a rank: partitions, evaluation, skipped steps and loss scaling, on two real gloo ranks under each engine."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megagpt.engines.engine import Engine, build_engine
from megagpt.measure.cases import ENGINE_CASES, LR, Case, share
from megagpt.measure.worker import Curve
from megagpt.world import World, join
from tests.engines.reference import assert_same
from tests.processes import run_ranks

pytestmark = pytest.mark.slow

EVERY = ("ddp", "fsdp", "fsdp 1 x 2 tensor", "zero-1", "zero-2", "zero-3")


def small(name: str, **changes: Any) -> Case:
    return dataclasses.replace(Case(ENGINE_CASES[name].engine, ENGINE_CASES[name].ranks), **changes)


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


def gradients_beside_buckets(case: Case, world: World) -> list[int]:
    """After each micro-batch of the third step, when DDP has its final buckets: gradients with memory of their own."""
    engine = build_engine(case.config(), world)
    counts: list[int] = []

    def count() -> None:
        gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
        counts.append(sum(g.untyped_storage().nbytes() == g.nbytes for g in gradients))

    for step in range(3):
        engine.on_micro_batch = count if step == 2 else lambda: None
        engine.train_step(share(step, world.rank, case), LR)
    return counts


def test_ddps_gradients_stay_in_its_buckets() -> None:
    """Also before a step's last micro-batch: otherwise all gradients would be there twice."""
    case = small("ddp", accumulation=4)
    assert on_two_ranks(gradients_beside_buckets, [case]) == [([0] * 4, [0] * 4)]


def evaluating(case: Case, world: World) -> tuple[list[float], list[str]]:
    """The loss of a batch as evaluation sees it, and names of the weights that stayed gathered afterwards."""
    torch.compile = functools.partial(torch.compile, backend="eager")  # the graphs, without their C++
    engine = build_engine(case.config(), world)
    before = {key: s.flat.numel() for key, s in engine.state().items()}
    with engine.evaluation() as model:
        ((tokens, targets),) = share(0, 0, dataclasses.replace(case, ranks=1, engine={})).micro_batches
        losses = [float(model(tokens, targets)) for _ in range(2)]
    after = {key: s.flat.numel() for key, s in engine.state().items()}
    engine.train_step(share(0, world.rank, case), LR)
    return losses, [key for key in before if before[key] != after[key]]


def test_evaluation_is_the_same_and_leaves_nothing_gathered() -> None:
    """Under each engine, in compiled blocks."""
    names = ("fsdp", "fsdp 1 x 2 tensor", "zero-2", "zero-3")
    reference, *others = on_two_ranks(evaluating, [small("ddp"), *(small(name, compile=True) for name in names)])
    for name, ranks in zip(names, others, strict=True):
        for losses, gathered in ranks:
            assert losses == pytest.approx(reference[0][0], abs=1e-3), name  # a sum of 512 losses
            assert gathered == [], name


def flagging(case: Case, world: World) -> tuple[tuple[bool, ...], list[str]]:
    """The flags of a step in which rank 1 raises the second of three; the order of what a step does."""
    engine = build_engine(case.config(), world)
    order: list[str] = []

    def flags() -> tuple[bool, bool, bool]:
        order.append("flags")
        return False, world.rank == 1, False

    engine.on_micro_batch = lambda: order.append("micro-batch")
    batch = share(0, world.rank, case)
    result = engine.train_step(batch, LR, flags=flags, meanwhile=lambda: order.append("meanwhile"))
    plain = build_engine(case.config(), world).train_step(batch, LR)
    assert result[:4] == plain[:4], "flags change no number"
    return result.raised, order


def test_a_flag_of_one_rank_reaches_all_with_the_loss() -> None:
    names = ("ddp", "fsdp", "fsdp 1 x 2 tensor", "zero-1", "zero-3")
    for found in on_two_ranks(flagging, [small(name, accumulation=2) for name in names]):
        for raised, order in found:
            assert raised == (False, True, False)
            assert order == ["meanwhile", "micro-batch", "micro-batch", "flags"]


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
    cases = [small(name, accumulation=2) for name in EVERY]
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
    engine.loss_scale.value = 2.0**20
    results, scales = [], []
    for _ in range(8):
        results.append(_step(engine, world, case, sum(updated for *_, updated in results)))
        scales.append(engine.loss_scale.value)
    return results, scales


def test_fp16_scales_the_loss(plain: Curve) -> None:
    cases = [small(name, precision="fp16", accumulation=2) for name in EVERY]
    for case, ((results, scales), other) in zip(cases, on_two_ranks(half_precision, cases), strict=True):
        assert (str(results), scales) == (str(other[0]), other[1]), case  # as text: not-a-number equals itself
        skipped = [not updated for *_, updated in results]
        assert skipped[0], case
        assert not skipped[-1], case
        for i, scale in enumerate(scales):
            assert scale == 2.0**20 / 2 ** sum(skipped[: i + 1]), case
        kept = [(loss, norm) for loss, norm, updated in results if updated]
        assert_same(kept, plain[: len(kept)], "bf16", case)
