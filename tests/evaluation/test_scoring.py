"""Packed sequences, rigged models, and the operations that an exam takes."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megagpt.data.tokenizer import END_OF_TEXT, gpt2
from megagpt.evaluation.exam import Exam, Settings, prepare
from megagpt.evaluation.results import Score, accuracy, best, choice, perplexity
from megagpt.evaluation.scoring import score
from megagpt.evaluation.sequences import Group, Tokens, batches, pack, pair
from megagpt.evaluation.task import options
from megagpt.evaluation.tasks import TASKS
from megagpt.models.gpt import GPT
from megagpt.models.packing import Packing
from megagpt.models.presets import ModelConfig
from megagpt.world import World
from tests.evaluation.conftest import hellaswag, write
from tests.models.test_attention import random_model

ALONE = World.alone("cpu")


def groups(count: int, vocabulary: int, seed: int = 0) -> list[Group]:
    """Random groups: options behind one context, contexts of one continuation, single sequences, cut ones."""
    g = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [g.randrange(vocabulary) for _ in range(g.randint(low, high))]

    found = []
    for i in range(count):
        context, answer = ids(1, 9), ids(1, 5)
        if i % 3 == 0:
            found.append([Tokens([*context, *ids(1, 6)], len(context)) for _ in range(4)])
        elif i % 3 == 1:
            beginnings = [[*context, *ids(1, 3)] for _ in range(2)]
            found.append([Tokens([*begin, *answer], len(begin)) for begin in beginnings])
        else:
            found.append([Tokens([*ids(1, 4), *answer], 1), Tokens([*ids(1, 4), *answer], 1)])
    return found


@pytest.mark.parametrize("attention", ["dense", "banded"])
def test_packed_sequences_have_the_likelihoods_of_single_ones(attention: str) -> None:
    """Of banded layers, too, whose band is about positions, not places in the pack."""
    config = ModelConfig(4, 32, 4, 24, vocab_size=60, attention=attention, window=4)  # type: ignore[arg-type]
    model, asked = random_model(config), groups(30, 60)
    with torch.no_grad():
        found = score(model, asked, ALONE, batch_tokens=60)
        assert found is not None
        for group, scores in zip(asked, found, strict=True):
            for (ids, first, _), ours in zip(group, scores, strict=True):
                logits = model(torch.tensor([ids[:-1]]))[0, first - 1 :].double()
                expected = logits.log_softmax(-1)[range(len(ids) - first), ids[first:]]
                assert ours.log_likelihood == pytest.approx(float(expected.sum()), abs=2e-5)
                assert ours.tokens == len(ids) - first
                assert ours.greedy == (logits.argmax(-1).tolist() == ids[first:])


def test_texts_become_tokens_as_in_lm_evaluation_harness() -> None:
    encode = gpt2().encode_ordinary
    assert pair("A cat", " ran") == Tokens(encode("A cat ran"), 2)
    assert pair("Answer: ", "yes") == pair("Answer:", " yes"), "white space belongs to the answer"
    assert pair("", "yes") == Tokens([END_OF_TEXT, *encode("yes")], 1)
    assert pair(" \n", "yes").ids[0] == END_OF_TEXT
    assert END_OF_TEXT not in pair("A <|endoftext|>", " b").ids, "text that spells it is text"


def test_batches_hold_whole_packs_within_the_budget() -> None:
    packs = [p for i, group in enumerate(groups(40, 60)) for p in pack(group, i)]
    found = batches(packs, 50)
    assert sorted(i for batch in found for i in batch) == list(range(len(packs)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(len(packs[i].ids) for i in batch) <= 50
    assert len(found) < len(packs)


class Rigged(nn.Module):
    """Each token is worth what a table says, in its own way a language model."""

    def __init__(self, worth: dict[int, float], otherwise: float) -> None:
        super().__init__()
        self.worth, self.otherwise = worth, otherwise

    def forward(self, tokens: Tensor, targets: Tensor, packing: Packing) -> Tensor:
        values = [self.worth.get(token, self.otherwise) for token in targets.tolist()]
        return torch.tensor([values, [1.0] * len(values)], dtype=torch.float64)


def exam(folder: Path, rows: list[dict[str, object]]) -> Exam:
    write(folder / "hellaswag.jsonl", rows)
    return prepare(TASKS["hellaswag"], Settings(str(folder)), 1024, ALONE)


def values(asked: Exam, model: nn.Module) -> dict[str, float]:
    held = asked.hold(model, ALONE)
    assert held is not None
    return {value.name: value.value for value in held[0].values}


def test_a_model_that_knows_the_answers_scores_100_percent(tmp_path: Path) -> None:
    rows = hellaswag(60)
    for row in rows:
        row["endings"] = [text.replace("Zanzibar", "dog") for text in row["endings"]]
        row["endings"][row["label"]] = "Zanzibar"
    worth = dict.fromkeys(gpt2().encode_ordinary(" Zanzibar"), -0.1)
    assert values(exam(tmp_path, rows), Rigged(worth, -3.0)) == {"mean_token": 1.0, "sum": 1.0}
    rows = [{**row, "label": (row["label"] + 1) % 4} for row in rows]
    assert values(exam(tmp_path, rows), Rigged(worth, -3.0)) == {"mean_token": 0.0, "sum": 0.0}


def test_a_model_that_likes_length_scores_what_a_count_says(tmp_path: Path) -> None:
    rows = hellaswag(200)
    counts = [[len(gpt2().encode_ordinary(f" {text}")) for text in row["endings"]] for row in rows]
    longest = [row["label"] == each.index(max(each)) for row, each in zip(rows, counts, strict=True)]
    shortest = [row["label"] == each.index(min(each)) for row, each in zip(rows, counts, strict=True)]
    first = [row["label"] == 0 for row in rows]
    asked = exam(tmp_path, rows)
    liked = values(asked, Rigged({}, 1.0))
    assert liked == {"sum": sum(longest) / 200, "mean_token": sum(first) / 200}, "of equal options, the first"
    assert values(asked, Rigged({}, -1.0))["sum"] == sum(shortest) / 200


def test_a_random_model_scores_at_chance(tmp_path: Path) -> None:
    asked = exam(tmp_path, hellaswag(400))
    g = random.Random(0)
    worth = {token: -g.random() for token in range(50257)}
    for value in values(asked, Rigged(worth, 0.0)).values():
        assert abs(value - 1 / 4) < 3 * math.sqrt(3 / 16 / 400)


def test_scores_choose_by_their_definition() -> None:
    item = options("c", ["aa", "bbbb", "é"], 0)
    scores = [Score(-4.0, 1, False), Score(-6.0, 3, False), Score(-3.5, 1, False)]
    without = [Score(-9.0, 1, False), Score(-6.5, 3, False), Score(-3.0, 1, False)]
    names = ("sum", "mean_token", "mean_char", "mean_byte", "unconditional")
    assert [choice(name, item, scores, without) for name in names] == [2, 1, 1, 1, 0]
    assert best([1.0, 2.0, 2.0]) == 1
    assert accuracy([True]) == (1.0, None)
    value, error = perplexity([-1.0, -3.0])
    assert value == pytest.approx(math.exp(2))
    assert error == pytest.approx(math.exp(2) * math.sqrt(2) / math.sqrt(2))


def test_an_exam_takes_few_more_operations_than_the_least(tmp_path: Path) -> None:
    """The least: each block over each different token once, and the head at each scored token."""
    config = ModelConfig(layers=3, width=128, heads=2, context=512)
    asked = exam(tmp_path, hellaswag(40))
    model = GPT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert asked.hold(model, ALONE) is not None
    fed, scored = 0, 0
    for group in asked.groups:
        fed += len({tuple(ids[: i + 1]) for ids, _, _ in group for i in range(len(ids) - 1)})
        scored += sum(len(ids) - first for ids, first, _ in group)
    least = 2 * (fed * config.layers * 12 * config.width**2 + scored * config.padded_vocab_size * config.width)
    assert least <= counter.get_total_flops() < 1.05 * least


def test_the_rows_file_has_what_the_scores_come_from(folder: Path, tmp_path: Path) -> None:
    from tests.evaluation.test_evaluate import evaluate

    write(tmp_path / "hellaswag.jsonl", hellaswag(25))
    (result,), lines = evaluate(folder, tmp_path, "hellaswag")
    chosen = [best([o["log_likelihood"] / o["tokens"] for o in line["options"]]) for line in lines]
    right = [a == line["gold"] for a, line in zip(chosen, lines, strict=True)]
    assert result["values"][0]["value"] == sum(right) / 25
    assert json.loads((tmp_path / "out.json").read_text())["precision"] == "fp32"
