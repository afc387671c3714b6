"""Few-shot prompts, and what is left out of them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.data.tokenizer import encode, gpt2
from megagpt.evaluation.sequences import fitted, pair
from megagpt.evaluation.shots import draw, prompt
from megagpt.evaluation.task import Item, Task, options
from megagpt.evaluation.tasks import TASKS
from tests.evaluation.conftest import POSITIONS, write
from tests.evaluation.schemas import ROWS
from tests.evaluation.test_evaluate import Theirs, evaluate


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"context": f"\n\nQ: {i} + 1?\n\nA:", "completion": f" {i + 1}"} for i in range(first, first + count)]


def item(text: str) -> Item:
    return options(text, ["yes"], 0)


def test_a_draw_depends_on_its_seed_alone() -> None:
    pool = [item(str(i)) for i in range(50)]
    first = draw(pool, pool[7], 5, "0/copa/7")
    assert first == draw(list(pool), pool[7], 5, "0/copa/7")
    assert first != draw(pool, pool[7], 5, "1/copa/7") != draw(pool, pool[7], 5, "1/copa/8")
    assert len(set(first)) == 5


def test_a_row_is_never_its_own_example() -> None:
    pool = [item("a"), item("a"), item("b"), item("c")]
    for i in range(50):
        assert sorted(draw(pool, pool[0], 2, str(i))) == [item("b"), item("c")]


def test_prompts_have_the_papers_form(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "two_digit_addition.jsonl", rows(6))
    write(
        tmp_path / "reversed_words.jsonl", [{"context": f"\n{w[::-1]} =", "completion": f" {w}"} for w in ("ab", "cd")]
    )
    write(tmp_path / "lambada.jsonl", [{"text": "I saw Bob"}, {"text": "We met Eve"}])
    results, _ = evaluate(folder, tmp_path, "reversed_words,lambada", "--shots", "1")
    assert [result["details"]["first_prompt"] for result in results] == [
        "Please unscramble the letters into a word, and write that word:\ndc = cd\nba =",
        "Fill in blank:\n\nWe met ____. -> Eve\n\nFill in blank:\n\nI saw ____. ->",
    ]
    (result,), _ = evaluate(folder, tmp_path, "arithmetic_2da", "--shots", "2", "--limit", "1")
    before, _, own = result["details"]["first_prompt"].rpartition("\n\nQ: ")
    assert before.count("\n\nQ: ") == 2
    assert own.endswith(" + 1?\n\nA:")
    assert own not in before


def test_examples_come_from_the_training_rows(folder: Path, theirs: Theirs, tmp_path: Path) -> None:
    """And the likelihoods are those of the whole prompt."""
    _, row, *_ = ROWS["winogrande"]
    write(tmp_path / "winogrande_val.jsonl", [row])
    train = [{"sentence": "Al hit _ .", "option1": "Bo", "option2": "Cy", "answer": "1"}]
    write(tmp_path / "winogrande_train.jsonl", train)
    (result,), (found,) = evaluate(folder, tmp_path, "winogrande", "--shots", "1")
    assert result["details"]["first_prompt"] == "Al hit Bo .\n\nAnn met Eve as Ann"
    assert result["details"]["shots_from"] == [str(tmp_path / "winogrande_train.jsonl")]
    expected = [theirs(f"Al hit Bo .\n\nAnn met Eve as {name}", " was old.")[0] for name in ("Ann", "Eve")]
    assert [option["log_likelihood"] for option in found["options"]] == pytest.approx(expected, abs=1e-4)
    other = write(tmp_path / "other.jsonl", [{**train[0], "answer": "2"}])
    (result,), _ = evaluate(folder, tmp_path, "winogrande", "--shots", "1", "--shots-from", str(other))
    assert result["details"]["first_prompt"].startswith("Al hit Cy .")


def test_training_rows_with_an_empty_answer_are_no_examples(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Callable[..., str]
) -> None:
    """Published ones have some. An empty option that is wrong is not shown, so it is no reason to leave a row out."""
    empty = {"goal": "e", "sol1": " ", "sol2": "x", "label": 0}
    path = write(tmp_path / "piqa_train.jsonl", [*[empty] * 30, {**empty, "goal": "t", "label": 1}])
    write(tmp_path / "piqa.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}])
    (result,), _ = evaluate(folder, tmp_path, "piqa", "--shots", "1")
    assert result["details"]["first_prompt"] == "t x\n\ng"
    assert result["details"]["shots_unfit"] == 30
    assert "piqa: 30 rows with an empty answer are no examples" in capsys.readouterr().out
    command = ["evaluate", str(folder), "--data", str(tmp_path), "--tasks", "piqa", "--shots"]
    refusal([*command, "2"], "piqa: 2 shots: there are only 1 rows")
    write(path, [{**empty, "label": -1}])
    refusal([*command, "1"], f"{path} line 1: 'label' is -1")


def test_a_limit_changes_no_rows_examples(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "two_digit_addition.jsonl", rows(12))
    _, every = evaluate(folder, tmp_path, "arithmetic_2da", "--shots", "2")
    _, few = evaluate(folder, tmp_path, "arithmetic_2da", "--shots", "2", "--limit", "3")
    for line in few:
        whole = every[line["row"]]["options"][0]["log_likelihood"]
        assert line["options"][0]["log_likelihood"] == pytest.approx(whole, abs=1e-4)


def test_whole_examples_are_left_out_before_anything_is_cut(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "two_digit_addition.jsonl", rows(9))
    (result,), _ = evaluate(folder, tmp_path, "arithmetic_2da", "--shots", "8")
    task, solved = TASKS["arithmetic_2da"], [options(r["context"], [r["completion"].strip()], 0) for r in rows(9)]
    assert isinstance(task, Task)
    length = len(gpt2().encode_ordinary(solved[0].solved))
    fits = (POSITIONS + 1) // length - 1
    assert 0 < fits < 8
    assert result["dropped_shots"] == 9 * (8 - fits)
    assert result["cut_rows"] == 0
    found = prompt(task, solved[0], solved[1:], POSITIONS, "here")
    assert found.context == "".join(example.solved for example in solved[9 - fits :]) + rows(1)[0]["context"]


@pytest.mark.parametrize("name", ["hellaswag", "lambada", "arithmetic_2da", "reversed_words"])
def test_prompts_have_the_tokens_of_their_whole_text(name: str) -> None:
    """At every length of the model, also if examples begin or end in white space; each example is encoded once."""
    task, start = TASKS[name], "" if TASKS[name].source.names[0].startswith("hella") else "\n"
    assert isinstance(task, Task)
    for odd in ("", " ", "\n", "\n\n", "  x"):
        examples = [Item(((f"{start}It's {i}", f" cat{i}{odd if i == 2 else ''}"),)) for i in range(5)]
        item = Item(((f"{start}A dog", " isn't"), (f"{start}A dog", " sits there\n")))
        asked: list[str] = []

        def counted(text: str, asked: list[str] = asked) -> Any:
            asked.append(text)
            return encode(text)

        dropped = set()
        for positions in range(8, 70):
            found = prompt(task, item, examples, positions, "here", functools.cache(counted))
            dropped.add(found.dropped)
            before = found.context.removesuffix(item.pairs[0][0])
            whole = [pair(before + context, continuation) for context, continuation in item.pairs]
            assert found.group == [fitted(tokens, positions, "here") for tokens in whole]
            if found.dropped:  # one more would not fit
                more = f"{examples[found.dropped - 1].solved}{task.separator}"
                longer = task.instruction + more + before.removeprefix(task.instruction) + item.pairs[1][0]
                assert len(encode(longer + item.pairs[1][1])) > positions + 1
        assert dropped == set(range(6))
        cached = functools.cache(counted)
        asked.clear()
        for _ in range(3):
            prompt(task, item, examples, 999, "here", cached)
        assert len(asked) == len(set(asked)) <= len(examples) + 1


def test_the_papers_number_of_shots(folder: Path, tmp_path: Path) -> None:
    train = [{"query": f"q{i}", "choices": ["a", "b"], "gold": 0} for i in range(60)]
    write(tmp_path / "piqa_train.jsonl", train)
    write(tmp_path / "piqa.jsonl", [{"query": "q", "choices": ["c", "d"], "gold": 0}])
    write(tmp_path / "wikitext2.jsonl", [{"text": "A cat ."}])
    results, _ = evaluate(folder, tmp_path, "piqa,wikitext2", "--shots", "paper")
    assert [result["shots"] for result in results] == [50, 0]


def test_too_few_rows_and_missing_ones_are_refused(folder: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    write(tmp_path / "two_digit_addition.jsonl", rows(4))
    write(tmp_path / "piqa.jsonl", [{"query": "q", "choices": ["c", "d"], "gold": 0}])
    command = ["evaluate", str(folder), "--data", str(tmp_path), "--tasks"]
    refusal([*command, "arithmetic_2da", "--shots", "4"], "arithmetic_2da: 4 shots: there are only 3 rows", "--shots")
    refusal([*command, "piqa", "--shots", "2"], "piqa: ", "no training rows", "piqa_train.jsonl", "--shots-from")
    refusal([*command, "piqa", "--shots", "2", "--shots-from", "none.jsonl"], "--shots-from none.jsonl: no such file")
    refusal([*command, "text:book.txt"], "text:book.txt: no such file")
