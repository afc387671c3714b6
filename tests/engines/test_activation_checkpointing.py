"""Activation checkpointing changes the memory that is kept, and no computed number."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, set_checkpoint_early_stop

from megagpt.config_types import ActivationCheckpointing
from megagpt.engines import activation_checkpointing
from megagpt.engines.activation_checkpointing import checkpoint_activations
from megagpt.models.attention import KeyValueCache
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize
from megagpt.models.presets import ModelConfig
from tests.saved_tensors import saved_storages

LAYERS = 4
LENGTH = 48
MODES: list[ActivationCheckpointing] = ["none", "full", {"every": 2}, "selective"]
NAMES = ["none", "full", "every 2", "selective"]

# The products of a block by name: four linear layers; attention is one kernel, or batched products around a softmax.
LINEAR = ("mm", "addmm")
ATTENTION = ("bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")


def build(mode: ActivationCheckpointing, dropout: float = 0.0, attention: str = "dense") -> GPT:
    config = ModelConfig(
        layers=LAYERS,
        width=32,
        heads=2,
        context=LENGTH,
        vocab_size=301,
        dropout=dropout,
        attention=attention,
        window=16,
    )
    model = GPT(config)
    initialize(model, config, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    checkpoint_activations(model, mode)
    return model


def loss_of(model: GPT) -> Tensor:
    rows = torch.randint(301, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    rows = rows.to(model.token_embedding.weight.device)
    return model(rows[:, :-1], rows[:, 1:])


# --- the same numbers ---


@pytest.mark.parametrize("attention", ["dense", "banded"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mode", MODES, ids=NAMES)
def test_loss_and_gradients_are_those_of_the_untouched_model(
    mode: ActivationCheckpointing, dropout: float, attention: str
) -> None:
    """Bit for bit, over two steps of one stream of random numbers: with dropout, the backward pass draws what the
    forward pass drew, and leaves the stream where it was."""
    untouched, model = build("none", dropout, attention), build(mode, dropout, attention)
    results = []
    for m in (untouched, model):
        torch.manual_seed(7)
        losses = []
        for _ in range(2):  # gradients of both add up, as over micro-batches
            loss = loss_of(m)
            loss.backward()
            losses.append(loss.item())
        results.append((losses, {name: p.grad for name, p in m.named_parameters()}))
    (expected_losses, expected), (losses, gradients) = results
    assert losses == expected_losses
    assert (losses[0] != losses[1]) == (dropout > 0)  # dropout is at work
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradients[name], gradient), name  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["dense", "banded"])
@pytest.mark.parametrize("mode", MODES[1:], ids=NAMES[1:])
def test_a_gpus_gradients_under_dropout_are_the_same(
    mode: ActivationCheckpointing, attention: str, precision: torch.dtype
) -> None:
    """A GPU's attention kernels draw their own dropout: if a kernel is kept and does not run again, later draws must
    still be the same."""
    gradients = []
    for m in (build("none", 0.2, attention).cuda(), build(mode, 0.2, attention).cuda()):
        torch.manual_seed(7)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            loss = loss_of(m)
        loss.backward()
        gradients.append({name: p.grad for name, p in m.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None, name
        # Backward passes add in any order; another dropout mask would change gradients by about their own size.
        assert (gradients[1][name] - expected).abs().max() < 0.02 * expected.abs().max(), name


@pytest.mark.parametrize("mode", MODES, ids=NAMES)
def test_names_stay_the_same(mode: ActivationCheckpointing) -> None:
    untouched, model = build("none"), build(mode)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in untouched.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in untouched.named_modules()]
    assert model.state_dict().keys() == untouched.state_dict().keys()


# --- repeated operators ---


class Count(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def count_block(attention: str, dropout: float, layer: int) -> Counter[str]:
    """The operators of one block's forward pass by itself."""
    block = build("none", dropout, attention).blocks[layer]
    x = torch.randn(3, LENGTH, 32, requires_grad=True)
    with Count() as count:
        block(x)
    return count.calls


def count_step(mode: ActivationCheckpointing, attention: str, dropout: float, early_stop: bool = False) -> Counter[str]:
    """The operators of a whole forward and backward pass. `early_stop`: whether a checkpointed block stops when the
    backward pass has all that it needs, as it does in a run, or goes on to its end."""
    model = build(mode, dropout, attention)
    with set_checkpoint_early_stop(early_stop), Count() as count:
        loss_of(model).backward()
    return count.calls


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("attention", ["dense", "banded"])
@pytest.mark.parametrize(
    ("mode", "redone"), [("full", range(LAYERS)), ({"every": 2}, (0, 2)), ({"every": 3}, (0, 3)), ({"every": 9}, (0,))]
)
def test_checkpointed_blocks_run_twice_and_the_others_once(
    mode: ActivationCheckpointing, redone: range | tuple[int, ...], attention: str, dropout: float
) -> None:
    added = count_step(mode, attention, dropout) - count_step("none", attention, dropout)
    blocks = sum((count_block(attention, dropout, layer) for layer in redone), Counter[str]())
    assert blocks["addmm"] == 4 * len(redone)
    assert blocks["gelu"] == len(redone)
    for name in (*LINEAR, *ATTENTION, "gelu", "native_layer_norm"):
        assert added[name] == blocks[name], name
    assert sum(blocks[name] for name in ATTENTION) >= len(redone)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("attention", ["dense", "banded"])
def test_selective_repeats_all_but_products(attention: str, dropout: float) -> None:
    plain, selective = (count_step(mode, attention, dropout, early_stop=True) for mode in ("none", "selective"))
    for name in (*LINEAR, *ATTENTION):
        assert selective[name] == plain[name], name
    assert selective["gelu"] == plain["gelu"] + LAYERS
    assert selective["native_layer_norm"] == plain["native_layer_norm"] + 2 * LAYERS


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_selective_keeps_no_output_that_nobody_reads(ranks: int) -> None:
    """The MLP's second product ends its block: only the residual sum reads it, or the exchange of tensor ranks."""
    policy = activation_checkpointing.selective_policy(ModelConfig(2, 32, 4, 16), ranks)

    def of(inner: int, has_bias: bool) -> CheckpointPolicy:
        factors = torch.empty(3, inner), torch.empty(inner, 5)
        if has_bias:
            return policy(None, torch.ops.aten.addmm.default, torch.empty(5), *factors)
        return policy(None, torch.ops.aten.mm.default, *factors)

    by_rows = ranks == 1  # the bias of a product that is cut by rows is added behind the exchange
    assert of(32, has_bias=True) == of(32 // ranks, by_rows) == CheckpointPolicy.MUST_SAVE  # qkv and up; out
    assert of(4 * 32 // ranks, by_rows) == CheckpointPolicy.PREFER_RECOMPUTE  # down


# --- memory ---


def kept_bytes(mode: ActivationCheckpointing, attention: str) -> int:
    """Bytes that the forward pass keeps, without the weights."""
    model = build(mode, attention=attention)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with saved_storages() as kept:
        loss_of(model)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@pytest.mark.parametrize("attention", ["dense", "banded"])
def test_more_checkpointing_keeps_less(attention: str) -> None:
    none, every_2, full = (kept_bytes(mode, attention) for mode in ("none", {"every": 2}, "full"))
    assert none > every_2 > full
    # A block without checkpointing keeps well over ten times its input; with it, its input.
    stream = 3 * LENGTH * 32 * 4
    assert none - every_2 > 2 * 10 * stream
    assert every_2 - full > 2 * 10 * stream


def held_bytes(mode: ActivationCheckpointing, attention: str) -> int:
    """Bytes that the forward pass takes from the allocator and does not give back, by PyTorch's profiler."""
    model = build(mode, attention=attention)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = loss_of(model)
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert loss.requires_grad  # the graph was alive until here
    return held


def test_selective_keeps_less_than_none_and_more_than_full() -> None:
    none, selective, full = (held_bytes(mode, "dense") for mode in ("none", "selective", "full"))
    stream = 3 * LENGTH * 32 * 4
    # Not kept: both LayerNorms' outputs, GELU's of four widths.
    assert none - selective > LAYERS * 4 * stream
    # Kept besides the input: queries, keys and values; attention's and its projection's output; four widths inside the
    # MLP; and not the MLP's output.
    assert LAYERS * 9 * stream < selective - full < LAYERS * 9.9 * stream


# --- no checkpointing ---


@pytest.mark.parametrize("mode", MODES, ids=NAMES)
def test_passes_without_gradients_or_with_a_cache_run_once(
    mode: ActivationCheckpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = activation_checkpointing.checkpoint

    def spy(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        return real(*arguments, **settings)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", spy)
    untouched, model = build("none"), build(mode)
    tokens = torch.randint(301, (2, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = untouched(tokens)
        assert torch.equal(model(tokens), expected)
    assert not calls
    # Gradients are on, but each token may be written to the cache only once.
    cache = KeyValueCache(model.config, torch.zeros(2, dtype=torch.long), torch.float32)
    logits = model(tokens, cache=cache)
    assert cache.length == 8
    torch.testing.assert_close(logits, expected[:, -1:], rtol=1e-4, atol=1e-5)
    assert not calls
    loss_of(model)
    assert len(calls) == {"none": 0, "full": LAYERS, "every 2": 2, "selective": LAYERS}[NAMES[MODES.index(mode)]]
