"""Banded attention and the key/value cache, each against the plain computation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megagpt.models.attention import KeyValueCache, banded_attention, causal_attention
from megagpt.models.gpt import GPT
from megagpt.models.presets import ModelConfig

SHAPES: dict[str, ModelConfig] = {
    "dense": ModelConfig(layers=2, width=32, heads=4, context=24, vocab_size=60),
    "banded": ModelConfig(layers=4, width=32, heads=4, context=24, vocab_size=60, attention="banded", window=5),
}


def random_model(config: ModelConfig) -> GPT:
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


def band(length: int, window: int) -> Tensor:
    return torch.tensor([[i - window < j <= i for j in range(length)] for i in range(length)])


def qkv(length: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, length, 4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


@given(length=st.integers(1, 40), window=st.integers(1, 44), seed=st.integers(0, 1000))
@example(length=1, window=1, seed=0)
@example(length=9, window=1, seed=0)
@example(length=9, window=9, seed=0)
@example(length=9, window=8, seed=0)
@example(length=9, window=30, seed=0)
@example(length=12, window=4, seed=0)
@example(length=13, window=4, seed=0)
@settings(max_examples=60, deadline=None)
def test_banded_attention_is_masked_attention(length: int, window: int, seed: int) -> None:
    inputs = qkv(length, seed)
    upstream = torch.randn(2, 3, length, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    ours = banded_attention(*inputs, window, 0.0)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=band(length, window))
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_fused_kernels_take_banded_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels need four dimensions and a mask that broadcasts over the batch. The CPU's fused kernel takes the
    place of a GPU's here. Other conditions of a GPU's kernels, such as aligned strides and head widths, and their
    speed and memory are not tested."""
    usual, calls = F.scaled_dot_product_attention, []

    def recorded(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float) -> Tensor:
        calls.append((q, k, v, attn_mask))
        return usual(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    inputs = [x.detach().float() for x in qkv(13)]
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    ours = banded_attention(*inputs, 4, 0.0)
    ((q, k, v, mask),) = calls
    assert q.shape == (2 * 3, 4, 4, 4)
    assert k.shape == v.shape == (2 * 3, 4, 8, 4)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert mask.shape == (1, 4, 4, 8)
    assert mask.dtype == torch.bool
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = usual(q, k, v, attn_mask=mask)
        with pytest.raises(RuntimeError, match="No available kernel"):  # blocks as a dimension of their own
            usual(*(x.unflatten(0, (2, 3)) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(fused.reshape(2, 3, 16, 4)[:, :, :13], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_banded_block_compiles() -> None:
    """In one graph, with the same values and gradients."""
    block = random_model(SHAPES["banded"]).blocks[1]
    assert block.attention.window == 5
    results = []
    for call in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), x)])
    for compiled, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(compiled, eager)


def unfolded(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float) -> Tensor:
    """Banded attention as versions before 0.2 computed it, with the blocks as a dimension of their own."""
    B, H, T, D = q.shape
    tail = -T % window
    blocks = (T + tail) // window
    q = F.pad(q, (0, 0, 0, tail)).view(B, H, blocks, window, D)
    k, v = (F.pad(x, (0, 0, window, tail)).unfold(2, 2 * window, window).transpose(-1, -2) for x in (k, v))
    i, j = torch.arange(window)[:, None], torch.arange(2 * window) - window
    mask = ((j <= i) & (i - j < window)).expand(blocks, -1, -1).clone()
    mask[0] &= j >= 0
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return y.reshape(B, H, blocks * window, D)[:, :, :T]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpus_digits_are_those_of_version_0_1(dropout: float, dtype: torch.dtype) -> None:
    results = []
    for attend in (banded_attention, unfolded):
        inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(45)]
        torch.manual_seed(0)
        y = attend(*inputs, 8, dropout)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_a_window_of_one_copies_the_values() -> None:
    q, k, v = qkv(11)
    torch.testing.assert_close(banded_attention(q, k, v, 1, 0.0), v)


def test_causal_attention_is_that_computed_by_hand() -> None:
    q, k, v = qkv(6)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~band(6, 6), -torch.inf)  # sqrt of head width 4
    torch.testing.assert_close(causal_attention(q, k, v, 0.0), scores.softmax(-1) @ v)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("length", [256, 1024])
def test_banded_attention_is_linear_in_the_length(length: int) -> None:
    inputs = [torch.randn(1, 1, length, 4).requires_grad_() for _ in range(3)]
    with LargestTensor() as seen:
        banded_attention(*inputs, 8, 0.0).sum().backward()
    assert seen.numel <= 2 * length * 8 * 2  # each query against two blocks of keys, and room for padding


@pytest.mark.parametrize("layer", range(4))
def test_odd_layers_of_a_banded_model_see_only_their_window(layer: int) -> None:
    config = SHAPES["banded"]
    attention = random_model(config).blocks[layer].attention
    x = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for query in (0, 3, 4, 11, 16):
        (gradient,) = torch.autograd.grad(attention(x)[0, query].sum(), x)
        seen = {j for j in range(17) if gradient[0, j].any()}
        first = max(0, query - 4) if layer % 2 else 0
        assert seen == set(range(first, query + 1))


def test_every_layer_of_a_dense_model_sees_everything() -> None:
    for block in random_model(SHAPES["dense"]).blocks:
        x = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (gradient,) = torch.autograd.grad(block.attention(x)[0, 16].sum(), x)
        assert bool(gradient[0].any(dim=1).all())


def test_a_window_as_wide_as_the_context_is_dense() -> None:
    shape = {"layers": 2, "width": 32, "heads": 4, "context": 24, "vocab_size": 60}
    dense = random_model(ModelConfig(**shape))
    wide = random_model(ModelConfig(**shape, attention="banded", window=24))
    narrow = random_model(ModelConfig(**shape, attention="banded", window=23))
    tokens = torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dense(tokens)
        torch.testing.assert_close(wide(tokens), expected)
        # One token less reaches the last position alone.
        difference = (narrow(tokens) - expected).abs().amax((0, 2))
    assert difference[:23].max() < 1e-4
    assert difference[23] > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [(1,) * 12, (3, 1, 5, 3), (12,)], ids=["one by one", "in pieces", "at once"])
def test_the_cache_changes_nothing(shape: str, steps: tuple[int, ...]) -> None:
    """Rows of 12, 5 and 2 tokens, then of 24, 17 and 14, which fills the context."""
    config = SHAPES[shape]
    model = random_model(config)
    generator = torch.Generator().manual_seed(2)
    padding = [0, 7, 10]
    tokens = torch.randint(60, (3, 24), generator=generator)
    cache = KeyValueCache(config, torch.tensor(padding), torch.float32)
    with torch.no_grad():
        for step in (12, *steps):
            start, end = cache.length, cache.length + step
            logits = model(tokens[:, start:end], cache=cache)
            assert logits.shape == (3, 1, 60)
            assert cache.length == end
            for row, dead in enumerate(padding):
                expected = model(tokens[row : row + 1, dead:end])[0, -1]
                torch.testing.assert_close(logits[row, 0], expected, rtol=1e-4, atol=2e-5)
    assert cache.length == 24


@pytest.mark.parametrize("shape", SHAPES)
def test_a_piece_of_a_prompt_may_be_all_padding(shape: str) -> None:
    config = SHAPES[shape]
    model = random_model(config)
    tokens = torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(3))
    cache = KeyValueCache(config, torch.tensor([0, 9]), torch.float32)
    with torch.no_grad():
        for piece in tokens.split(4, dim=1):
            logits = model(piece, cache=cache)
        for row, dead in enumerate([0, 9]):
            expected = model(tokens[row : row + 1, dead:])[0, -1]
            torch.testing.assert_close(logits[row, 0], expected, rtol=1e-4, atol=2e-5)


def test_tokens_in_the_padding_do_not_matter() -> None:
    config = SHAPES["banded"]
    model = random_model(config)
    tokens = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(4))
    other = tokens.clone()
    other[1, :8] = (other[1, :8] + 7) % 60
    out = []
    for prompt in (tokens, other):
        cache = KeyValueCache(config, torch.tensor([0, 8]), torch.float32)
        with torch.no_grad():
            out.append([model(prompt, cache=cache), model(tokens[:, :1], cache=cache)])
    for a, b in zip(*out, strict=True):
        assert torch.equal(a, b)


def test_the_caches_positions_and_masks_skip_the_padding() -> None:
    cache = KeyValueCache(SHAPES["dense"], torch.tensor([0, 2]), torch.float32)
    assert cache.positions(4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    x, o = True, False
    assert cache.mask(3, None).tolist() == [
        [[[x, o, o], [x, x, o], [x, x, x]]],
        [[[x, o, o], [o, x, o], [o, o, x]]],  # padding sees itself alone, and nothing sees it
    ]
    cache.length = 3
    assert cache.positions(2).tolist() == [[3, 4], [1, 2]]
    assert cache.mask(2, None).tolist() == [[[[x, x, x, x, o], [x, x, x, x, x]]], [[[o, o, x, x, o], [o, o, x, x, x]]]]
    assert cache.mask(2, 2).tolist() == [[[[o, o, x, x, o], [o, o, o, x, x]]], [[[o, o, x, x, o], [o, o, o, x, x]]]]
    assert cache.mask(1, 3).tolist() == [[[[o, x, x, x]]], [[[o, o, x, x]]]]
