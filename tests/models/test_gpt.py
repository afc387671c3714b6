"""The decoder against `transformers`' GPT-2."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from megagpt.models.gpt import GPT
from megagpt.models.presets import ModelConfig

# 301 is not a multiple of 128: the table has 83 padding rows.
CONFIG = ModelConfig(layers=3, width=48, heads=4, context=24, vocab_size=301)


def random_model(config: ModelConfig, seed: int = 0) -> GPT:
    """Every parameter random, biases and LayerNorm gains too, so a swapped or forgotten one shows."""
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


def reference_of(model: GPT) -> tuple[GPT2LMHeadModel, list[tuple[str, Tensor, Tensor, bool]]]:
    """A GPT-2 of `transformers` with the same weights, and (name, ours, theirs, transposed) for each parameter."""
    c = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.context,
            n_embd=c.width,
            n_layer=c.layers,
            n_head=c.heads,
            attn_implementation="eager",
        )
    ).eval()
    stem = theirs.transformer
    pairs = [
        ("token_embedding", model.token_embedding.weight, stem.wte.weight, False),
        ("position_embedding", model.position_embedding.weight, stem.wpe.weight, False),
        ("final_norm.weight", model.final_norm.weight, stem.ln_f.weight, False),
        ("final_norm.bias", model.final_norm.bias, stem.ln_f.bias, False),
    ]
    for i, (our, their) in enumerate(zip(model.blocks, stem.h, strict=True)):
        for part, a, b, transposed in [
            ("attention_norm", our.attention_norm, their.ln_1, False),
            ("qkv", our.attention.qkv, their.attn.c_attn, True),
            ("out", our.attention.out, their.attn.c_proj, True),
            ("mlp_norm", our.mlp_norm, their.ln_2, False),
            ("up", our.mlp.up, their.mlp.c_fc, True),
            ("down", our.mlp.down, their.mlp.c_proj, True),
        ]:
            pairs.append((f"{i}.{part}.weight", a.weight, b.weight, transposed))
            pairs.append((f"{i}.{part}.bias", a.bias, b.bias, False))
    with torch.no_grad():
        for _, a, b, transposed in pairs:
            a = a[: c.vocab_size] if b is stem.wte.weight else a
            b.copy_(a.T if transposed else a)
    assert len(pairs) == len(list(model.parameters())) == len(list(theirs.parameters()))
    return theirs, pairs


def random_tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 7, 24])
def test_logits_are_those_of_transformers(length: int) -> None:
    model = random_model(CONFIG)
    theirs, _ = reference_of(model)
    tokens = random_tokens(3, length)
    with torch.no_grad():
        logits, expected = model(tokens), theirs(tokens).logits
    assert logits.shape == (3, length, 301)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("fused", [True, False], ids=["fused loss", "loss of the logits"])
def test_every_gradient_is_that_of_transformers(fused: bool) -> None:
    model = random_model(CONFIG)
    theirs, pairs = reference_of(model)
    tokens, targets = random_tokens(3, 24), random_tokens(3, 24, seed=2)
    targets[0, :5] = -100
    targets[2, 20:] = -100
    counted = int((targets != -100).sum())

    expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    if fused:
        loss = model(tokens, targets)
        assert loss.shape == ()
        assert loss.dtype == torch.float32
    else:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (loss / counted).backward()
    (expected / counted).backward()

    for name, ours, reference, transposed in pairs:
        assert ours.grad is not None, name
        assert not ours.grad.is_sparse, name
        gradient = ours.grad
        if name == "token_embedding":
            assert ours.shape[0] == 384
            assert not gradient[301:].any()
            gradient = gradient[:301]
        expected_gradient = reference.grad.T if transposed else reference.grad
        assert expected_gradient.abs().max() > 1e-4, name  # far above the tolerance, or the test says nothing
        assert (gradient - expected_gradient).abs().max() <= 1e-5, name


def test_padding_rows_change_nothing() -> None:
    model, other = random_model(CONFIG), random_model(CONFIG)
    with torch.no_grad():
        other.token_embedding.weight[301:] = 1e3
    tokens, targets = random_tokens(2, 10), random_tokens(2, 10, seed=2)
    assert torch.equal(model(tokens), other(tokens))
    a, b = model(tokens, targets), other(tokens, targets)
    assert torch.equal(a, b)
    a.backward()
    b.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_the_future_is_not_seen() -> None:
    model = random_model(CONFIG)
    tokens = random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 301
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert torch.allclose(a[:, :7], b[:, :7], atol=1e-6)
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-3


def test_a_model_built_on_the_meta_device_holds_no_memory() -> None:
    with torch.device("meta"):
        model = GPT(CONFIG)
    assert [name for name, parameter in model.named_parameters() if not parameter.is_meta] == []


def test_dropout_is_active_in_training_only() -> None:
    dropped = ModelConfig(layers=2, width=48, heads=4, context=24, vocab_size=301, dropout=0.2)
    plain = ModelConfig(layers=2, width=48, heads=4, context=24, vocab_size=301)
    model, reference = random_model(dropped), random_model(plain)
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24, seed=2)
    with torch.no_grad():
        assert torch.equal(model(tokens), reference(tokens))
        assert torch.equal(model(tokens, targets), reference(tokens, targets))
        model.train()
        assert not torch.allclose(model(tokens), model(tokens))
        reference.train()
        assert torch.equal(reference(tokens), reference(tokens))


def test_dropout_is_at_the_embedding_and_both_branches() -> None:
    config = ModelConfig(layers=1, width=64, heads=2, context=24, vocab_size=301, dropout=0.25)
    model = random_model(config).train()
    seen: dict[str, Tensor] = {}
    block = model.blocks[0]
    block.register_forward_pre_hook(lambda _, inputs: seen.update(embedded=inputs[0]))
    block.mlp_norm.register_forward_pre_hook(lambda _, inputs: seen.update(middle=inputs[0]))
    block.register_forward_hook(lambda _, inputs, output: seen.update(end=output))
    block.attention.register_forward_hook(lambda _, inputs, output: seen.update(attention=output))
    block.mlp.register_forward_hook(lambda _, inputs, output: seen.update(mlp=output))
    tokens = random_tokens(8, 24)
    with torch.no_grad():
        model(tokens)
        embedded = model.token_embedding(tokens) + model.position_embedding(torch.arange(24))
    for before, after in [
        (embedded, seen["embedded"]),
        (seen["attention"], seen["middle"] - seen["embedded"]),
        (seen["mlp"], seen["end"] - seen["middle"]),
    ]:
        kept = after.abs() > 1e-5
        assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
        torch.testing.assert_close(after[kept], before[kept] / 0.75, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("attention", ["dense", "banded"])
def test_dropout_is_at_the_attention_weights(attention: str) -> None:
    config = ModelConfig(
        layers=2, width=16, heads=2, context=64, vocab_size=301, dropout=0.25, attention=attention, window=8
    )
    module = GPT(config).blocks[1].attention
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.qkv.bias[32:] = 1.0  # all values are one, so the output is the sum of the attention weights
        module.out.weight.copy_(torch.eye(16))
        x = torch.zeros(16, 64, 16)
        torch.testing.assert_close(module.eval()(x), torch.ones(16, 64, 16))
        sums = module.train()(x)
    assert float(sums[:, 16:].std()) > 0.05
    assert float(sums.mean()) == pytest.approx(1.0, abs=0.05)
    # The first token has one weight, kept and scaled or dropped.
    first = sums[:, 0, ::8]
    assert bool(((first == 0) | ((first - 4 / 3).abs() < 1e-6)).all())
