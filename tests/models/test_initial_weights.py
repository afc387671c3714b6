"""Initial weights: their distribution, and their independence of everything but seed and name."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megagpt.models import initialization
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize, is_decayed, normal_rows
from megagpt.models.presets import ModelConfig

# 301 is not a multiple of 128: the table has 83 padding rows.
CONFIG = ModelConfig(layers=3, width=48, heads=4, context=24, vocab_size=301)


def fresh(config: ModelConfig, seed: int = 0) -> GPT:
    model = GPT(config)
    initialize(model, config, seed)
    return model


@pytest.mark.parametrize("layers", [2, 5])
def test_initial_weights_follow_gpt2s_distribution(layers: int) -> None:
    model = fresh(ModelConfig(layers=layers, width=128, heads=4, context=192, vocab_size=300))
    residual = 0.02 / math.sqrt(2 * layers)
    expected = {"token_embedding.weight": 0.02, "position_embedding.weight": 0.01}
    for i in range(layers):
        expected |= {
            f"blocks.{i}.attention.qkv.weight": 0.02,
            f"blocks.{i}.attention.out.weight": residual,
            f"blocks.{i}.mlp.up.weight": 0.02,
            f"blocks.{i}.mlp.down.weight": residual,
        }
    for name, tensor in model.named_parameters():
        parameter = tensor.detach()
        if name in expected:
            std, numel = expected.pop(name), parameter.numel()
            assert float(parameter.std()) == pytest.approx(std, rel=0.03), name
            assert abs(float(parameter.mean())) < 5 * std / math.sqrt(numel), name
            within = float((parameter.abs() < std).float().mean())
            assert within == pytest.approx(0.6827, abs=5 * 0.466 / math.sqrt(numel)), name
        elif name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones(128)), name
        else:
            assert name.endswith(".bias"), name
            assert not parameter.any(), name
    assert not expected


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    # 129 tokens in a table of 256 rows: ln 129 and ln 256 are far apart.
    config = ModelConfig(layers=2, width=32, heads=2, context=64, vocab_size=129)
    model = fresh(config)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(129, (16, 64), generator=generator) for _ in range(2))
    with torch.no_grad():
        loss = float(model(tokens, targets)) / targets.numel()
    assert loss == pytest.approx(math.log(129), abs=0.03)


@given(data=st.data(), seed=st.integers(0, 2**40), columns=st.integers(1, 9), block=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_any_rows_are_a_slice_of_the_whole(data: st.DataObject, seed: int, columns: int, block: int) -> None:
    rows = data.draw(st.integers(1, 30))
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialization, "_BLOCK_NUMEL", block)  # many blocks in few numbers
        whole = normal_rows(seed, "some.weight", columns, 0, rows)
        part = normal_rows(seed, "some.weight", columns, start, stop)
    assert whole.shape == (rows, columns)
    assert whole.dtype == np.float32
    assert len(np.unique(whole)) == whole.size
    np.testing.assert_array_equal(part, whole[start:stop])


def test_any_rows_are_a_slice_at_the_real_block_size() -> None:
    columns = 2**18 + 1  # three rows a block
    whole = normal_rows(3, "w", columns, 0, 7)
    for start, stop in [(0, 2), (2, 4), (3, 6), (4, 5), (5, 7), (7, 7)]:
        np.testing.assert_array_equal(normal_rows(3, "w", columns, start, stop), whole[start:stop])


def test_rows_of_different_blocks_seeds_and_names_are_unrelated() -> None:
    def draw(seed: int, name: str, start: int = 0) -> np.ndarray:
        return normal_rows(seed, name, 2**20, start, start + 1)[0]

    samples = [draw(0, "a"), draw(1, "a"), draw(0, "b"), draw(0, "a", start=1)]
    correlation = np.corrcoef(np.stack(samples)) - np.eye(4)
    assert np.abs(correlation).max() < 5 / 2**10


def test_initial_weights_are_the_named_rows() -> None:
    model = fresh(CONFIG, seed=11)
    for name, std in [("blocks.1.mlp.down.weight", 0.02 / math.sqrt(6)), ("position_embedding.weight", 0.01)]:
        parameter = model.get_parameter(name).detach().numpy()
        rows = normal_rows(11, name, parameter.shape[1], 5, 9)
        np.testing.assert_allclose(parameter[5:9], rows * std, rtol=1e-6)


def test_a_weight_does_not_depend_on_the_rest_of_the_model() -> None:
    small = ModelConfig(layers=2, width=32, heads=2, context=16, vocab_size=200)
    deep = ModelConfig(layers=8, width=32, heads=4, context=40, vocab_size=500, attention="banded", dropout=0.1)
    a, b = fresh(small), dict(fresh(deep).named_parameters())
    for name, parameter in a.named_parameters():
        # The residual projections are the same draws, scaled for their depth.
        scale = 2.0 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 1.0
        torch.testing.assert_close(parameter, b[name][: len(parameter)] * scale, rtol=1e-6, atol=0)

    part = GPT(small)
    part.blocks = part.blocks[:1]
    del part.token_embedding
    initialize(part, small, 0)
    whole = dict(a.named_parameters())
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_weights_do_not_depend_on_memory_device_or_generators() -> None:
    expected = fresh(CONFIG, seed=5).state_dict()
    with torch.device("meta"):
        model = GPT(CONFIG)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    initialize(model, CONFIG, 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_seeds_and_names_give_different_weights() -> None:
    a, b = fresh(CONFIG, seed=0), fresh(CONFIG, seed=1)
    matrices = [name for name, p in a.named_parameters() if p.dim() == 2]
    for name in matrices:
        assert (a.get_parameter(name) != b.get_parameter(name)).float().mean() > 0.99, name
    # Every name draws its own numbers.
    rows = np.stack([a.get_parameter(name).detach()[0, :48].numpy() for name in matrices])
    correlation = np.corrcoef(rows) - np.eye(len(matrices))
    assert np.abs(correlation).max() < 0.8


def test_weight_decay_applies_to_matrices_alone() -> None:
    model = GPT(CONFIG)
    matrices = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)
    }
    assert len(matrices) == 2 + 4 * CONFIG.layers
    assert {name for name, _ in model.named_parameters() if is_decayed(name)} == matrices
