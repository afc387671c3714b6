"""Exam rows from the Hugging Face hub, by the real client against a small hub on this machine."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.hub import Hub
from tests.evaluation.conftest import hellaswag
from tests.exchange.hub_runs import run

pytestmark = pytest.mark.slow


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def test_rows_are_fetched_once_at_one_commit(folder: Path, tmp_path: Path) -> None:
    """Both parts of the file; with shots, the training rows, too; then from the cache, without the hub."""
    rows = hellaswag(9)
    parts = {f"data/validation-0000{i}-of-00002.parquet": parquet(rows[4 * i : 4 + 5 * i]) for i in range(2)}
    files = {**parts, "data/train-00000-of-00001.parquet": parquet(hellaswag(3)), "README.md": b"a card"}
    command = ["evaluate", str(folder), "--tasks", "hellaswag", "--shots", "1", "--json", "out.json"]
    with Hub(files, "Rowan/hellaswag").running() as hub:
        variables = hub.environment(tmp_path / "home")
        code, _, error = run(variables, tmp_path, *command)
        assert code == 0, error
        first = json.loads((tmp_path / "out.json").read_text())["results"]
        assert first[0]["items"] == 9
        assert all(hub.commit in path for path in first[0]["details"]["files"] + first[0]["details"]["shots_from"])
        fetched = len([line for line in hub.requests if line.startswith("GET ") and line.endswith(".parquet")])
        assert fetched == 3
        assert run(variables, tmp_path, *command)[0] == 0
        assert len([line for line in hub.requests if line.startswith("GET ") and line.endswith(".parquet")]) == fetched
    code, _, error = run({**variables, "HF_HUB_OFFLINE": "1"}, tmp_path, *command)
    assert code == 0, error
    assert json.loads((tmp_path / "out.json").read_text())["results"] == first


def test_what_the_hub_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(folder), "--tasks", "hellaswag"]
    with Hub({"hellaswag.py": b"a script"}, "Rowan/hellaswag").running() as hub:
        variables = hub.environment(tmp_path / "home")
        code, _, error = run(variables, tmp_path, *command)
        assert code == 2
        assert "Rowan/hellaswag: has no file data/validation-*.parquet" in error
        assert "hellaswag.py" in error
        assert "--data" in error
        code, _, error = run(variables, tmp_path, "evaluate", str(folder), "--tasks", "piqa")
        assert (code, error.count("\n")) == (2, 1)
        assert "baber/piqa: the Hugging Face hub has no data set of that name" in error
    code, _, error = run({**variables, "HF_HUB_OFFLINE": "1"}, tmp_path, *command)
    assert code == 2
    assert (
        "hf download Rowan/hellaswag --repo-type dataset --revision main --include 'data/validation-*.parquet'" in error
    )
