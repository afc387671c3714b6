"""Rows for tasks of lm-evaluation-harness and for ours, and the harness's own declarations over these rows."""

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.evaluation.conftest import sentence, write

ROWS = 12
# Task of the harness -> its file among the harness's declarations, the split, our name of the rows' file.
FILES = {
    "hellaswag": ("hellaswag/hellaswag", "validation", "hellaswag"),
    "arc_easy": ("arc/arc_easy", "test", "arc_easy"),
    "piqa": ("piqa/piqa", "validation", "piqa"),
    "openbookqa": ("openbookqa/openbookqa", "test", "openbookqa"),
    "boolq": ("super_glue/boolq/default", "validation", "boolq"),
    "winogrande": ("winogrande/default", "validation", "winogrande"),
    "lambada_openai": ("lambada/lambada_openai", "test", "lambada"),
    "wikitext": ("wikitext/wikitext", "test", "wikitext2_pages"),
    "reversed_words": ("unscramble/reversed_words", "test", "reversed_words"),
}


def make(folder: Path) -> Path:
    """The folder: files of rows that both sides read, and yaml files that include the harness's own ones."""
    g = random.Random(8)
    rows, train = _rows(g), _rows(g)
    for task, (declared, split, name) in FILES.items():
        files = {split: write(folder / f"{name}.jsonl", rows[name])}
        splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
        if "train" in (tasks() / f"{declared}.yaml").read_text():
            files["train"] = write(folder / f"{name}_train.jsonl", train[name])
            splits["training_split"] = "train"
        # lm-evaluation-harness asks the rows of a test split if there is one.
        splits[f"{split}_split"] = split
        declare(folder, task, f"{tasks()}/{declared}.yaml", files, **splits)
    return folder


def _rows(g: random.Random) -> dict[str, list[dict[str, Any]]]:
    def text(low: int = 1, high: int = 9) -> str:
        return sentence(g, low, high)

    def choices(*labels: str) -> dict[str, list[str]]:
        return {"text": [text(1, 4) for _ in labels], "label": list(labels)}

    numbers = range(ROWS)
    return {
        # Every fifth context is longer than the model.
        "hellaswag": [
            {
                "ind": i, "activity_label": text(1, 2), "ctx_a": f"{text(2, 9 if i % 5 else 60)} [title] {text()}.",
                "ctx_b": text(1, 2), "ctx": "-", "endings": [f"{text()} [step] {text()}." for _ in range(4)],
                "label": str(g.randrange(4)),
            }
            for i in numbers
        ],
        "arc_easy": [
            {"question": f"{text()}?", "choices": choices("A", "B", "C"), "answerKey": g.choice("ABC")}
            for _ in numbers
        ],
        "piqa": [{"goal": text(), "sol1": text(), "sol2": text(), "label": g.randrange(2)} for _ in numbers],
        "openbookqa": [
            {"question_stem": text(), "choices": choices("A", "B"), "answerKey": g.choice("AB")} for _ in numbers
        ],
        "boolq": [{"passage": text(), "question": text(), "label": g.randrange(2)} for _ in numbers],
        "winogrande": [
            {"sentence": f"{text()} _ {text()}", "option1": text(1, 1), "option2": text(1, 3), "answer": g.choice("12")}
            for _ in numbers
        ],
        "lambada": [{"text": text(3, 12)} for _ in numbers],
        # One page is shorter than the model, the others are longer.
        "wikitext2_pages": [
            {"page": f" = {text()} = \n {text(*size)} , {text()} . \n"} for size in ((1, 3), (90, 99), (9, 60))
        ],
        "reversed_words": [{"context": f"\n{word[::-1]} =", "completion": f" {word}"} for word in ("42", "cat")],
    }  # fmt: skip


def tasks() -> Path:
    """The folder of the harness's declarations."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def declare(folder: Path, task: str, include: str, files: dict[str, Path], **more: Any) -> None:
    """A task like that of another yaml file, with rows from files."""
    named = {split: str(path) for split, path in files.items()}
    lines = {
        "include": include, "task": task, "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": named}, **more,
    }  # fmt: skip
    (folder / f"{task}.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))
