"""A model in parts, each on one of several tensor ranks, against the whole model in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagpt.engines.flat_shard import parts_of
from megagpt.generation import generate
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize
from megagpt.models.loss import linear_cross_entropy
from megagpt.models.presets import ModelConfig
from megagpt.models.tensor_parallel import TensorRanks, split_of
from megagpt.models.tensor_softmax import tensor_softmax
from megagpt.world import join
from tests.processes import run_ranks

CONFIGS = {
    "dense": ModelConfig(layers=2, width=32, heads=4, context=16, vocab_size=300),
    "banded": ModelConfig(layers=2, width=32, heads=4, context=16, vocab_size=300, attention="banded", window=4),
}
SIZES = (2, 4)
# One group: all tests read one start of four ranks.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tensor parallel")]


def part_of(whole: GPT, ranks: TensorRanks) -> GPT:
    """The part of a model that one of the tensor ranks has."""
    part, values = GPT(whole.config, ranks), dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(own(name, values[name], parameter, ranks))
    return part


def own(name: str, whole: Tensor, part: Tensor, ranks: TensorRanks) -> Tensor:
    """The elements of a whole tensor that a rank's part of it has."""
    shape, boxes = parts_of(name, tuple(part.shape), ranks)
    assert shape == tuple(whole.shape)
    return torch.cat([whole[box.place] for box in boxes])


def sequences(config: ModelConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (3, config.context + 1), generator=generator)
    tokens[0, 5] = config.vocab_size - 1  # a row of the last rank
    targets = tokens[:, 1:].clone()
    targets[1, 3:9] = -100
    return tokens[:, :-1], targets


def largest(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest element."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def compare_models(config: ModelConfig, ranks: TensorRanks) -> dict[str, Any]:
    """Differences of a model in parts from the whole one."""
    whole = GPT(config)
    initialize(whole, config, seed=1)
    part = part_of(whole, ranks)
    tokens, targets = sequences(config)
    losses = [model(tokens, targets) for model in (whole, part)]
    for loss in losses:
        loss.backward()
    found: dict[str, Any] = {"loss": largest(losses[1].detach(), losses[0].detach())}
    # A whole model's sparse gradient of the table is dense after the head's was added.
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    for name, parameter in part.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if not split_of(name):
            gradient = ranks.all_reduce(gradient)
        expected = gradients[name]
        assert expected is not None
        found[f"gradient of {name}"] = largest(gradient, own(name, expected, gradient, ranks))
    with torch.no_grad():
        found["logits"] = largest(part(tokens), whole(tokens))
        # Samples with rows of two lengths, past the context.
        prompts = [[1, 2, 3], [4]]
        texts = [generate(model, config, prompts, 20, temperature=t) for t in (0, 1) for model in (part, whole)]
        found["samples"] = float(texts[0] != texts[1] or texts[2] != texts[3])
    return found


def compare_softmax(ranks: TensorRanks, compiled: bool) -> dict[str, float]:
    """Differences of loss and gradients from float64, for vocabularies that leave some ranks without a live row."""
    found = {}
    for vocab_size, rows in ((20, 128), (257, 384), (500, 512)):
        generator = torch.Generator().manual_seed(vocab_size)
        hidden, weight = (torch.randn(n, 24, generator=generator) for n in (40, rows))
        targets = torch.randint(vocab_size, (40,), generator=generator)
        targets[::3], targets[1] = -100, vocab_size - 1
        h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
        expected = F.cross_entropy((h @ w.T)[:, :vocab_size], targets, reduction="sum")
        expected.backward()
        mine, table = hidden.clone().requires_grad_(), weight.chunk(ranks.size)[ranks.rank].clone().requires_grad_()
        softmax = tensor_softmax(ranks)
        softmax = torch.compile(softmax, dynamic=False, backend="aot_eager") if compiled else softmax
        loss = linear_cross_entropy(mine, table, targets, vocab_size, softmax)
        loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        assert mine.grad is not None
        assert table.grad is not None
        total = ranks.all_reduce(mine.grad)
        found[f"loss of {vocab_size}"] = largest(loss.detach(), expected.detach())
        found[f"hidden of {vocab_size}"] = largest(total, h.grad)
        difference = (table.grad.double() - w.grad.chunk(ranks.size)[ranks.rank]).abs().max()
        found[f"table of {vocab_size}"] = float(difference / w.grad.abs().max())
        dead = table.grad[max(0, vocab_size - ranks.rank * len(table)) :]
        found[f"dead rows of {vocab_size}"] = float(dead.abs().sum())
    return found


def bf16_errors(ranks: TensorRanks) -> dict[str, float]:
    """Error of a sum of bf16 products over the ranks, and of one product of the same numbers, against float64."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 128, 4096, generator=generator).bfloat16()
    w = torch.randn(64, 4096, generator=generator).bfloat16()
    exact = (x.double() @ w.double().T).chunk(ranks.size, 1)[ranks.rank]
    inner = slice(ranks.rank * 4096 // ranks.size, (ranks.rank + 1) * 4096 // ranks.size)
    summed = ranks.reduce_scatter(x[..., inner] @ w[:, inner].T)
    assert summed.dtype == torch.float32
    one = (x @ w.T).chunk(ranks.size, 1)[ranks.rank]
    return {"summed": rms(summed, exact), "one product": rms(one, exact)}


def rms(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def work() -> list[tuple[str, dict[str, float]]]:
    """Everything that is compared, by ranks that start once."""
    results = []
    with join("cpu") as world:
        for size in SIZES:
            groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world.size, size)]
            ranks = TensorRanks.of(groups[world.rank // size])
            for name, config in CONFIGS.items():
                results.append((f"{name} {size}", compare_models(config, ranks)))
            for compiled in (False, True):
                results.append((f"softmax {size}{' compiled' * compiled}", compare_softmax(ranks, compiled)))
            results.append((f"bf16 {size}", bf16_errors(ranks)))
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, float]]]:
    """The differences, by comparison and rank."""
    of_ranks = [dict(found) for found in run_ranks(4, work)]
    return {name: [found[name] for found in of_ranks] for name in of_ranks[0]}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_in_parts_computes_what_the_whole_one_does(results: Any, name: str, size: int) -> None:
    for found in results[f"{name} {size}"]:
        for what, difference in found.items():
            assert difference <= 3e-6, what


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("size", SIZES)
def test_the_softmax_of_a_cut_vocabulary_is_exact(results: Any, size: int, compiled: bool) -> None:
    for found in results[f"softmax {size}{' compiled' * compiled}"]:
        for what, difference in found.items():
            assert difference <= (0 if "dead" in what else 1e-6), what


@pytest.mark.parametrize("size", SIZES)
def test_partial_sums_in_bf16_cost_no_precision(results: Any, size: int) -> None:
    """With sums that are rounded on their way, the error of 4 ranks would be 1.7 times as large."""
    for found in results[f"bf16 {size}"]:
        assert found["summed"] < 1.2 * found["one product"]
