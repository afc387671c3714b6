"""The fused head and cross-entropy against a plain one in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megagpt.models import loss as module
from megagpt.models.loss import (
    Softmax,
    chunk_rows,
    linear_cross_entropy,
    softmax_cross_entropy_,
    softmax_cross_entropy_to_compile_,
)

# Both give the same values, compiled or not.
SOFTMAXES = {"operator by operator": softmax_cross_entropy_, "to compile": softmax_cross_entropy_to_compile_}


def problem(tokens: int, width: int, vocab_size: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, weight and targets, about a quarter of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(rows, width, generator=generator)
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.25] = -100
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the hidden states and of the weight, all in float64."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy((h @ w.T)[:, :vocab_size], targets, ignore_index=-100, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def fused(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softmax: Softmax = softmax_cross_entropy_
) -> tuple[Tensor, Tensor, Tensor]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(h, w, targets, vocab_size, softmax)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def assert_near(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the reference's largest element."""
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape
    assert torch.isfinite(ours).all()
    assert (ours.double() - expected).abs().max() <= tolerance * expected.abs().max()


def check(tokens: int, width: int, vocab_size: int, rows: int, softmax: Softmax = softmax_cross_entropy_) -> None:
    hidden, weight, targets = problem(tokens, width, vocab_size, rows)
    expected = reference(hidden, weight, targets, vocab_size)
    ours = fused(hidden, weight, targets, vocab_size, softmax)
    for a, b in zip(ours, expected, strict=True):
        assert_near(a, b, 2e-6)
    assert not ours[2][vocab_size:].any()
    assert not ours[1][targets == -100].any()


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 50])
@pytest.mark.parametrize(("vocab_size", "rows"), [(128, 128), (77, 128), (129, 256)])
def test_value_and_gradients_are_the_references(
    tokens: int, vocab_size: int, rows: int, softmax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.CHUNK, "cpu", 16)
    check(tokens, 12, vocab_size, rows, SOFTMAXES[softmax])


@pytest.mark.parametrize(
    ("tokens", "limit", "rows"),
    [(32768, 8192, 8192), (12288, 8192, 6144), (8192, 8192, 8192), (100, 8192, 100), (7 * 1024, 2048, 1792),
     (1025, 1024, 513), (1, 8, 1), (0, 8, 0)],
)  # fmt: skip
def test_chunks_are_alike_if_they_can_be(tokens: int, limit: int, rows: int) -> None:
    assert chunk_rows(tokens, limit) == rows


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_any_chunk_gives_the_same_loss(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)
    check(41, 12, 77, 128)


@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 2100])
def test_the_real_chunk_gives_the_same_loss(tokens: int) -> None:
    assert module.CHUNK["cpu"] == 1024
    check(tokens, 8, 77, 128)


def test_the_loss_is_zero_if_no_target_counts() -> None:
    hidden, weight, targets = problem(20, 12, 77, 128)
    loss, grad_hidden, grad_weight = fused(hidden, weight, torch.full_like(targets, -100), 77)
    assert float(loss) == 0
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_the_incoming_gradient_scales_the_gradients() -> None:
    hidden, weight, targets = problem(40, 12, 77, 128)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    (linear_cross_entropy(h, w, targets, 77) * -0.37).backward()
    _, grad_hidden, grad_weight = reference(hidden, weight, targets, 77)
    assert h.grad is not None
    assert w.grad is not None
    assert_near(h.grad, -0.37 * grad_hidden, 2e-6)
    assert_near(w.grad, -0.37 * grad_weight, 2e-6)


def test_gradients_accumulate_over_micro_batches() -> None:
    hidden, weight, targets = problem(40, 12, 77, 128)
    w = weight.clone().requires_grad_()
    for part in (slice(0, 10), slice(10, 25), slice(25, 40)):
        (linear_cross_entropy(hidden[part], w, targets[part], 77) / 40).backward()
    assert w.grad is not None
    assert_near(w.grad, reference(hidden, weight, targets, 77)[2] / 40, 2e-6)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_gradient_may_be_computed_alone(wanted: str) -> None:
    hidden, weight, targets = problem(40, 12, 77, 128)
    expected = dict(zip(("hidden", "weight"), reference(hidden, weight, targets, 77)[1:], strict=True))
    tensors = {"hidden": hidden, "weight": weight}
    tensors[wanted].requires_grad_()
    linear_cross_entropy(tensors["hidden"], tensors["weight"], targets, 77).backward()
    gradient = tensors[wanted].grad
    assert gradient is not None
    assert_near(gradient, expected[wanted], 2e-6)


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e15])
def test_huge_logits_stay_finite(scale: float, softmax: str) -> None:
    hidden, weight, targets = problem(40, 12, 77, 128)
    hidden, weight = hidden * scale, weight * scale
    expected = reference(hidden, weight, targets, 77)
    assert expected[0] > 10 * scale**2  # far beyond the range of exp
    for a, b in zip(fused(hidden, weight, targets, 77, SOFTMAXES[softmax]), expected, strict=True):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_a_confident_correct_model_has_no_loss(softmax: str) -> None:
    weight = torch.eye(128)[:, :100] * 1e4
    targets = torch.arange(50)
    loss, grad_hidden, grad_weight = fused(torch.eye(100)[:50], weight, targets, 100, SOFTMAXES[softmax])
    assert float(loss) == 0
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_the_sum_keeps_its_precision() -> None:
    hidden, weight, targets = problem(20_000, 4, 77, 128)
    loss = linear_cross_entropy(hidden, weight, targets, 77)
    assert float(loss) == pytest.approx(float(reference(hidden, weight, targets, 77)[0]), rel=1e-6)


def test_bf16_autocast_is_near_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK, "cpu", 64)
    hidden, weight, targets = problem(150, 48, 1100, 1152)  # more rows than are summed at a time on a CPU
    weight = weight * 0.2
    expected = reference(hidden, weight, targets, 1100)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(h, w, targets, 1100)
    loss.backward()
    assert h.grad is not None
    assert w.grad is not None
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected[0].item(), rel=2e-3)
    for ours, reference_gradient in zip((h.grad, w.grad), expected[1:], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - reference_gradient).norm() <= 1e-2 * reference_gradient.norm()
    assert not w.grad[1100:].any()
    # The products did run in bf16: in fp32 the loss would agree to seven digits.
    assert loss.item() != pytest.approx(expected[0].item(), rel=1e-7)


def test_backward_twice_is_refused() -> None:
    hidden, weight, targets = problem(20, 12, 77, 128)
    w = weight.requires_grad_()
    loss = linear_cross_entropy(hidden, w, targets, 77)
    loss.backward(retain_graph=True)
    assert w.grad is not None
    first = w.grad.clone()
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()
    assert torch.equal(w.grad, first)


@pytest.mark.parametrize("power", [1, 2])
def test_a_second_derivative_is_refused(power: int) -> None:
    hidden, weight, targets = problem(20, 12, 77, 128)
    w = weight.requires_grad_()
    loss = linear_cross_entropy(hidden, w, targets, 77)
    (gradient,) = torch.autograd.grad(loss**power, w, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_loss_is_the_same_without_gradients(mode: Any) -> None:
    hidden, weight, targets = problem(40, 12, 77, 128)
    weight = torch.nn.Parameter(weight)
    with mode():
        loss = linear_cross_entropy(hidden, weight, targets, 77)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(reference(hidden, weight.detach(), targets, 77)[0]), rel=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient_only_the_logits_are_computed(mode: Any) -> None:
    hidden, weight, targets = problem(40, 12, 77, 128)
    weight = torch.nn.Parameter(weight)
    with mode(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets, 77)
    assert counter.get_total_flops() == 2 * 40 * 12 * 128


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [32, 128, 512])
def test_the_logits_of_all_tokens_never_exist(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, width, rows = 8, 4, 256
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)
    hidden, weight, targets = problem(tokens, width, 200, rows)
    hidden.requires_grad_()
    weight.requires_grad_()
    with LargestTensor() as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets, 200)
        loss.backward()
    assert chunk * rows <= seen.numel <= max(chunk * rows, rows * width, tokens * width)

    with LargestTensor() as plain:
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert plain.numel == tokens * rows  # the probe does see all logits


def test_bf16_gradients_are_scaled_without_a_common_error() -> None:
    """1 / 98,304 rounded to bf16 is 0.2% off; no gradient may inherit that."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).requires_grad_()
    weight = torch.randn(128, 32, generator=generator).requires_grad_()
    targets = torch.randint(128, (64,), generator=generator)
    grads = []
    for scale in (1.0, 1 / 98304):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets, 128)
        grads.append([g / scale for g in torch.autograd.grad(loss * scale, (hidden, weight))])
    for plain, scaled in zip(*grads, strict=True):
        factor = (scaled * plain).sum() / (plain * plain).sum()
        assert abs(float(factor) - 1) < 2e-4
