"""Float8 in the blocks' linear layers, emulated on a CPU: what is rounded, and what is refused."""

import functools
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from megagpt.config import Config
from megagpt.config_types import ActivationCheckpointing
from megagpt.engines import compilation, float8
from megagpt.engines.activation_checkpointing import checkpoint_activations
from megagpt.engines.engine import build_engine, build_optimizer
from megagpt.engines.float8 import convert_linears
from megagpt.measure.cases import LR, Case, Curve, difference, share
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize
from megagpt.models.loss import softmax_cross_entropy_
from megagpt.world import World
from tests.engines.test_activation_checkpointing import Count

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")

Scaling = Literal["none", "tensorwise", "rowwise"]
SCALINGS: tuple[Scaling, ...] = ("tensorwise", "rowwise")
CPU = torch.device("cpu")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "emulated", True)


def configured(case: Case, scaling: Scaling) -> Config:
    """The case's config in bf16, with that scaling; `load_config` refuses it for a CPU."""
    config = replace(case, precision="bf16").config()
    return replace(config, train=replace(config.train, float8=scaling))


def build(scaling: Scaling) -> GPT:
    config = configured(Case({}, 1), scaling)
    model = GPT(config.model)
    initialize(model, config.model, 0)
    convert_linears(model, config, CPU, compiled=config.train.compile is True)
    return model


# --- what is computed ---

# Bits behind the point, smallest exponent of a normal number, and largest number of the two formats (Micikevicius et
# al. 2022, table 1).
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)


def rounded(x: Tensor, form: tuple[int, int, float], dim: int | None) -> Tensor:
    """float64 `x` in that format, to nearest, ties to even; scaled by one number, or by a power of two along `dim`."""
    bits, smallest, largest = form
    if dim is None:
        scale = largest / x.abs().max()
    else:
        scale = torch.exp2(torch.floor(torch.log2(largest / x.abs().amax(dim, keepdim=True))))
    scale = scale.float().double()  # scales are fp32
    y = (x * scale).float().double()
    exponent = torch.floor(torch.log2(y.abs().clamp_min(1e-300))).clamp_min(smallest)
    step = torch.exp2(exponent - bits)
    return (torch.round(y / step) * step).clamp(-largest, largest) / scale


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_layer_multiplies_rounded_operands(scaling: Scaling, emulated: None) -> None:
    """Output and both gradients, beside float64 products of operands that are rounded here."""
    layer = build(scaling).blocks[0].attention.qkv
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, layer.in_features, generator=generator, requires_grad=True)
    gradient = torch.randn(48, layer.out_features, generator=generator) ** 3
    y = layer(x)
    y.backward(gradient)
    a, w, g = (t.detach().double() for t in (x, layer.weight, gradient))
    rows = (lambda dim: None) if scaling == "tensorwise" else (lambda dim: dim)
    form = E5M2 if scaling == "tensorwise" else E4M3
    assert x.grad is not None
    assert layer.weight.grad is not None
    products = {
        "output": (y.detach(), a, w.T, rounded(a, E4M3, rows(1)) @ rounded(w, E4M3, rows(1)).T),
        "input": (x.grad, g, w, rounded(g, form, rows(1)) @ rounded(w, E4M3, rows(0))),
        "weight": (layer.weight.grad, g.T, a, rounded(g, form, rows(0)).T @ rounded(a, E4M3, rows(0))),
    }
    for name, (found, left, right, expected) in products.items():
        size = expected.norm()
        assert (found.double() - expected).norm() < 1e-6 * size, name
        # Half a step of the last bit is 1/16 of a number in E4M3, 1/8 in E5M2; errors of a sum are of any sign.
        assert 0.005 * size < (found.double() - left @ right).norm() < 0.1 * size, name


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_blocks_four_linear_layers_are_converted_and_nothing_else(scaling: Scaling, emulated: None) -> None:
    from torchao.float8.float8_linear import Float8Linear

    plain, model = build("none"), build(scaling)
    before = dict(plain.named_modules())
    assert list(before) == [name for name, _ in model.named_modules()]
    converted = {name for name, module in model.named_modules() if type(module) is not type(before[name])}
    layers = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert converted == {f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in layers}
    assert all(isinstance(model.get_submodule(name), Float8Linear) for name in converted)


def test_parameters_keep_names_order_values_and_decay(emulated: None) -> None:
    config = configured(Case({}, 1), "rowwise")
    model = GPT(config.model)
    before, groups = list(model.named_parameters()), build_optimizer(model, config).param_groups
    convert_linears(model, config, CPU, compiled=config.train.compile is True)
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    assert model.state_dict().keys() == GPT(config.model).state_dict().keys()
    for one, other in zip(groups, build_optimizer(model, config).param_groups, strict=True):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]


def test_without_the_key_nothing_is_converted() -> None:
    assert all(type(m) is nn.Linear for m in build("none").modules() if isinstance(m, nn.Linear))


# --- a few steps ---

STEPS = 6
# Largest difference of the loss from bf16 over these steps, in which it falls from 6.22 to 5.9.
TOLERANCE = 2e-2


@functools.cache
def curve(scaling: Scaling, mode: str = "none", compiled: bool = False, steps: int = 3) -> Curve:
    case = Case({}, 1, 2, mode, compile=compiled)
    engine = build_engine(configured(case, scaling), World.alone())
    results = [engine.train_step(share(step, 0, case), LR) for step in range(steps)]
    return [(r.loss, r.gradient_norm) for r in results]


@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_loss_is_near_that_of_bf16_and_not_the_same(scaling: Scaling, emulated: None) -> None:
    bf16 = curve("none", steps=STEPS)
    assert bf16[0][0] - bf16[-1][0] > 3 * TOLERANCE, "nothing is learned"
    assert 1e-4 < difference(curve(scaling, steps=STEPS), bf16)[0] < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS)
def test_activation_checkpointing_keeps_the_numbers(scaling: Scaling, emulated: None) -> None:
    expected = curve(scaling)
    for mode in ("full", "selective"):
        assert curve(scaling, mode) == expected, mode


def count_step(mode: ActivationCheckpointing) -> dict[str, int]:
    """Calls of a few operators in one forward and backward pass in which every checkpointed block runs to its end."""
    model = build("tensorwise")
    checkpoint_activations(model, mode)
    tokens = torch.zeros(2, 32, dtype=torch.long)
    with set_checkpoint_early_stop(False), Count() as count:
        model(tokens, tokens).backward()
    return {name: count.calls[name] for name in ("mm", "max", "gelu")}


def test_selective_repeats_neither_products_nor_scales(emulated: None) -> None:
    none, selective, full = (count_step(mode) for mode in ("none", "selective", "full"))
    layers = 3
    assert selective == {**none, "gelu": none["gelu"] + layers}
    assert full["mm"] == none["mm"] + 4 * layers
    assert full["max"] > none["max"]


@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled_blocks_keep_the_numbers(
    scaling: Scaling, emulated: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each block in one graph, without Inductor's C++; the head as it is, as its compiled form rounds elsewhere."""
    expected = curve(scaling, "selective")
    build_engine(configured(Case({}, 1), scaling), World.alone())
    assert f"train.float8 {scaling} is slow without compiled blocks" in capsys.readouterr().out
    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "softmax_cross_entropy_to_compile_", softmax_cross_entropy_)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    found = curve(scaling, "selective", compiled=True)
    assert "is slow" not in capsys.readouterr().out
    assert found != curve("none", "selective"), "computed in bf16"
    assert difference(found, expected) == pytest.approx((0, 0), abs=1e-3)
