"""Predicted seconds of a step: closed forms, limits, and the direction of every change."""

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import Config, EngineConfig, TrainConfig
from megagpt.config_file import load_config
from megagpt.errors import UserError
from megagpt.models.presets import PRESETS, ModelConfig
from megagpt.planning.calibration import calibrated, calibration_of
from megagpt.planning.gpus import Cluster, find_gpu
from megagpt.planning.plan import make_plan
from megagpt.planning.speed import Speed, predict_speed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
H100 = find_gpu("h100")
ENGINES: list[dict[str, Any]] = [
    {"name": "ddp"}, {"name": "fsdp"}, {"name": "fsdp", "reshard_after_forward": False},
    {"name": "zero", "stage": 1}, {"name": "zero", "stage": 2}, {"name": "zero", "stage": 3},
]  # fmt: skip


def predicted(
    preset: str | ModelConfig,
    gpus: int,
    gpu: str = "h100",
    engine: dict[str, Any] | None = None,
    accumulation: int = 1,
    per_node: int = 8,
    network: float = 0,
    **train: Any,
) -> Speed:
    """The speed of a preset with as large a batch as the other arguments ask for."""
    model = PRESETS[preset].model if isinstance(preset, str) else preset
    train = {"micro_batch": 2, **train}
    batch = model.context * train["micro_batch"] * gpus * accumulation
    config = Config(
        model=model,
        train=TrainConfig(tokens=100 * batch, batch_tokens=batch, **train),
        engine=EngineConfig(**(engine or {"name": "fsdp"})),
    )
    return predict_speed(config, Cluster(find_gpu(gpu), gpus, per_node, network))


def each(speed: Speed, gpus: int) -> float:
    return speed.tokens_per_second / gpus


def test_the_parts_of_one_gpu_follow_their_closed_forms() -> None:
    speed, c = predicted("gpt3-xl", 1, micro_batch=4, accumulation=8), calibration_of(H100)
    layers, width, context, vocabulary, tokens = 24, 2048, 2048, 50304, 8 * 4 * 2048
    parameters = PRESETS["gpt3-xl"].model.stored_parameters
    products = (72 * width**2 * layers + 6 * vocabulary * width) * (1 + c.half_tokens / 8192)
    assert speed.seconds == pytest.approx({
        "matrix products": tokens * products / (989.4e12 * c.products),
        "attention": tokens * 7 * layers * width * context / (989.4e12 * c.attention),
        "other operations": tokens * layers * width * c.other_bytes / 3.35e12,
        "logits": tokens * vocabulary * c.logit_bytes / 3.35e12,
        "weights in each micro-batch": 8 * parameters * c.weight_bytes / 3.35e12,
        "exchange": 0,
        "update": parameters * c.update_bytes / 3.35e12,
    })  # fmt: skip
    assert speed.step == pytest.approx(sum(speed.seconds.values()))
    assert speed.tokens_per_second == pytest.approx(tokens / speed.step)
    assert speed.mfu == pytest.approx(PRESETS["gpt3-xl"].model.flops_per_token * tokens / speed.step / 989.4e12)
    assert speed.hidden_exchange == 0


def test_every_prediction_is_finite_and_adds_up() -> None:
    settings = itertools.product(
        ("gpt2-124m", "gpt3-2.7b", "gpt3-175b"), (1, 4, 8, 64, 1024), ENGINES,
        ("none", "selective", "full", {"every": 3}), ("fp32", "bf16", "fp16"), (1, 64), (1, 400),
    )  # fmt: skip
    for preset, gpus, engine, mode, precision, size, network in settings:
        speed = predicted(
            preset, gpus, engine=engine, network=network,
            micro_batch=size, activation_checkpointing=mode, precision=precision,
        )  # fmt: skip
        assert all(0 <= part < math.inf for part in speed.seconds.values())
        assert sum(speed.seconds.values()) == pytest.approx(speed.step)
        assert 0 < speed.mfu < 0.8
        assert speed.hidden_exchange >= 0
        low, high = speed.range
        assert low < speed.tokens_per_second < high


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("preset", ["gpt2-124m", "gpt3-13b", "gpt3-175b"])
def test_speed_changes_smoothly_and_in_the_right_direction(preset: str, engine: dict[str, Any]) -> None:
    by_gpus = [each(predicted(preset, n, engine=engine), n) for n in (8, 16, 32, 64, 256, 1024, 4096)]
    by_size = [each(predicted(preset, 64, engine=engine, micro_batch=size), 64) for size in range(1, 65)]
    by_network = [
        each(predicted(preset, 64, engine=engine, network=g), 64) for g in (5, 10, 25, 50, 100, 200, 400, 1600)
    ]
    assert by_gpus == sorted(by_gpus, reverse=True)
    assert by_size == sorted(by_size)
    assert by_network == sorted(by_network)
    # A change of 1% in one quantity changes no speed by more than about 1%.
    steps = [each(predicted(preset, 64, engine=engine, network=5 * 1.01**i), 64) for i in range(500)]
    assert max(after / before for before, after in itertools.pairwise(steps)) < 1.0102


def test_more_repeated_work_takes_longer() -> None:
    modes = ["none", {"every": 4}, {"every": 2}, "full"]
    steps = [predicted("gpt3-6.7b", 8, activation_checkpointing=mode).step for mode in modes]
    assert steps == sorted(steps)
    assert steps[0] < predicted("gpt3-6.7b", 8, activation_checkpointing="selective").step < steps[-1]
    assert predicted("gpt3-6.7b", 8, activation_checkpointing={"every": 1}).step == pytest.approx(steps[-1])


def test_micro_batches_add_equal_times() -> None:
    for engine in ENGINES:
        one, two, nine = (predicted("gpt3-xl", 16, engine=engine, accumulation=k).step for k in (1, 2, 9))
        assert nine - two == pytest.approx(7 * (two - one))


def test_a_node_of_one_copy_keeps_the_weights_off_the_network() -> None:
    hybrid = {"name": "fsdp", "shard_ranks": 8}
    for network in (10, 50):
        shared = predicted("gpt3-xl", 64, network=network, accumulation=8)
        copies = predicted("gpt3-xl", 64, network=network, accumulation=8, engine=hybrid)
        assert copies.step < shared.step
    # On one node it is the same as sharding over all.
    assert predicted("gpt3-xl", 8, engine=hybrid).step == pytest.approx(predicted("gpt3-xl", 8).step)


def test_fp32_counts_products_without_tf32() -> None:
    half, full = (predicted("gpt3-xl", 1, precision=p).seconds["matrix products"] for p in ("bf16", "fp32"))
    assert full / half == pytest.approx(989.4 / 66.9)


def test_float8_is_faster_by_what_rows_in_float8_show() -> None:
    short = ModelConfig(24, 2048, 16, 512)
    long = ModelConfig(24, 2048, 16, 32768)
    for model, size, low, high in ((short, 56, 1.2, 1.4), (long, 1, 1.03, 1.12)):
        plain, float8 = (
            predicted(model, 8, micro_batch=size, float8=f).tokens_per_second for f in ("none", "tensorwise")
        )
        assert low < float8 / plain < high
        assert plain < predicted(model, 8, micro_batch=size, float8="rowwise").tokens_per_second < float8


def test_a_residual_stream_in_bf16_moves_fewer_bytes() -> None:
    wide, narrow = (predicted("gpt3-xl", 8, residual=r).seconds["other operations"] for r in ("fp32", "bf16"))
    assert 0.8 < narrow / wide < 1


def test_dropout_moves_more_bytes() -> None:
    plain = PRESETS["gpt3-xl"].model
    times = [predicted(dataclasses.replace(plain, dropout=p), 8).seconds["other operations"] for p in (0.0, 0.1)]
    assert 1.05 < times[1] / times[0] < 1.3


def test_banded_layers_attend_to_two_windows() -> None:
    dense = PRESETS["gpt3-xl"].model
    banded = dataclasses.replace(dense, context=8192, attention="banded", window=256)
    long = dataclasses.replace(dense, context=8192)
    times = [predicted(m, 8).seconds["attention"] for m in (long, banded)]
    assert times[1] / times[0] == pytest.approx((4096 + 512) / 2 / 4096)


def test_offloaded_state_costs_time_and_is_no_evidence() -> None:
    kept = predicted("gpt3-13b", 8, engine={"name": "zero", "stage": 3})
    updates = predicted("gpt3-13b", 8, engine={"name": "zero", "stage": 3, "offload": "optimizer"})
    everything = predicted("gpt3-13b", 8, engine={"name": "fsdp", "offload": "all"})
    assert kept.step < updates.step < everything.step
    assert "fsdp" in everything.evidence
    assert "no published speed of offloaded state" in everything.evidence


def test_a_launch_bound_step_waits_for_the_host() -> None:
    tiny = ModelConfig(layers=24, width=128, heads=2, context=128)
    speed = predicted(tiny, 1, engine={"name": "ddp"}, micro_batch=1)
    assert speed.seconds["waiting for the host"] > 0.5 * speed.step
    assert "waiting for the host" not in predicted("gpt3-13b", 8).seconds


def test_the_page_shows_175b_on_many_gpus() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("### Many GPUs")[2]
    rows = re.findall(r"^\| ([\d,]+) \| (\d) \| (\d+) \| ([\d.]+)% \| (\d+)% \|$", text, re.MULTILINE)
    assert len(rows) == 6
    # Tokens/s of an earlier analysis, up to the number of ranks for which both have evidence.
    before = {128: 353, 384: 341, 512: 308}
    for gpus, size, shown, mfu, waiting in (
        (int(row[0].replace(",", "")), int(row[1]), *map(float, row[2:])) for row in rows
    ):
        speed = predicted("gpt3-175b", gpus, micro_batch=size, activation_checkpointing="full", accumulation=4)
        assert each(speed, gpus) == pytest.approx(shown, abs=1)
        assert 100 * speed.mfu == pytest.approx(mfu, abs=0.1)
        assert 100 * speed.seconds["exchange"] / speed.step == pytest.approx(waiting, abs=0.6)
        assert each(speed, gpus) == pytest.approx(before.get(gpus, shown), rel=0.16)


def test_the_page_shows_175b_with_tensor_ranks() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("### Tensor ranks")[2]
    number, amount = r"(\d+)", r"([\d.,]+)"
    row = rf"^\| ([\d,]+) \| {number} \| (once|twice) \| {number} \| {amount} \| {amount}% \| {amount}% \| {amount} \| "
    rows = re.findall(row + rf"\${amount} \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for gpus, size, gathered, batch, *shown in rows:
        keep = str(gathered == "twice").lower()
        keys = [f"engine.tensor_ranks={size}", f"train.micro_batch={batch}", f"engine.reshard_after_forward={keep}"]
        plan = make_plan(load_config("gpt3_175b", keys), Cluster(H100, int(gpus.replace(",", ""))), 2.5)
        found = (
            plan.memory.total / 1e9,
            100 * plan.speed.mfu,
            100 * plan.ramp_seconds / plan.seconds,
            plan.days,
            plan.cost,
        )
        assert found == pytest.approx([float(cell.replace(",", "")) for cell in shown], rel=0.01)


def test_tensor_ranks_exchange_activations_and_their_part_of_the_weights() -> None:
    c, tokens, width = calibration_of(H100), 12 * 2048, 12288
    speed = predicted("gpt3-175b", 64, engine={"name": "fsdp", "tensor_ranks": 8}, micro_batch=12)
    terms = {term.name: term.value for term in speed.terms}
    calls = 4 + 8 * 96
    sent = 7 / 8 * calls * tokens * width * 2 + 7 * 12 * tokens
    assert (terms["activations: sent"], terms["activations: calls"]) == pytest.approx((sent, calls))
    copied = 2.5 * calls * tokens * width * 2
    seconds = 8 * (sent / (c.link_share * 450e9) + calls * c.call + copied / 3.35e12)  # 8 micro-batches
    assert speed.seconds["tensor exchange"] == pytest.approx(seconds, rel=1e-3)  # and the uncut gradients, once
    whole = {term.name: term.value for term in predicted("gpt3-175b", 64, micro_batch=12).terms}
    assert terms["weights: sent"] / whole["weights: sent"] == pytest.approx((7 / 8) / (63 / 64) / 8, rel=1e-3)
    again = predicted("gpt3-175b", 64, engine={"name": "fsdp", "tensor_ranks": 8}, activation_checkpointing="full")
    assert {term.name: term.value for term in again.terms}["activations: calls"] == 4 + 11 * 96
    assert "tensor ranks" in again.evidence


def test_only_settings_like_the_rows_get_a_narrow_range() -> None:
    near = predicted("gpt3-6.7b", 64, micro_batch=4)
    low, high = (bound / near.tokens_per_second for bound in near.range)
    assert (low, high) == pytest.approx((0.95, 1.05))
    assert "other people's code" in near.evidence
    far = {
        "ddp": predicted("gpt3-6.7b", 64, engine={"name": "ddp"}),
        "zero-2": predicted("gpt3-6.7b", 64, engine={"name": "zero", "stage": 2}),
        "h200": predicted("gpt3-6.7b", 64, gpu="h200"),
        "b200": predicted("gpt3-6.7b", 64, gpu="b200"),
        "175B": predicted("gpt3-175b", 64, activation_checkpointing="full"),
        "4,096 GPUs": predicted("gpt3-6.7b", 4096),
        "fp32": predicted("gpt3-6.7b", 64, precision="fp32"),
        "float8": predicted("gpt3-6.7b", 64, float8="rowwise"),
        "selective": predicted("gpt3-6.7b", 64, activation_checkpointing="selective"),
        "50 Gbit/s": predicted("gpt3-6.7b", 64, network=50),
        "copies": predicted("gpt3-6.7b", 64, engine={"name": "fsdp", "shard_ranks": 8}),
        "micro-batch": predicted("gpt3-6.7b", 64, micro_batch=1),
    }
    for words, speed in far.items():
        assert [bound / speed.tokens_per_second for bound in speed.range] == pytest.approx([0.7, 1.3]), words
        assert words in speed.evidence
    assert "assumed" in far["b200"].evidence
    assert "assumed" not in far["ddp"].evidence


def test_a_gpu_without_the_precision_is_refused() -> None:
    with pytest.raises(UserError, match=r"v100-32gb has no products in bf16: set train\.precision=fp16"):
        predicted("gpt3-xl", 8, gpu="v100")
    assert predicted("gpt3-xl", 8, gpu="v100", precision="fp16").tokens_per_second > 0
    with pytest.raises(UserError, match=r"a100-80gb has compute capability 8.0, and it needs 8.9"):
        predicted("gpt3-xl", 8, gpu="a100", float8="tensorwise")


def test_a_calibrated_plan_scales_every_part() -> None:
    config = Config(
        model=PRESETS["gpt3-xl"].model, train=TrainConfig(batch_tokens=2**20, micro_batch=4), engine=EngineConfig("ddp")
    )
    cluster = Cluster(H100, 8)
    plain = predict_speed(config, cluster)
    slower = predict_speed(config, cluster, calibrated(calibration_of(H100), 1.25, "my_run"))
    assert slower.seconds == pytest.approx({name: 1.25 * value for name, value in plain.seconds.items()})
    assert "my_run" in slower.evidence
    assert slower.range[1] / slower.tokens_per_second == pytest.approx(1.15)
    split = dataclasses.replace(config, engine=EngineConfig("fsdp", tensor_ranks=8))
    unlike = predict_speed(split, cluster, calibrated(calibration_of(H100), 1.25, "my_run"))
    assert unlike.range[1] / unlike.tokens_per_second == pytest.approx(1.3)
    assert "tensor ranks" in unlike.evidence


def test_an_explanation_names_formula_and_origin_of_each_number() -> None:
    for engine in ENGINES:
        speed = predicted("gpt3-xl", 16, engine=engine)
        terms = {term.name: term for term in speed.terms}
        assert len(terms) == len(speed.terms)
        for name, value in speed.seconds.items():
            assert (terms[name].value, terms[name].unit) == (value, "s")
            assert terms[name].formula
        assert all(term.origin for term in speed.terms)
