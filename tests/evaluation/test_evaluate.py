"""`megagpt evaluate`: log-likelihoods as `transformers` has them, and scores that follow from them."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import main
from megagpt.data.tokenizer import gpt2
from megagpt.evaluation import report
from megagpt.evaluation.tasks import TASKS
from tests.evaluation.conftest import POSITIONS, hellaswag, read_lines, write
from tests.evaluation.schemas import ROWS

Theirs = Callable[[str, str], tuple[float, bool]]


def evaluate(folder: Path, data: Path, tasks: str, *options: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results and rows of a run of the command."""
    out, rows = data / "out.json", data / "rows.jsonl"
    command = ["evaluate", str(folder), "--tasks", tasks, "--data", str(data), "--json", str(out), "--rows", str(rows)]
    assert main([*command, *options]) == 0
    return json.loads(out.read_text())["results"], read_lines(rows)


@pytest.mark.parametrize("task", ROWS)
def test_a_row_of_each_schema_is_scored_as_transformers_does(
    task: str, folder: Path, theirs: Theirs, tmp_path: Path
) -> None:
    file, row, pairs, gold = ROWS[task]
    write(tmp_path / file, [row])
    (result,), (found,) = evaluate(folder, tmp_path, task)
    expected = [theirs(*pair) for pair in pairs]
    sums = [e[0] for e in expected]
    assert [option["log_likelihood"] for option in found["options"]] == pytest.approx(sums, abs=1e-4)
    assert [option["greedy"] for option in found["options"]] == [e[1] for e in expected]
    assert found["gold"] == gold
    assert [value["name"] for value in result["values"]] == list(TASKS[task].scores)  # type: ignore[union-attr]
    # The scores, computed again.
    tokens = [len(gpt2().encode_ordinary(text)) for _, text in pairs]
    without = [theirs("Answer:", text)[0] for _, text in pairs]
    by_name = {
        "sum": sums,
        "mean_token": [a / b for a, b in zip(sums, tokens, strict=True)],
        "mean_char": [a / (len(text) - 1) for a, (_, text) in zip(sums, pairs, strict=True)],
        "unconditional": [a - b for a, b in zip(sums, without, strict=True)],
    }
    for value in result["values"]:
        if value["name"] in by_name:
            options = by_name[value["name"]]
            assert value["value"] == float(options.index(max(options)) == gold)
        elif "perplexity" in value["name"]:
            assert value["value"] == pytest.approx(math.exp(-sums[0]), rel=1e-4)
        else:
            assert value["value"] == float(expected[0][1])


@pytest.mark.slow
def test_all_rows_equal_transformers_also_when_they_are_cut(
    folder: Path, theirs: Theirs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = hellaswag(40)
    write(tmp_path / "hellaswag.jsonl", rows)
    (result,), found = evaluate(folder, tmp_path, "hellaswag")
    right, cut = [], 0
    for row, line in zip(rows, found, strict=True):
        expected = [theirs(row["ctx"], f" {ending}")[0] for ending in row["endings"]]
        assert [option["log_likelihood"] for option in line["options"]] == pytest.approx(expected, abs=1e-4)
        lengths = [len(gpt2().encode_ordinary(f" {ending}")) for ending in row["endings"]]
        means = [a / b for a, b in zip(expected, lengths, strict=True)]
        right.append(means.index(max(means)) == row["label"])
        cut += len(gpt2().encode_ordinary(row["ctx"])) + max(lengths) > POSITIONS + 1
    mean = result["values"][0]
    assert mean["value"] == sum(right) / 40
    assert mean["standard_error"] == pytest.approx(statistics.stdev(map(float, right)) / 40**0.5)
    assert cut > 2
    assert (result["items"], result["cut_rows"]) == (40, cut)
    printed = capsys.readouterr().out
    assert f"{cut} rows are longer than the model and were cut on the left" in printed
    assert f"{sum(right) / 40:.4f} ± {mean['standard_error']:.4f}  40" in printed


@pytest.mark.slow
def test_batches_do_not_change_the_printed_digits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "hellaswag.jsonl", hellaswag(16))
    printed = []
    for tokens in ("1", "512", "100000"):
        capsys.readouterr()
        evaluate(folder, tmp_path, "hellaswag,hellaswag:gpt3", "--batch-tokens", tokens)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]


def test_a_limit_takes_the_same_rows_in_every_run(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "hellaswag.jsonl", hellaswag(30))
    _, every = evaluate(folder, tmp_path, "hellaswag")
    (result,), few = evaluate(folder, tmp_path, "hellaswag", "--limit", "7")
    assert (result["items"], result["of_items"]) == (7, 30)
    assert [line["row"] for line in few] == sorted(line["row"] for line in few)
    for line in few:
        whole = every[line["row"]]["options"]
        assert [o["log_likelihood"] for o in line["options"]] == pytest.approx(
            [o["log_likelihood"] for o in whole], abs=1e-4
        )
    _, more = evaluate(folder, tmp_path, "hellaswag", "--limit", "9")
    assert {line["row"] for line in few} < {line["row"] for line in more}


def test_progress_counts_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the options without their question, which are scored besides."""
    monkeypatch.setattr(report, "_PLAIN_SECONDS", -1.0)
    write(tmp_path / "arc_easy.jsonl", [{"query": f"q{i}", "choices": [f"a{i}", "b"], "gold": 0} for i in range(6)])
    evaluate(folder, tmp_path, "arc_easy")
    assert "arc_easy: 100% | 6 items |" in capsys.readouterr().out


def test_references_tell_their_shots_and_whether_the_text_is_the_same(folder: Path, tmp_path: Path) -> None:
    rows = hellaswag(3)
    write(tmp_path / "piqa.jsonl", [{"goal": f"g{i}", "sol1": "a", "sol2": "b", "label": 0} for i in range(9)])
    write(tmp_path / "piqa_train.jsonl", [{"goal": f"t{i}", "sol1": "a", "sol2": "b", "label": 0} for i in range(9)])
    for raw in (True, False):
        write(tmp_path / "hellaswag.jsonl", [{**row, **({"ctx_a": "x", "ctx_b": "y"} if raw else {})} for row in rows])
        (result,), _ = evaluate(folder, tmp_path, "hellaswag")
        same = {each["same_text"] for each in result["values"][0]["references"] if each["model"] == "gpt2-124m"}
        assert same == {raw}
    (result,), _ = evaluate(folder, tmp_path, "piqa", "--shots", "2")
    known = {each["label"]: each["shots"] for each in result["values"][0]["references"]}
    assert (known["GPT-2 124M, 10-shot"], known["GPT-3 125M, 50-shot"]) == (10, 50)


def test_without_names_the_folders_exams_are_held(folder: Path, tmp_path: Path) -> None:
    for task in ("lambada", "copa", "arithmetic_2da"):
        file, row, *_ = ROWS[task]
        write(tmp_path / file, [row, row])
    out = tmp_path / "out.json"
    assert main(["evaluate", str(folder), "--data", str(tmp_path), "--json", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert [result["task"] for result in results] == ["lambada", "copa", "arithmetic_2da"]
    assert results[0]["details"]["first_prompt"] == "She saw a cat and called the"


def test_a_copy_of_a_data_sets_folder_is_its_exam_only(folder: Path, tmp_path: Path) -> None:
    """Other data sets have files of the same paths."""
    out, part = tmp_path / "out.json", "data/validation-00000-of-00001.parquet"
    write(tmp_path / "copy" / part, hellaswag(3))
    write(tmp_path / "other" / part, [{"question": "Who?", "answer": "Eve"}])
    write(tmp_path / "other" / "piqa.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 0}])
    for data, task in (("copy", "hellaswag"), ("other", "piqa")):
        assert main(["evaluate", str(folder), "--data", str(tmp_path / data), "--json", str(out)]) == 0
        assert [result["task"] for result in json.loads(out.read_text())["results"]] == [task]


def test_the_list_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    for model in ([], ["any"]):
        assert main(["evaluate", *model, "--tasks", "list"]) == 0
        printed = capsys.readouterr().out
        assert all(f"{name} " in printed for name in TASKS)
