"""A small GPT-2 of `transformers`, and files of exam rows."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megagpt.data.tokenizer import END_OF_TEXT, gpt2
from tests.models.folders import randomize

POSITIONS = 48
WORDS = (
    "the", "a", "cat", "dog", "sits", "runs", "under", "over", "old", "new", "tree", "house", "and", "but", "slowly",
    "gladly", "red", "Zanzibar", "42", "isn't",
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4)).eval()
    randomize(model)
    path = tmp_path_factory.mktemp("theirs") / "gpt2"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def theirs(folder: Path) -> Callable[[str, str], tuple[float, bool]]:
    """(context, continuation) -> log-likelihood of the continuation in float64 by `transformers`, one sequence a
    forward pass, and whether each of its tokens was the likeliest."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()

    def reference(context: str, continuation: str) -> tuple[float, bool]:
        before = gpt2().encode_ordinary(context) or [END_OF_TEXT]
        ids = before + gpt2().encode_ordinary(continuation)
        count = len(ids) - len(before)
        ids = ids[-(POSITIONS + 1) :]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, -count:].double()
        target = torch.tensor(ids[-count:])[:, None]
        found = logits.log_softmax(-1).gather(1, target)
        return float(found.sum()), bool((logits.argmax(-1, keepdim=True) == target).all())

    return reference


def sentence(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


def hellaswag(count: int, longest: int = 14) -> list[dict[str, Any]]:
    """Rows of HellaSwag's schema; some contexts are longer than the model."""
    g = random.Random(5)
    return [
        {
            "activity_label": sentence(g, 1, 2), "ctx": sentence(g, 2, longest if i % 5 else 60),
            "endings": [sentence(g, 1, 12) for _ in range(4)], "label": g.randrange(4),
        }
        for i in range(count)
    ]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as jsonl, jsonl.gz or parquet, by the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
