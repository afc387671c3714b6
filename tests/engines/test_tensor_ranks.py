"""Tensor ranks under FSDP: what a rank starts with, what it keeps whole, what it draws and what it exchanges."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.config import Config
from megagpt.engines.engine import Engine, build_engine, seed_dropout
from megagpt.measure.cases import ENGINE_CASES, LR, Case, share
from megagpt.measure.worker import Curve
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize
from megagpt.models.tensor_parallel import split_of
from megagpt.planning.exchange import exchanged_bytes
from megagpt.world import World, join
from tests.processes import run_ranks

# One group: all tests read one start of four ranks.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tensor ranks")]

LAYOUTS = ("fsdp 1 x 4 tensor", "fsdp 2 x 2 tensor", "fsdp hybrid 2 x 2 tensor")
DROPPED = LAYOUTS[:2]
MODES = ("none", "full", "selective")
MICRO_BATCHES = 2
STEPS = 2

Counts = Counter[tuple[str, int]]
"""Of each kind of exchange and number of ranks that share it."""


@dataclasses.dataclass
class Found:
    """The findings of one rank in one layout."""

    start: dict[str, tuple[int, bool]]
    """Of each weight, the number of elements that the rank starts with, and whether they are those of the model."""
    dropout: list[tuple[Curve, str]]
    """The curve with dropout, and the digest of the state behind it: of each mode, and of the first mode again."""
    whole: list[str]
    """The digest of the state of what every tensor rank has, behind each of these."""
    undropped: Curve
    exchanged: dict[tuple[str, bool], tuple[Counts, Counts]]
    """Of each mode, with dropout and without, the bytes and the number of a step's exchanges."""


def case_of(layout: str, mode: str = "none", precision: str = "fp32") -> Case:
    return Case(ENGINE_CASES[layout].engine, 4, MICRO_BATCHES, mode, precision)


def on_four_ranks() -> dict[str, Found]:
    with join("cpu") as world:
        return {layout: look(layout, world) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Found]]:
    """Of each rank, by layout."""
    return run_ranks(4, on_four_ranks)


def look(layout: str, world: World) -> Found:
    engine = build_engine(case_of(layout).config(), world)
    start = dict(started(engine))
    curves, digests, whole = [], [], []
    for mode in (*MODES, MODES[0]) if layout in DROPPED else ():
        case = case_of(layout, mode)
        engine = build_engine(with_dropout(case.config()), world)
        curves.append(train(engine, case))
        state = engine.state()
        digests.append(digest(shard.flat for shard in state.values()))
        whole.append(digest(shard.flat for key, shard in state.items() if not split_of(key.partition(".")[2])))
    undropped = train(build_engine(case_of(layout).config(), world), case_of(layout))
    return Found(start, list(zip(curves, digests, strict=True)), whole, undropped, exchanged(layout, world))


def with_dropout(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))


def train(engine: Engine, case: Case) -> Curve:
    curve = []
    for step in range(STEPS):
        seed_dropout(engine.config, step, engine.world.rank)
        result = engine.train_step(share(step, engine.world.rank, case), LR)
        curve.append((result.loss, result.gradient_norm))
    return curve


def digest(flats: Iterable[Tensor]) -> str:
    return hashlib.sha256(b"".join(flat.numpy().tobytes() for flat in flats)).hexdigest()


# --- initial weights ---


def started(engine: Engine) -> Iterable[tuple[str, tuple[int, bool]]]:
    model = GPT(engine.config.model)
    initialize(model, engine.config.model, engine.config.run.seed)
    for name, whole in model.named_parameters():
        shard = engine.state()[f"model.{name}"]
        assert tuple(shard.shape) == tuple(whole.shape)
        pieces = list(shard.pieces())
        yield name, (shard.flat.numel(), all(torch.equal(piece, whole[box.place]) for box, piece in pieces))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_start_with_the_bits_of_one_process(layout: str, found: list[dict[str, Found]]) -> None:
    """Each element is on one rank of a copy, those of LayerNorms, positions and two biases on all tensor ranks."""
    config = case_of(layout).config()
    group, copies = config.engine.tensor_ranks, 4 // config.sharing_ranks(4)
    for name, parameter in GPT(config.model).named_parameters():
        counts, same = zip(*(rank[layout].start[name] for rank in found), strict=True)
        assert all(same), name
        assert sum(counts) == parameter.numel() * copies * (1 if split_of(name) else group), name


# --- dropout, and what every tensor rank has ---


@pytest.mark.parametrize("layout", DROPPED)
def test_dropout_draws_the_same_again_in_every_mode(layout: str, found: list[dict[str, Found]]) -> None:
    """Bit for bit, when repeated and with activation checkpointing."""
    for rank in found:
        first, *others = rank[layout].dropout
        assert others == [first] * 3
        assert first[0] == found[0][layout].dropout[0][0], "ranks report other losses"
        assert abs(first[0][0][0] - rank[layout].undropped[0][0]) > 1e-4, "nothing was dropped"


@pytest.mark.parametrize("layout", DROPPED)
def test_what_tensor_ranks_have_whole_stays_the_same_bits(layout: str, found: list[dict[str, Found]]) -> None:
    """After steps with dropout, which is another on each of them: weights and moments."""
    group = case_of(layout).config().engine.tensor_ranks
    for first in range(0, 4, group):
        ranks = [found[rank][layout].whole for rank in range(first, first + group)]
        assert ranks == [ranks[0]] * group
        assert len({found[rank][layout].dropout[0][1] for rank in range(first, first + group)}) == group


# --- exchanges ---


class Recorder(TorchDispatchMode):
    """Adds up the bytes that a rank sends in collectives, by kind and by the number of ranks in it, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counts = Counter()
        self.calls: Counts = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = str(operator).removesuffix(".default")
        if name == "_c10d_functional.all_gather_into_tensor":
            self._add("activations", arguments[1], arguments[1] * arguments[0].nbytes)
        elif name == "_c10d_functional.all_to_all_single":
            self._add("activations", len(arguments[1]), arguments[0].nbytes)
        elif name == "c10d._allgather_base_":
            self._add("weights", arguments[0].numel() // arguments[1].numel(), arguments[0].nbytes)
        elif name == "c10d._reduce_scatter_base_":
            self._add("gradients", arguments[1].numel() // arguments[0].numel(), arguments[1].nbytes)
        elif name == "c10d.allreduce_":
            if arguments[0][0].numel() > 1:  # not a loss or a norm
                self._add("sums", dist.ProcessGroup.unbox(arguments[1]).size(), 2 * arguments[0][0].nbytes)
        else:
            assert "c10d" not in name or "wait" in name, f"{name}: not counted"
        return operator(*arguments, **(named or {}))

    def _add(self, kind: str, ranks: int, moved: int) -> None:
        """A gather or a scatter over N ranks sends (N - 1) / N of the bytes that are moved, a sum twice as much."""
        self.sent[kind, ranks] += moved * (ranks - 1) // ranks
        self.calls[kind, ranks] += 1


def recorded(case: Case, dropout: bool, world: World) -> tuple[Counts, Counts]:
    """Of one step."""
    engine = build_engine(with_dropout(case.config()) if dropout else case.config(), world)
    with Recorder() as recorder:
        engine.train_step(share(0, world.rank, case), LR)
    return recorder.sent, recorder.calls


def exchanged(layout: str, world: World) -> dict[tuple[str, bool], tuple[Counts, Counts]]:
    ways = [(mode, False) for mode in MODES] + [(mode, True) for mode in MODES]
    ways = ways if layout == "fsdp 2 x 2 tensor" else ways[:1]
    return {way: recorded(case_of(layout, way[0], "bf16"), way[1], world) for way in ways}


# Exchanges of a block's activations in a micro-batch: two gathers and two sums in the forward pass, as many in the
# backward pass. What is computed again ends before the last sum, whose output nobody reads; with dropout, behind it.
OF_BLOCK = {"none": (8, 8), "full": (11, 12), "selective": (11, 12)}


def by_formula(config: Config, of_block: int) -> Counts:
    """Bytes that a rank sends in a step, in bf16. `of_block`: the exchanges of a block's activations."""
    model, group = config.model, config.engine.tensor_ranks
    shards, copies = config.sharing_ranks(4) // group, 4 // config.sharing_ranks(4)
    layers, width, tokens = model.layers, model.width, config.micro_batch * model.context
    block = (12 * width**2 + 7 * width) // group + 6 * width
    whole = (model.context + 2 + 6 * layers) * width
    part = (model.padded_vocab_size // group + model.context + 2) * width + layers * block
    values = (layers * of_block + 4) * tokens * width
    sent: Counts = Counter()
    # Three fp32 numbers a token in the loss, from each rank.
    sent["activations", group] += MICRO_BATCHES * (2 * values + 4 * 3 * group * tokens) * (group - 1) // group
    # Weights in bf16, a block's for each of its passes; gradients in fp32.
    sent["weights", shards] += MICRO_BATCHES * 2 * (part + layers * block) * (shards - 1) // shards
    sent["gradients", shards] += MICRO_BATCHES * 4 * part * (shards - 1) // shards
    sent["sums", copies] += 2 * 4 * part // shards * (copies - 1) // copies
    sent["sums", group] += 2 * 4 * whole // shards * (group - 1) // group
    return +sent


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_exchange_the_bytes_of_the_formulas(layout: str, found: list[dict[str, Found]]) -> None:
    """In bf16, in each mode of activation checkpointing, with dropout and without."""
    for rank in found:
        for (mode, dropout), (sent, calls) in rank[layout].exchanged.items():
            config, of_block = case_of(layout, mode, "bf16").config(), OF_BLOCK[mode][dropout]
            formula = by_formula(config, of_block)
            assert (+sent).keys() == formula.keys(), mode
            for key, moved in formula.items():
                assert sent[key] == pytest.approx(moved, rel=0.01), (mode, key)
            in_micro_batch = config.model.layers * of_block + 4 + 1  # embedding, head and loss
            assert calls["activations", config.engine.tensor_ranks] == MICRO_BATCHES * in_micro_batch, mode
            planned = exchanged_bytes(with_dropout(config) if dropout else config, 4, MICRO_BATCHES)
            assert sum(sent.values()) == pytest.approx(planned, rel=0.01), mode
