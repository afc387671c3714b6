"""Exam rows from the Hugging Face hub, by the real client against a small hub on this machine."""

import fnmatch
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megagpt.commands.evaluate import _DEFAULT
from megagpt.data.hub_files import is_commit
from megagpt.evaluation.tasks import HELLASWAG, TASKS, find_tasks
from tests.data.hub import Hub
from tests.evaluation.conftest import hellaswag, write
from tests.exchange.hub_runs import rows_found, run
from tests.processes import run_ranks

pytestmark = pytest.mark.slow
COMMIT = HELLASWAG[0].source.commit


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def test_rows_are_fetched_once_at_one_commit(folder: Path, tmp_path: Path) -> None:
    """Both parts of the file; with shots, the training rows, too; then from the cache, without the hub. Without a
    network, a cache with a corrupt part is refused, and so is one that lacks a part."""
    rows = hellaswag(9)
    parts = {f"data/validation-0000{i}-of-00002.parquet": parquet(rows[4 * i : 4 + 5 * i]) for i in range(2)}
    files = {**parts, "data/train-00000-of-00001.parquet": parquet(hellaswag(3)), "README.md": b"a card"}
    command = ["evaluate", str(folder), "--tasks", "hellaswag", "--shots", "1", "--json", "out.json"]
    with Hub(files, "Rowan/hellaswag", commit=COMMIT).running() as hub:
        variables = hub.environment(tmp_path / "home")
        code, _, error = run(variables, tmp_path, *command)
        assert code == 0, error
        first = json.loads((tmp_path / "out.json").read_text())["results"]
        assert first[0]["items"] == 9
        assert first[0]["details"]["commit"] == COMMIT
        assert all(COMMIT in path for path in first[0]["details"]["files"] + first[0]["details"]["shots_from"])
        fetched = len([line for line in hub.requests if line.startswith("GET ") and line.endswith(".parquet")])
        assert fetched == 3
        asked = len(hub.requests)
        assert run(variables, tmp_path, *command)[0] == 0
        assert len(hub.requests) == asked, "the commit is known and in the cache"
    code, _, error = run({**variables, "HF_HUB_OFFLINE": "1"}, tmp_path, *command)
    assert code == 0, error
    assert json.loads((tmp_path / "out.json").read_text())["results"] == first
    (part,) = (tmp_path / "home").rglob("validation-00000-of-00002.parquet")
    part.write_bytes(part.read_bytes()[::-1])
    code, _, error = run({**variables, "HF_HUB_OFFLINE": "1"}, tmp_path, *command)
    assert code == 2
    assert f"{part}: corrupt, its SHA-1 is" in error
    part.unlink()
    code, _, error = run({**variables, "HF_HUB_OFFLINE": "1"}, tmp_path, *command)
    assert code == 2
    assert f"hf download Rowan/hellaswag --repo-type dataset --revision {COMMIT} --include 'data/val" in error


def test_each_exam_of_the_default_has_a_commit() -> None:
    assert all(is_commit(task.source.commit) for task in find_tasks(_DEFAULT.split(",")))


def test_the_main_rank_chooses_the_newest_commit(tmp_path: Path) -> None:
    """Of a data set whose commit is not written here, on the branch that has its rows: PTB's main has none."""
    task = "ptb"
    path = TASKS[task].source.path
    with Hub({path: b"old"}, "ptb-text-only/ptb_text_only").running() as hub:
        hub.branch = "refs/convert/parquet"
        hub.revise({path: b"new"})
        homes = {host: hub.environment(tmp_path / host) for host in ("near", "far")}
        found = run_ranks(2, rows_found, task, ["near", "far"], homes, dict.fromkeys(homes, ""))
        assert {files.commit for files in found} == {hub.commit}
        assert [files.paths[0].read_bytes() for files in found] == [b"new", b"new"]
        assert len([line for line in hub.requests if line.endswith(("/ptb_text_only", f"/revision/{hub.branch}"))]) == 1
        hub.gated = "Ask the owner."
        with pytest.raises(AssertionError, match="gated: accept its terms"):
            run_ranks(1, rows_found, task, ["near"], homes, dict.fromkeys(homes, ""))
    offline = {"near": {**homes["near"], "HF_HUB_OFFLINE": "1"}}
    (again,) = run_ranks(1, rows_found, task, ["near"], offline, {"near": ""})
    assert again == found[0]


def test_a_host_with_other_rows_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {host: str(tmp_path / host) for host in ("near", "far")}
    for host, rows in (("near", 3), ("far", 2)):
        write(tmp_path / host / "hellaswag.jsonl", hellaswag(rows))
    with pytest.raises(AssertionError, match="Reported"):
        run_ranks(3, rows_found, "hellaswag", ["near", "near", "far"], {"near": {}, "far": {}}, data)
    assert capsys.readouterr().out.count("exam rows on far differ from those on near; copy") == 1


def test_rows_that_the_hub_lacks_are_named(folder: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(folder), "--tasks", "hellaswag"]
    with Hub({"hellaswag.py": b"a script"}, "Rowan/hellaswag", commit=COMMIT).running() as hub:
        variables = hub.environment(tmp_path / "home")
        code, _, error = run(variables, tmp_path, *command)
        assert code == 2
        assert f"Rowan/hellaswag: looked for data/validation-*.parquet at {COMMIT}; found: hellaswag.py; or" in error
        assert "one of hellaswag_val.jsonl, " in error
        assert "--data" in error
        code, _, error = run(variables, tmp_path, "evaluate", str(folder), "--tasks", "piqa")
        assert (code, error.count("\n")) == (2, 1)
        assert "baber/piqa: the Hugging Face hub has no data set of that name" in error
        assert "bring the rows yourself: one of piqa_val.jsonl, " in error


# The files of the data sets on the hub, as their pages list them.
PARTS = "-00000-of-00001.parquet"
LISTINGS = {
    "Rowan/hellaswag": [f"data/{split}{PARTS}" for split in ("train", "validation", "test")],
    "EleutherAI/lambada_openai": ["data/lambada_test.jsonl", "data/lambada_test_de.jsonl", "lambada_openai.py"],
    "baber/piqa": ["piqa_train.parquet", "piqa_validation.parquet", "piqa_test.parquet"],
    "allenai/ai2_arc": [
        f"ARC-{kind}/{split}{PARTS}" for kind in ("Easy", "Challenge") for split in ("train", "validation", "test")
    ],
    "allenai/winogrande": [f"winogrande_xl/{split}{PARTS}" for split in ("train", "validation", "test")],
    "allenai/openbookqa": [f"{kind}/{split}{PARTS}" for kind in ("main", "additional") for split in ("train", "test")],
    "aps/super_glue": [f"{name}/{split}{PARTS}" for name in ("boolq", "copa") for split in ("train", "validation")],
    "lighteval/winograd_wsc": [f"{name}/test{PARTS}" for name in ("wsc273", "wsc285")],
    "EleutherAI/arithmetic": [
        "arithmetic.py",
        *(f"data/{digits}_digit_{kind}.jsonl" for digits in ("two", "three", "four", "five")
          for kind in ("addition", "subtraction")),
        "data/single_digit_three_ops.jsonl", "data/two_digit_multiplication.jsonl",
    ],
    "lighteval/GPT3_unscramble": [
        f"data/{name}-00000-of-00001-0123456789abcdef.parquet"
        for name in ("mid_word_1_anagrams", "mid_word_2_anagrams", "cycle_letters_in_word", "random_insertion_in_word",
                     "reversed_words")
    ],
    "Salesforce/wikitext": [f"wikitext-{size}-raw-v1/test{PARTS}" for size in (2, 103)],
    "EleutherAI/wikitext_document_level": ["wikitext-2-raw-v1/wikitext-2-raw-v1-test.parquet"],
    "ptb-text-only/ptb_text_only": [f"penn_treebank/{split}/0000.parquet" for split in ("train", "test")],
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_each_tasks_paths_are_files_of_its_data_set(name: str) -> None:
    """One file for the exam, and one for its examples if it has any there."""
    source = TASKS[name].source
    for path in filter(None, (source.path, source.train)):
        assert len(fnmatch.filter(LISTINGS[source.repository], path)) == 1, path
