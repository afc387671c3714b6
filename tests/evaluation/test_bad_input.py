"""Models, tasks and rows that are refused, each in one line."""

import gzip
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import make_parser
from megagpt.commands.options import parse
from tests.evaluation.conftest import hellaswag, write
from tests.evaluation.schemas import ROWS

GOOD = hellaswag(3, longest=5)


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> list[str]:
    return ["evaluate", str(folder), "--data", str(tmp_path), "--tasks"]


@pytest.mark.parametrize(
    ("task", "row", "parts"),
    [
        ("hellaswag", {"question": "x", "label": 1},
         ["line 2", "unknown schema", "question, label", "ctx + endings + label"]),
        ("hellaswag", {**GOOD[0], "label": 4}, ["line 2", "'label' is 4, not one of 0 to 3"]),
        ("hellaswag", {**GOOD[0], "label": ""}, ["line 2", "'label' is ''", "validation split"]),
        ("hellaswag", {**GOOD[0], "label": None}, ["'label' is None"]),
        ("hellaswag", {**GOOD[0], "label": True}, ["'label' is True"]),
        ("hellaswag", {**GOOD[0], "label": "1.0"}, ["'label' is '1.0'"]),
        ("hellaswag", {**GOOD[0], "endings": "four"}, ["line 2", "'endings' is 'four', not a list of texts"]),
        ("hellaswag", {**GOOD[0], "endings": ["a", 3]}, ["'endings' is ['a', 3]"]),
        ("hellaswag", {**GOOD[0], "endings": []}, ["'endings' is []"]),
        ("hellaswag", {**GOOD[0], "ctx": None}, ["'ctx' is None, not text"]),
        ("hellaswag:harness", GOOD[0], ["line 1", "ctx_a + ctx_b"]),
        ("hellaswag:gpt3", {**GOOD[0], "endings": ["a", "[title]"]}, ["line 2: option 2 of 2 is empty"]),
        ("lambada", {"text": "word"}, ["line 2", "no last word"]),
        ("winogrande", {**ROWS["winogrande"][1], "sentence": "no blank"}, ["no blank _"]),
        ("winogrande", {**ROWS["winogrande"][1], "answer": ""}, ["'answer' is ''", "1 to 2"]),
        ("wsc273", {**ROWS["wsc273"][1], "pronoun_loc": 3}, ["no 'her' at 'pronoun_loc' 3"]),
        ("copa", {**ROWS["copa"][1], "question": "why"}, ["'question' is 'why'"]),
        ("arc_easy", {**ROWS["arc_easy"][1], "answerKey": "E"}, ["'answerKey' is 'E', not one of 1, 2"]),
        ("arc_easy", {**ROWS["arc_easy"][1], "choices": {"text": ["a"], "label": []}}, ["'label' is []"]),
        ("arithmetic_2da", {"context": "Q", "completion": " "}, ["line 2: the answer is empty"]),
        ("lambada", {"context": "Q", "continuation": ""}, ["line 2: the answer is empty"]),
        ("piqa", {"goal": "g", "sol1": "", "sol2": "x", "label": 1}, ["line 2: option 1 of 2 is empty"]),
    ],
)  # fmt: skip
def test_damaged_rows_are_named_by_file_and_line(
    task: str, row: dict[str, Any], parts: list[str], command: list[str], tmp_path: Path, refusal: Callable[..., str]
) -> None:
    good = GOOD[0] if task.startswith("hellaswag") else ROWS[task][1]
    name = {"arithmetic_2da": "two_digit_addition"}.get(task, task.partition(":")[0])
    path = write(tmp_path / f"{name}.jsonl", [good, row])
    refusal([*command, task], str(path), *parts)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("copa.jsonl", b"{}\n", ["copa.jsonl line 1", "unknown schema: found the keys none"]),
        ("copa.jsonl", b"{}\n\n{no", ["copa.jsonl line 3: not JSON"]),
        ("copa.jsonl", b'{"premise": "x"', ["line 1: not JSON"]),
        ("copa.jsonl", b"[1]\n", ["line 1: [1] is not an object"]),
        ("copa.jsonl", b'{"premise": "\xff"}', ["line 1: not JSON", "UnicodeDecodeError"]),
        ("copa.jsonl", b"", ["holds no row"]),
        ("copa.json", b"[{}, 3]", ["copa.json row 2: 3 is not an object"]),
        ("copa.json", b"[{}", ["copa.json: not JSON"]),
        ("copa.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], ["corrupt compression"]),
        ("copa.parquet", b"PAR1", ["corrupt, or not a parquet file"]),
        ("copa.jsonl", b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
        ("ptb.txt", b"\xff\xfe", ["not UTF-8"]),
    ],
)  # fmt: skip
def test_damaged_files_are_named(
    name: str, content: bytes, parts: list[str], command: list[str], tmp_path: Path, refusal: Callable[..., str]
) -> None:
    (tmp_path / name).write_bytes(content)
    refusal([*command, name.partition(".")[0]], name, *parts)


def test_tasks_folders_and_files_that_are_missing_are_named(
    folder: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    evaluate, data = ["evaluate", str(folder)], ["--data", str(tmp_path)]
    refusal([*evaluate, "--tasks", "helaswag", *data], "'helaswag' does not exist", "did you mean hellaswag")
    line = refusal([*evaluate, "--tasks", "gsm8k", *data], "'gsm8k' does not exist", "lm-evaluation-harness")
    given = parse(make_parser(), shlex.split(line.split("`")[1])[1:])
    assert (given.harness, given.tasks) == (True, "gsm8k")
    refusal([*evaluate, "--tasks", ",", *data], "task '' does not exist")
    refusal([*evaluate, "--tasks", "copa", *data], str(tmp_path), "copa_val.jsonl", "aps/super_glue/copa/validation-*")
    write(tmp_path / "arc_easy_val.jsonl", [ROWS["arc_easy"][1]])  # the exam is the test split
    refusal([*evaluate, "--tasks", "arc_easy", *data], str(tmp_path), "looked for arc_easy_test.jsonl", "found none")
    refusal([*evaluate, *data], str(tmp_path), "holds no exam rows")
    refusal([*evaluate, "--data", str(tmp_path / "no")], "no such folder")
    refusal([*evaluate, "--tasks", "copa", "--data", str(folder / "config.json")], "no folder, but a file")
    write(tmp_path / "copa.jsonl", [ROWS["copa"][1]])
    refusal([*evaluate, *data, "--shots-from", "no.jsonl"], "--shots-from is for solved examples; add --shots K")
    refusal([*evaluate, *data, "--shots", "0", "--seed", "0"], "--seed is for solved examples")
    refusal([*evaluate, *data, "--stride", "8"], "--stride is for texts", "text:FILE")
    refusal([*evaluate, *data, "--json", str(tmp_path)], f"--json {tmp_path}: is a folder")
    refusal([*evaluate, *data, "--rows", str(tmp_path / "no" / "x")], "--rows ", "is no folder")


def test_folders_that_are_no_model_are_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    write(tmp_path / "copa.jsonl", [ROWS["copa"][1]])
    rest = ["--data", str(tmp_path)]
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    for name in ("runs", "runs/mine/checkpoints"):
        refusal(["evaluate", str(tmp_path / name), *rest], f"; name {tmp_path / 'runs' / 'mine'}")
    refusal(["evaluate", *rest], "no model is named", "such as runs/gpt2_124m or gpt2")
    refusal(["evaluate", str(tmp_path), *rest], str(tmp_path), "config.json", "checkpoints/")
    refusal(["evaluate", str(tmp_path / "no"), *rest], "no such folder")
    refusal(["evaluate", str(tmp_path / "copa.jsonl"), *rest], "a file")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refusal(["evaluate", str(tmp_path), *rest], "config.json", "llama")


def test_a_row_that_leaves_no_room_for_a_context_is_named(
    command: list[str], tmp_path: Path, refusal: Callable[..., str]
) -> None:
    path = write(tmp_path / "piqa.jsonl", [{"query": "q", "choices": ["a", "cat " * 49], "gold": 0}])
    refusal([*command, "piqa"], f"{path} line 1", "the continuation has 5", "48 positions", "no room")


@pytest.mark.parametrize(
    "options", [["--shots", "-1"], ["--shots", "few"], ["--limit", "0"], ["--stride", "0"], ["--seed", "x"]]
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], command: list[str], refusal: Callable[..., str]
) -> None:
    refusal([*command, "copa", *options], f"argument {options[0]}: {options[1]!r}")
