"""Generation with a cache against an uncached model, and the draws against their distribution."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megagpt.data.tokenizer import END_OF_TEXT
from megagpt.errors import UserError
from megagpt.generation import draw, generate
from megagpt.models.attention import KeyValueCache
from megagpt.models.gpt import GPT
from megagpt.models.presets import ModelConfig

# GPT-2's vocabulary, so that end-of-text is one of the model's tokens.
SHAPES: dict[str, ModelConfig] = {
    "dense": ModelConfig(layers=2, width=16, heads=2, context=17),
    "banded": ModelConfig(layers=2, width=16, heads=2, context=17, attention="banded", window=4),
}
PROMPTS = [[5, 17, 3], [40000], [7, 7, 50000, 1, 2, 3, 4, 900], [11] * 5]


def random_model(config: ModelConfig) -> GPT:
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.7, generator=generator).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> GPT:
    return random_model(SHAPES[request.param])


def uncached_greedy(model: GPT, prompt: Sequence[int], count: int) -> list[int]:
    """The documented rule for one row alone: a full window continues from its last context // 2 tokens."""
    window, new = list(prompt), []
    context = model.config.context
    for _ in range(count):
        if len(window) > context:
            window = window[-(context // 2) :]
        with torch.no_grad():
            token = int(model(torch.tensor([window]))[0, -1].argmax())
        window.append(token)
        new.append(token)
    # Equality proves something only if the reference varies and does not end.
    assert len(set(new)) > count // 4
    assert END_OF_TEXT not in new
    return new


def test_greedy_is_that_of_an_uncached_model(model: GPT) -> None:
    rows = generate(model, model.config, PROMPTS, 9, temperature=0)
    assert rows == [uncached_greedy(model, prompt, 9) for prompt in PROMPTS]


def test_a_full_window_slides(model: GPT) -> None:
    prompts = [*PROMPTS, list(range(100, 117)), list(range(200, 216))]  # the last two fill the context or nearly do
    rows = generate(model, model.config, prompts, 40, temperature=0)
    assert rows == [uncached_greedy(model, prompt, 40) for prompt in prompts]


def test_a_single_row_slides_the_same(model: GPT) -> None:
    for prompt in (PROMPTS[1], list(range(100, 117))):
        assert generate(model, model.config, [prompt], 30, temperature=0) == [uncached_greedy(model, prompt, 30)]


def test_the_first_tokens_do_not_depend_on_the_number(model: GPT) -> None:
    long = generate(model, model.config, PROMPTS, 12, seed=3)
    assert generate(model, model.config, PROMPTS, 5, seed=3) == [row[:5] for row in long]
    assert generate(model, model.config, PROMPTS, 0) == [[], [], [], []]


def test_a_row_does_not_depend_on_its_neighbours(model: GPT) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "seed": 4}
    together = generate(model, model.config, PROMPTS, 30, **settings)
    for row in range(4):
        others = [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]] * 4
        others[row] = PROMPTS[row]
        assert generate(model, model.config, others[: row + 1], 30, **settings)[row] == together[row]


def test_seeds_and_rows_decide_the_draws(model: GPT) -> None:
    prompts = [[5, 17, 3]] * 3
    a, again, b = (generate(model, model.config, prompts, 8, seed=seed) for seed in (0, 0, 1))
    assert a == again
    # Equal prompts get different draws, and another seed changes every row.
    assert len({tuple(row) for row in a + b}) == 6


def test_generating_touches_no_global_generator() -> None:
    model = random_model(SHAPES["dense"])
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    generate(model, model.config, PROMPTS, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_top_k_one_is_greedy(model: GPT) -> None:
    greedy = generate(model, model.config, PROMPTS, 10, temperature=0)
    assert generate(model, model.config, PROMPTS, 10, temperature=3.0, top_k=1, seed=5) == greedy
    assert generate(model, model.config, PROMPTS, 10, top_p=1e-9, seed=5) == greedy
    assert generate(model, model.config, PROMPTS, 10, temperature=1e-6, seed=5) == greedy


def test_dead_rows_of_the_vocabulary_are_never_drawn() -> None:
    model, tempting = random_model(SHAPES["dense"]), random_model(SHAPES["dense"])
    assert model.token_embedding.weight.shape[0] == 50304
    with torch.no_grad():
        # Each dead row would win most draws if it took part.
        tempting.token_embedding.weight[50257:].mul_(100)
    for temperature in (0.0, 1.0, 100.0):
        rows = generate(tempting, tempting.config, PROMPTS, 10, temperature=temperature)
        assert max(map(max, rows)) < 50257
        assert rows == generate(model, model.config, PROMPTS, 10, temperature=temperature)


def test_another_vocabulary_works() -> None:
    config = ModelConfig(layers=2, width=16, heads=2, context=16, vocab_size=200)
    model = random_model(config)
    prompts = [[5, 17, 3], [199]]
    rows = generate(model, config, prompts, 8, temperature=0)
    for prompt, row in zip(prompts, rows, strict=True):
        assert generate(model, config, [prompt], 8, temperature=0) == [row]


def test_a_context_of_one_token_works() -> None:
    config = ModelConfig(layers=1, width=16, heads=2, context=1)
    model = random_model(config)
    (row,) = generate(model, config, [[3]], 4, temperature=0)
    for token, following in zip([3, *row], row, strict=False):
        with torch.no_grad():
            assert following == int(model(torch.tensor([[token]]))[0, 0].argmax())


@pytest.mark.parametrize(
    ("prompts", "named"),
    [([[]], ["prompt 1", "0"]), ([[1], []], ["prompt 2", "0"]), ([[1], [2] * 18], ["prompt 2", "18", "17"])],
)
def test_impossible_prompts_are_refused(prompts: list[list[int]], named: list[str]) -> None:
    model = random_model(SHAPES["dense"])
    seen: list[int] = []
    with pytest.raises(UserError) as error:
        generate(model, model.config, prompts, 3, on_token=lambda row, token: seen.append(token))
    for word in named:
        assert word in str(error.value)
    assert not seen


class Scripted(nn.Module):
    """Gives scripted logits and counts its calls."""

    def __init__(self, script: Callable[[int, int], Tensor], events: list[Any]) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))
        self.script, self.events, self.calls = script, events, 0

    def forward(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        cache.length += tokens.shape[1]
        self.events.append("forward")
        logits = torch.stack([self.script(row, self.calls) for row in range(len(tokens))])
        self.calls += 1
        return logits[:, None]


def scripted(rows: list[list[int]]) -> tuple[Scripted, list[Any]]:
    def script(row: int, step: int) -> Tensor:
        logits = torch.zeros(50257)
        logits[rows[row][step]] = 1e4
        return logits

    events: list[Any] = []
    return Scripted(script, events), events


def test_end_of_text_ends_a_row() -> None:
    end = END_OF_TEXT
    assert end == 50256
    model, events = scripted([[5, end, 7, 8], [1, 2, 3, 4], [end, 9, 9, 9]])
    rows = generate(model, SHAPES["dense"], [[10], [10, 11], [12]], 4, on_token=lambda *event: events.append(event))
    assert rows == [[5], [1, 2, 3, 4], []]
    # on_token comes at each step, rows in order, and never for a row that has ended.
    assert events == ["forward", (0, 5), (1, 1), "forward", (1, 2), "forward", (1, 3), "forward", (1, 4)]


def test_generation_stops_when_all_rows_have_ended() -> None:
    end = END_OF_TEXT
    model, events = scripted([[5, end, 7, 7, 7], [end, 1, 2, 3, 4]])
    assert generate(model, SHAPES["dense"], [[10], [10]], 5) == [[5], []]
    assert events == ["forward", "forward"]


def test_the_end_of_text_in_a_prompt_does_not_end_it(model: GPT) -> None:
    prompt = [END_OF_TEXT, 5, END_OF_TEXT]
    assert generate(model, model.config, [prompt], 9, temperature=0) == [uncached_greedy(model, prompt, 9)]


def test_on_token_is_called_in_order(model: GPT) -> None:
    calls: list[tuple[int, int]] = []
    rows = generate(
        model, model.config, PROMPTS, 6, seed=2, on_token=lambda row, token: calls.append((row, token))
    )  # fmt: skip
    assert all(len(row) == 6 for row in rows)
    assert calls == [(row, rows[row][i]) for i in range(6) for row in range(4)]


def test_draws_of_many_rows_follow_the_distribution() -> None:
    probability = [0.4, 0.3, 0.2, 0.07, 0.03]
    logits = torch.tensor(probability).log()
    model = Scripted(lambda row, step: logits, [])
    rows = generate(model, SHAPES["dense"], [[1]] * 400, 10)
    drawn = np.array(rows)
    assert drawn.shape == (400, 10)
    for token, p in enumerate(probability):
        spread = math.sqrt(p * (1 - p) / drawn.size)
        assert abs((drawn == token).mean() - p) < 5 * spread
    # A row's draws are independent of the row beside it and of the step before.
    for a, b in [(drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)


def distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The probability of each token, in plain Python from the definitions of the three settings."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weight = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    total = sum(weight.values())
    nucleus: list[int] = []
    for i in order:
        nucleus.append(i)
        if sum(weight[j] for j in nucleus) / total >= top_p:
            break
    mass = sum(weight[i] for i in nucleus)
    return [weight[i] / mass if i in nucleus else 0.0 for i in range(len(logits))]


LOGITS = [0.3, 2.1, -1.7, 1.4, 0.9, -0.2, 2.6, -4.0, 1.1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 9, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6, 0.2])
def test_draws_follow_the_definitions_of_their_settings(temperature: float, top_k: int, top_p: float) -> None:
    expected = distribution(LOGITS, temperature, top_k, top_p)
    assert sum(expected) == pytest.approx(1)
    # Evenly spaced numbers instead of random ones: each token's share is exact to two parts of the grid.
    grid = 4000
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    drawn = draw(torch.tensor([LOGITS]).expand(grid, -1), uniform, temperature, top_k, top_p)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (grid,)
    share = torch.bincount(drawn, minlength=len(LOGITS)).double() / grid
    for token, p in enumerate(expected):
        assert share[token].item() == pytest.approx(p, abs=2 / grid)
        assert p > 0 or share[token] == 0


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.7)])
def test_the_ends_of_the_unit_interval_draw_allowed_tokens(top_k: int, top_p: float) -> None:
    allowed = {i for i, p in enumerate(distribution(LOGITS, 1.0, top_k, top_p)) if p > 0}
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    drawn = draw(torch.tensor([LOGITS, LOGITS]), ends, 1.0, top_k, top_p).tolist()
    assert set(drawn) <= allowed
    assert drawn[0] != drawn[1]


def test_rows_of_a_draw_have_their_own_logits() -> None:
    logits = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    middle = torch.full((3,), 0.5, dtype=torch.float64)
    for temperature in (0.0, 1.0):
        assert draw(logits, middle, temperature, 0, 1.0).tolist() == [1, 0, 2]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0]]).expand(2001, -1)
    drawn = draw(logits, torch.linspace(0, 1 - 1e-9, 2001, dtype=torch.float64), 1.0, 0, 1.0)
    assert set(drawn.tolist()) == {1, 3}
