"""The floors' FLOPs and bytes, against the FLOPs of MFU and counts by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megagpt.config import Config
from megagpt.config_file import build_config
from megagpt.models.gpt import GPT
from megagpt.planning.exchange import exchanged_bytes
from megagpt.profiling import rates
from megagpt.profiling.breakdown import Breakdown
from megagpt.profiling.floors import Floor, Work, floor, work
from megagpt.profiling.parts import Part
from megagpt.profiling.rates import Rates, find_rates
from megagpt.profiling.table import Row, Table, make_table
from megagpt.schedule import Cut

RATES = Rates(100.0, "data sheet", 10.0, "data sheet")


def config(engine: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> Config:
    """8 sequences in micro-batches of 2."""
    shape = {"layers": 4, "width": 64, "heads": 4, "context": 32, **(model or {})}
    tree: dict[str, Any] = {"model": shape, "engine": engine or {}}
    tree["train"] = {"tokens": 1024, "batch_tokens": 256, "micro_batch": 2, **train}
    return build_config(tree, "test")


@pytest.mark.parametrize("attention", ["dense", "banded"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_parts_have_the_flops_of_mfu(attention: str, ranks: int) -> None:
    made = config(model={"attention": attention, "window": 8})
    model, found = made.model, work(made, ranks, 4 // ranks, 8 // ranks)
    tokens = made.train.batch_tokens // ranks
    # MFU counts 6 for each parameter that is multiplied, and takes vectors for such.
    vectors = sum(p.numel() for p in GPT(model).parameters() if p.dim() == 1)
    padding = (model.padded_vocab_size - model.vocab_size) * model.width
    matrices = model.parameters - model.context * model.width - vectors + padding
    assert found[Part.PRODUCTS].flops + found[Part.HEAD].flops == 6 * matrices * tokens
    # For attention, MFU counts each query with all keys of the context, or of its window; a floor, those that it sees.
    seen = [[min(i + 1, model.window if model.is_banded(layer) else 32) for i in range(32)] for layer in range(4)]
    assert found[Part.ATTENTION].flops == 12 * 64 * sum(map(sum, seen)) * tokens / 32


def test_tensor_ranks_share_the_work_of_a_step() -> None:
    """Every product, head and vocabulary in equal parts; each rank reads the tokens that all products need."""
    whole = work(config(precision="bf16"), 1, 4, 8)
    parts = work(config({"name": "fsdp", "tensor_ranks": 2}, precision="bf16"), 2, 4, 8)
    for part in (Part.ATTENTION, Part.PRODUCTS, Part.HEAD):
        assert parts[part].flops == whole[part].flops / 2, part
    for part in (Part.ATTENTION, Part.BLOCKS, Part.EMBEDDING):
        assert parts[part].moved == whole[part].moved / 2, part
    # Inputs of qkv and up, outputs of out and down, forward and in both gradients.
    tokens, c = 256, 64
    assert parts[Part.PRODUCTS].moved == whole[Part.PRODUCTS].moved / 2 + 4 * (4 * tokens * c / 2) * 3 * 2


def test_activation_checkpointing_adds_what_is_computed_again() -> None:
    def flops(mode: Any) -> tuple[float, float]:
        found = work(config(activation_checkpointing=mode), 1, 4, 8)
        return found[Part.PRODUCTS].flops, found[Part.ATTENTION].flops

    (products, attention), full = flops("none"), flops("full")
    # Of a block's 12 C^2 weights, the last product's 4 C^2 are not needed again.
    assert full[0] / products == pytest.approx((3 + 8 / 12) / 3)
    assert full[1] / attention == pytest.approx(4 / 3)
    half = flops({"every": 2})
    assert half[0] - products == pytest.approx((full[0] - products) / 2)
    assert flops("selective") == (products, attention)


def test_bytes_are_those_that_no_fusion_saves() -> None:
    """Counted by hand, for 256 tokens of width 64 in 4 layers in bf16."""

    def moved(**train: Any) -> dict[Part, float | None]:
        return {part: todo.moved for part, todo in work(config(precision="bf16", **train), 1, 4, 8).items()}

    tokens, c, vocabulary = 256, 64, 50304
    found = moved()
    # Of each block: LayerNorm twice, reading the stream and what is added to it, writing both; GELU of 4 x width.
    assert found[Part.BLOCKS] == 4 * tokens * c * 96
    # Queries, keys, values, results; in the backward pass, these, the gradient of the result, and three gradients.
    assert found[Part.ATTENTION] == 4 * tokens * c * 2 * (4 + 8)
    # Each of three products reads or writes tokens, weights and results once; 64 tokens are in a micro-batch.
    shapes = [(c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)]
    assert found[Part.PRODUCTS] == 4 * 4 * sum(3 * 2 * (64 * a + a * b + 64 * b) for a, b in shapes)
    assert found[Part.HEAD] == 4 * 3 * 2 * c * (64 + vocabulary)
    assert found[Part.EMBEDDING] == tokens * c * (4 + 4 + 4 + 4)
    # What is repeated: LayerNorm of the stream, sum and LayerNorm, GELU.
    again = 4 * tokens * c * ((4 + 2) + (2 + 4 + 4 + 2) + 16)
    for mode, share in (("selective", 1.0), ("full", 1.0), ({"every": 2}, 0.5)):
        assert moved(activation_checkpointing=mode)[Part.BLOCKS] == found[Part.BLOCKS] + share * again
    assert moved(activation_checkpointing="selective")[Part.PRODUCTS] == found[Part.PRODUCTS]


def table(peaks: Rates = RATES, cuts: Sequence[Cut] = (Cut(4, 2),), **train: Any) -> Table:
    found = Breakdown(1.0, dict.fromkeys(Part, 0.0), {})
    return make_table(config(**train), 1, cuts, found, peaks, "", [])


def rows(made: Table) -> dict[str, Row]:
    return {row.part: row for row in made.rows}


def test_floors_are_those_of_the_profiled_batches() -> None:
    """The batch of a ramp is not yet full: it has fewer micro-batches, and then smaller ones."""
    fast = Rates(100.0, "data sheet", 1e12, "data sheet")  # so that FLOPs bound the products' floor
    full = rows(table(fast))
    for cuts, sequences in (([(4, 2)], 8), ([(1, 2)], 2), ([(1, 1), (2, 2)], 2.5), ([(1, 2), (4, 2)], 5)):
        found = rows(table(fast, [Cut(*each) for each in cuts]))
        for part in (Part.PRODUCTS, Part.BLOCKS, Part.HEAD, Part.EMBEDDING, Part.ATTENTION):
            least, whole = found[part].floor, full[part].floor
            assert least is not None
            assert whole is not None
            assert least.seconds == pytest.approx(whole.seconds * sequences / 8)
        assert found[Part.OPTIMIZER] == full[Part.OPTIMIZER]


def test_the_bytes_that_are_sent_are_those_of_the_profiled_batches() -> None:
    """A ramp's small micro-batches exchange fewer activations; the gradients of a step are as many."""

    def sent(cut: Cut, engine: dict[str, Any]) -> float:
        made = make_table(config(engine), 2, [cut], Breakdown(1.0, dict.fromkeys(Part, 0.0), {}), RATES, "", [])
        todo = rows(made)[Part.EXCHANGE].work
        assert todo is not None
        assert todo.moved is not None
        return todo.moved

    tensor = {"name": "fsdp", "tensor_ranks": 2}
    once = 2 * 4 * (32 + 2 + 6 * 4) * 64 / 2  # gradients of what both ranks have
    assert sent(Cut(1, 2), tensor) - once == pytest.approx(2 * (sent(Cut(1, 1), tensor) - once))
    assert sent(Cut(4, 2), tensor) - once == pytest.approx(8 * (sent(Cut(1, 1), tensor) - once))
    assert sent(Cut(4, 2), {"name": "ddp"}) == sent(Cut(1, 1), {"name": "ddp"})


def test_the_optimizer_updates_a_ranks_part_of_the_model() -> None:
    """Of several tensor ranks, each has LayerNorms, positions and two biases of each block whole."""
    whole = config().model
    uncut = (32 + 2 + 6 * 4) * 64
    for engine, ranks, expected in (
        ({"name": "fsdp", "tensor_ranks": 2}, 2, (whole.stored_parameters - uncut) / 2 + uncut),
        ({"name": "zero", "tensor_ranks": 2, "stage": 3}, 4, ((whole.stored_parameters - uncut) / 2 + uncut) / 2),
        ({"name": "fsdp"}, 4, whole.stored_parameters / 4),
        ({"name": "ddp"}, 4, whole.stored_parameters),
    ):
        assert work(config(engine, precision="fp32"), ranks, 1, 2)[Part.OPTIMIZER].moved == 32 * expected, engine


def test_weights_move_once_in_each_micro_batch() -> None:
    """Whatever its size."""
    few, many = (work(config(precision="fp32"), 1, count, 8) for count in (1, 4))
    weights = 4 * 12 * 64 * 64
    assert many[Part.PRODUCTS].moved == few[Part.PRODUCTS].moved + 3 * 3 * 4 * weights  # type: ignore[operator]
    assert many[Part.HEAD].moved == few[Part.HEAD].moved + 3 * 3 * 4 * 64 * 50304  # type: ignore[operator]
    assert many[Part.PRODUCTS].flops == few[Part.PRODUCTS].flops


def test_float8_doubles_the_peak_of_the_blocks_products() -> None:
    fast = Rates(1.0, "data sheet", 1e12, "data sheet")  # so that FLOPs bound the floor
    plain, float8 = (rows(made := table(fast, precision="bf16", float8=name)) for name in ("none", "rowwise"))
    assert plain[Part.PRODUCTS].floor == Floor(float8[Part.PRODUCTS].floor.seconds * 2, "FLOPs")  # type: ignore[union-attr]
    assert plain[Part.HEAD] == float8[Part.HEAD]
    assert "train.float8 rowwise: the floor of the blocks' matrix products is at twice this rate" in made.notes
    todo = float8[Part.PRODUCTS].work
    assert todo is not None
    # Operands have 1 byte, results 2; each of tokens, weights and results is an operand twice and a result once.
    shapes = [(64, 192), (64, 64), (64, 256), (256, 64)]
    assert todo.moved == 4 * 4 * sum((1 + 1 + 2) * (64 * a + a * b + 64 * b) for a, b in shapes)


@pytest.mark.parametrize("source", ["measured", "log.peak_tflops"])
def test_an_unknown_float8_peak_leaves_products_no_floor(source: str) -> None:
    made = table(RATES._replace(flops_source=source), precision="bf16", float8="tensorwise")
    products = rows(made)[Part.PRODUCTS]
    assert products.floor is None
    assert products.cells()[3:] == ("n/a", "", "")
    assert "the blocks' matrix products have no floor" in made.notes[1]


def test_the_optimizer_moves_eight_values_of_each_parameter() -> None:
    stored = config().model.stored_parameters

    def moved(engine: dict[str, Any], ranks: int, precision: str = "fp32") -> float | None:
        return work(config(engine, precision=precision), ranks, 1, 2)[Part.OPTIMIZER].moved

    assert moved({"name": "ddp"}, 2) == 32 * stored
    assert moved({"name": "fsdp"}, 2) == 16 * stored
    assert moved({"name": "fsdp", "shard_ranks": 2}, 4) == 16 * stored
    assert moved({"name": "zero", "stage": 2}, 4) == 8 * stored
    assert moved({"name": "zero", "stage": 2}, 4, "bf16") == 8.5 * stored
    assert moved({"name": "fsdp", "offload": "all"}, 2) is None


@pytest.mark.parametrize(
    ("engine", "ranks", "bytes_a_parameter"),
    [({"name": "ddp"}, 2, 4), ({"name": "ddp"}, 4, 6), ({"name": "zero", "stage": 1}, 4, 7.5),
     ({"name": "zero", "stage": 2}, 2, 0.5 * (2 * 4 + 2)), ({"name": "zero", "stage": 3}, 2, 0.5 * 2 * (2 + 2 + 4))],
)  # fmt: skip
def test_ranks_send_what_their_engine_exchanges(engine: dict[str, Any], ranks: int, bytes_a_parameter: float) -> None:
    made = config(engine, precision="bf16")
    assert exchanged_bytes(made, ranks, 4 // ranks) == pytest.approx(bytes_a_parameter * made.model.stored_parameters)


def test_fsdp_gathers_blocks_once_more_than_the_rest() -> None:
    model = config().model
    blocks, stored = 4 * model.block_parameters, model.stored_parameters
    sent = exchanged_bytes(config({"name": "fsdp"}, precision="bf16"), 2, 2)
    assert sent == 2 * 0.5 * (2 * (stored + blocks) + 4 * stored)
    once = exchanged_bytes(config({"name": "fsdp", "reshard_after_forward": False}, precision="bf16"), 2, 2)
    assert sent - once == 2 * 0.5 * 2 * blocks
    hybrid = exchanged_bytes(config({"name": "fsdp", "shard_ranks": 2}, precision="bf16"), 4, 1)
    assert hybrid == 0.5 * (2 * (stored + blocks) + 4 * stored) + 4 * stored / 2


def test_a_floor_is_the_slower_of_computing_and_moving() -> None:
    assert floor(Work(1000, 50), RATES) == Floor(10, "FLOPs")
    assert floor(Work(1000, 500), RATES) == Floor(50, "bytes")
    assert floor(Work(0, 30), RATES) == Floor(3, "bytes")
    assert floor(Work(0, None), RATES) is None


def test_rates_are_measured_only_if_they_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_ROWS", {"cpu": 64})
    monkeypatch.setattr(rates, "_COPIED", 2**16)
    state = torch.get_rng_state()
    here = find_rates(config(precision="fp32"), torch.device("cpu"))
    assert here.flops > 0 < here.bandwidth
    assert (here.flops_source, here.bandwidth_source) == ("measured", "measured")
    assert torch.equal(torch.get_rng_state(), state), "the run would draw other numbers"
    monkeypatch.setattr(rates, "peak_flops", lambda device, precision, given: given * 1e12 or 989.4e12)
    monkeypatch.setattr(rates, "memory_bandwidth", lambda device: 3.35e12)
    monkeypatch.setattr(rates, "time_call", None)  # nothing is measured
    known = find_rates(config(), torch.device("cpu"))
    assert str(known) == "989.4 TFLOP/s (data sheet), 3,350 GB/s (data sheet)"


def test_measuring_on_a_gpu_leaves_its_memory_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("_product_rate", "_copy_rate"):
        monkeypatch.setattr(rates, name, lambda *arguments: calls.append("measured") or 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an unknown card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("peak"))
    find_rates(config(), torch.device("cuda", 99))
    assert calls == ["measured", "measured", "emptied", "peak"]
    calls.clear()
    monkeypatch.setattr(rates, "peak_flops", lambda *arguments: 1.0)
    monkeypatch.setattr(rates, "memory_bandwidth", lambda device: 1.0)
    find_rates(config(), torch.device("cuda", 99))
    assert calls == [], "a run that knows its rates keeps its peak"
