"""Tensor ranks under ZeRO at every stage: two groups of two ranks, all from one start."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megagpt.engines.engine import Engine, build_engine, seed_dropout
from megagpt.engines.flat_shard import Rectangle
from megagpt.engines.gathering import full_precision
from megagpt.engines.zero import _SwappedWeights
from megagpt.measure import worker
from megagpt.measure.cases import LR, Case, rows, share
from megagpt.measure.crossings import TOLERANCE
from megagpt.measure.tables import difference
from megagpt.measure.worker import Curve
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize
from megagpt.models.tensor_parallel import split_of
from megagpt.world import World, join
from tests.engines.reference import assert_same
from tests.engines.test_ranks import half_precision, skipping
from tests.processes import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("zero_tensor")]

RANKS, STEPS, SAVED_AT = 4, 2, 2
STAGES: dict[int, dict[str, Any]] = {stage: {"name": "zero", "stage": stage, "tensor_ranks": 2} for stage in (1, 2, 3)}
# `megagpt parity` and its tests have stage 3 with every parameter partitioned; at this one, small vectors are whole.
CURVES = [
    Case(STAGES[1], RANKS, 4, "full", steps=STEPS),
    Case(STAGES[1], RANKS, 2, "selective", "bf16", steps=STEPS),
    Case(STAGES[2], RANKS, 4, "full", steps=STEPS),
    Case(STAGES[2] | {"offload": "optimizer"}, RANKS, 2, steps=STEPS),
    Case(STAGES[3], RANKS, 1, "selective", compile=True, steps=STEPS),
    Case(STAGES[3] | {"offload": "all"}, RANKS, 2, steps=STEPS),
]
Pieces = dict[str, list[tuple[Rectangle, Tensor]]]


class Found(NamedTuple):
    """A rank's findings; those in dictionaries are by stage."""

    curves: list[Curve]
    saved: dict[int, Curve]
    resumed: dict[int, list[Curve]]
    """After the checkpoint of each stage."""
    initial: dict[int, Pieces]
    whole_loss: dict[int, float]
    """Of the first batch, with the gathered initial weights."""
    rewritten: Pieces
    """The initial weights, written back from copies, as if they were on a disk."""
    trained: dict[int, Pieces]
    dropout: list[list[float]]
    """Twice the losses of the same steps."""
    skipped: Any
    half: Any


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """By rank."""
    return run_ranks(RANKS, find, tmp_path_factory.mktemp("runs"))


def find(folder: Path) -> Found:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # the order of wrappers, without Inductor
    cases = {stage: Case(engine, RANKS, steps=STEPS, saved_at=SAVED_AT) for stage, engine in STAGES.items()}
    runs = {stage: str(folder / str(stage)) for stage in STAGES}
    with join("cpu") as world:
        curves = [worker.curve(case, world) for case in CURVES]
        saved = {s: worker.saved(dataclasses.replace(case, runs=(runs[s],)), world) for s, case in cases.items()}
        every = tuple(runs.values())
        resumed = {s: worker.resumed(dataclasses.replace(case, runs=every), world) for s, case in cases.items()}
        initial, losses, trained = {}, {}, {}
        for stage, case in cases.items():
            engine = build_engine(case.config(), world)
            initial[stage], losses[stage] = held(engine), whole_loss(engine)
            engine.train_step(share(0, world.rank, case), LR)
            engine.train_step(share(1, world.rank, case), LR)
            trained[stage] = held(engine)
        rewritten = held(with_copies(engine))
        dropout = [with_dropout(cases[1], world) for _ in range(2)]
        skipped = skipping(dataclasses.replace(cases[2], accumulation=2), world)
        half = half_precision(dataclasses.replace(cases[3], precision="fp16"), world)
        return Found(curves, saved, resumed, initial, losses, rewritten, trained, dropout, skipped, half)


def held(engine: Engine) -> Pieces:
    return {key: [(box, piece.clone()) for box, piece in shard.pieces()] for key, shard in engine.state().items()}


def with_copies(engine: Any) -> Engine:
    """A stage 3 engine that begins again with zeros, and then with initial weights, through copies of its state."""
    for shard in engine.state().values():
        shard.flat.zero_()
    engine._shards = _SwappedWeights(engine._engine.optimizer, engine.model, engine.ranks)
    engine.initialize()
    return engine


def whole_loss(engine: Engine) -> float:
    with full_precision(engine) as model:
        return float(model(rows(0)[:, :-1], rows(0)[:, 1:]))


def with_dropout(case: Case, world: World) -> list[float]:
    config = case.config()
    engine = build_engine(dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1)), world)
    losses = []
    for step in range(2):
        seed_dropout(config, step, world.rank)
        losses.append(engine.train_step(share(step, world.rank, case), LR).loss)
    return losses


@pytest.mark.parametrize("index", range(len(CURVES)))
def test_a_curve_is_that_of_the_plain_loop(index: int, plain: Curve, found: list[Found]) -> None:
    """The same numbers on all ranks, so all ranks clip alike; with offload and compiled blocks, too."""
    curves = [rank.curves[index] for rank in found]
    assert curves[1:] == curves[:-1]
    assert_same(curves[0], plain, CURVES[index].precision, CURVES[index])


@pytest.mark.parametrize("before", STAGES)
@pytest.mark.parametrize("after", STAGES)
def test_a_resume_at_any_stage_is_the_plain_run(before: int, after: int, plain: Curve, found: list[Found]) -> None:
    resumed = found[0].resumed[after][list(STAGES).index(before)]
    assert difference(resumed, plain[SAVED_AT : SAVED_AT + STEPS])[0] <= TOLERANCE
    if before == after:
        assert resumed == found[0].saved[before][SAVED_AT:]


@pytest.mark.parametrize("stage", STAGES)
def test_initial_weights_are_those_of_one_rank(stage: int, found: list[Found]) -> None:
    model = initial_model()
    assert_weights(model, [rank.initial[stage] for rank in found])
    loss = model(rows(0)[:, :-1], rows(0)[:, 1:]).item()
    assert [rank.whole_loss[stage] for rank in found] == pytest.approx([loss] * RANKS, rel=1e-6)


def test_copies_of_initial_weights_are_written_back(found: list[Found]) -> None:
    assert_weights(initial_model(), [rank.rewritten for rank in found])


def initial_model() -> GPT:
    config = Case({}, 1).config()
    model = GPT(config.model)
    initialize(model, config.model, config.run.seed)
    return model


def assert_weights(model: GPT, ranks: list[Pieces]) -> None:
    """To the last bit, and the whole of each."""
    for name, expected in model.named_parameters():
        whole = torch.full_like(expected, torch.nan)
        for box, piece in itertools.chain(*(rank[f"model.{name}"] for rank in ranks)):
            whole[box.place] = piece
        assert torch.equal(whole, expected), name


@pytest.mark.parametrize("stage", STAGES)
def test_tensor_ranks_keep_the_same_shared_parameters(stage: int, found: list[Found]) -> None:
    """Weights and moments, to the last bit; and parts of the others that do not overlap."""
    for first, second in (found[:2], found[2:]):
        for key, pieces in first.trained[stage].items():
            boxes, others = dict(pieces), dict(second.trained[stage][key])
            if split_of(key.partition(".")[2]):
                assert not boxes.keys() & others.keys(), key
            else:
                assert boxes.keys() == others.keys(), key
                assert all(torch.equal(boxes[box], others[box]) for box in boxes), key


def test_dropout_repeats_bit_for_bit(plain: Curve, found: list[Found]) -> None:
    for first, again in (rank.dropout for rank in found):
        assert first == again
        assert abs(first[1] - plain[1][0]) > 1e-3, "nothing was dropped"


def test_a_bad_rank_skips_the_step_on_every_rank(found: list[Found]) -> None:
    for results, clean in (rank.skipped for rank in found):
        assert [updated for *_, updated in results] == [True, False, False, True, True]
        assert [results[0], *results[3:]] == clean


def test_fp16_scales_the_loss(plain: Curve, found: list[Found]) -> None:
    results, scales = found[0].half
    assert all(str(rank.half) == str((results, scales)) for rank in found), "as text: NaN equals itself"
    kept = [(loss, norm) for loss, norm, updated in results if updated]
    assert 0 < len(kept) < len(results)
    assert scales[-1] == 2.0**20 / 2 ** (len(results) - len(kept))
    assert_same(kept, plain[: len(kept)], "bf16", "fp16")
