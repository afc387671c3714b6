"""The papers' tables, typed here as literals, against the presets."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megagpt.errors import UserError
from megagpt.models.gpt import GPT
from megagpt.models.presets import PRESETS, ModelConfig, get_preset, preset_fields

# name, layers, d_model, heads, d_head, context, parameters, batch in millions of tokens, peak learning rate
TABLE = [
    ("gpt2-124m", 12, 768, 12, 64, 1024, 124_439_808, 0.5, None),
    ("gpt2-355m", 24, 1024, 16, 64, 1024, 354_823_168, 0.5, None),
    ("gpt2-774m", 36, 1280, 20, 64, 1024, 774_030_080, 0.5, None),
    ("gpt2-1558m", 48, 1600, 25, 64, 1024, 1_557_611_200, 0.5, None),
    ("gpt3-125m", 12, 768, 12, 64, 2048, 125_226_240, 0.5, 6.0e-4),
    ("gpt3-350m", 24, 1024, 16, 64, 2048, 355_871_744, 0.5, 3.0e-4),
    ("gpt3-760m", 24, 1536, 16, 96, 2048, 760_300_032, 0.5, 2.5e-4),
    ("gpt3-xl", 24, 2048, 16, 128, 2048, 1_315_723_264, 1.0, 2.0e-4),
    ("gpt3-2.7b", 32, 2560, 32, 80, 2048, 2_651_553_280, 1.0, 1.6e-4),
    ("gpt3-6.7b", 32, 4096, 32, 128, 2048, 6_658_404_352, 2.0, 1.2e-4),
    ("gpt3-13b", 40, 5120, 40, 128, 2048, 12_853_386_240, 2.0, 1.0e-4),
    ("gpt3-175b", 96, 12288, 96, 128, 2048, 174_604_259_328, 3.2, 0.6e-4),
]
NAMES = [row[0] for row in TABLE]

# GPT-3, Table D.1: total training compute in FLOP at 300 billion tokens, and the same in PF-days.
TRAINING_COMPUTE = {
    "gpt3-125m": (2.25e20, 2.60),
    "gpt3-350m": (6.41e20, 7.42),
    "gpt3-760m": (1.37e21, 15.8),
    "gpt3-xl": (2.38e21, 27.5),
    "gpt3-2.7b": (4.77e21, 55.2),
    "gpt3-6.7b": (1.20e22, 139),
    "gpt3-13b": (2.31e22, 268),
    "gpt3-175b": (3.14e23, 3640),
}


def test_the_presets_are_the_papers_sizes() -> None:
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("row", TABLE, ids=NAMES)
def test_every_preset_is_its_row_of_the_papers_table(row: tuple) -> None:
    name, layers, width, heads, head_width, context, parameters, batch, peak_lr = row
    preset = get_preset(name)
    model = preset.model
    assert (model.layers, model.width, model.heads, model.head_width) == (layers, width, heads, head_width)
    assert model.context == context
    assert model.vocab_size == 50257
    assert model.padded_vocab_size == 50304
    assert model.dropout == 0.0
    assert model.attention == "dense"
    assert model.preset == name
    # 175B would not fit in memory, so nothing is allocated.
    assert model.parameters == parameters
    assert preset.peak_lr == peak_lr
    # The paper rounds the batch; ours is a whole number of sequences that rounds to it.
    assert preset.batch_tokens == pytest.approx(batch * 1e6, rel=0.05)
    assert preset.batch_tokens % (512 * 1024) == 0
    assert preset.batch_tokens % context == 0


def test_batches_are_exact_to_the_token() -> None:
    batches = {name: PRESETS[name].batch_tokens for name in ("gpt2-124m", "gpt3-xl", "gpt3-13b", "gpt3-175b")}
    assert batches == {"gpt2-124m": 524_288, "gpt3-xl": 1_048_576, "gpt3-13b": 2_097_152, "gpt3-175b": 3_145_728}


@pytest.mark.parametrize("row", TABLE, ids=NAMES)
def test_parameters_are_those_of_the_module(row: tuple) -> None:
    name, width, parameters = row[0], row[2], row[6]
    with torch.device("meta"):
        model = GPT(get_preset(name).model)
    padding = (50304 - 50257) * width
    assert sum(p.numel() for p in model.parameters()) - padding == parameters


@pytest.mark.parametrize("name", TRAINING_COMPUTE)
def test_training_compute_is_that_of_table_d1(name: str) -> None:
    preset = get_preset(name)
    flops, pf_days = TRAINING_COMPUTE[name]
    assert preset.paper_tokens == 300e9
    assert preset.paper_flops is not None
    assert preset.paper_flops == pytest.approx(flops, rel=0.01)
    assert preset.paper_flops / (1e15 * 86_400) == pytest.approx(pf_days, rel=0.01)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("gpt2")])
def test_gpt2_publishes_no_token_count(name: str) -> None:
    assert get_preset(name).paper_tokens is None
    assert get_preset(name).paper_flops is None


def test_flops_per_token_are_the_products_that_run() -> None:
    config = ModelConfig(layers=3, width=32, heads=2, context=20, vocab_size=256)
    model = GPT(config)
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # The fused attention kernel of a CPU is invisible to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    # The convention counts biases and LayerNorms as if they were multiplied; the counter sees matrix products only.
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counter.get_total_flops() == tokens.numel() * (config.flops_per_token - 6 * vectors)


def test_flops_per_token_are_those_computed_by_hand() -> None:
    shape = {"layers": 3, "width": 4, "heads": 2, "context": 8, "vocab_size": 10}
    # A block of width 4: two LayerNorms 16, qkv 60, out 20, up 80, down 68.
    multiplied = 10 * 4 + 3 * (16 + 60 + 20 + 80 + 68) + 8
    dense = ModelConfig(**shape)
    assert dense.parameters == multiplied + 8 * 4
    # Per layer and token 2 products over 8 keys of width 4, forward once and backward twice, 2 FLOPs each.
    assert dense.flops_per_token == 6 * multiplied + 3 * (2 * 3 * 2 * 8 * 4)
    # The middle layer sees 5 keys.
    banded = ModelConfig(**shape, attention="banded", window=5)
    assert banded.flops_per_token == 6 * multiplied + (2 * 3 * 2 * 4) * (8 + 5 + 8)
    wide = ModelConfig(**shape, attention="banded", window=9)
    assert wide.flops_per_token == dense.flops_per_token


def test_preset_fields_rebuild_the_preset() -> None:
    for name in NAMES:
        assert ModelConfig(**preset_fields(name)) == get_preset(name).model  # type: ignore[arg-type]


def test_unknown_preset_names_its_neighbours() -> None:
    with pytest.raises(UserError) as error:
        get_preset("gpt2-125m")
    assert "gpt2-125m" in str(error.value)
    assert "gpt2-124m" in str(error.value)


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (127, 128), (128, 128), (129, 256), (50257, 50304)])
def test_the_vocabulary_is_padded_to_multiples_of_128(vocab_size: int, padded: int) -> None:
    assert ModelConfig(1, 8, 2, 8, vocab_size=vocab_size).padded_vocab_size == padded


def test_heads_must_divide_the_width() -> None:
    # GPT-3's Table 2.1 as printed: 24 heads at width 2048.
    with pytest.raises(ValueError) as error:
        ModelConfig(layers=24, width=2048, heads=24, context=2048)
    message = str(error.value)
    assert "2048" in message
    assert "24" in message
    assert "[16, 32]" in message


@pytest.mark.parametrize("bad", [{"layers": 0}, {"width": -8}, {"heads": 0}, {"context": 0}, {"dropout": 1.0}])
def test_impossible_shapes_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(**{"layers": 1, "width": 8, "heads": 2, "context": 8} | bad)
    assert next(iter(bad)) in str(error.value)
