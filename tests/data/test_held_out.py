"""Validation text: the end of one long text, or a source of its own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.data import documents as batching
from megagpt.data import prepare as module
from megagpt.data.documents import Source
from megagpt.data.prepare import prepare
from megagpt.data.shards import verify
from megagpt.data.sources import open_source, open_validation
from megagpt.data.tokenizer import END_OF_TEXT, gpt2
from tests.conftest import Refusal
from tests.data.crashes import CrashPoints
from tests.data.folders import read_all
from tests.data.preparation import check_unfinished, contents, documents_of, error_of, make_documents, write_corpus

pytestmark = pytest.mark.usefixtures("inline")
DOCUMENTS = [text for text in make_documents(9, longest=60) if text]


def encoded(documents: list[str]) -> list[int]:
    return [token for text in documents for token in [*gpt2().encode_ordinary(text), END_OF_TEXT]]


@pytest.mark.parametrize("shard_tokens", [13, 50, 97, 10**6])
@pytest.mark.parametrize("val_fraction", [0.01, 0.05])
@pytest.mark.parametrize("count", [1, 8])
def test_the_end_of_a_long_text_is_held_out(tmp_path: Path, shard_tokens: int, val_fraction: float, count: int) -> None:
    documents = DOCUMENTS[:count] if count > 1 else [" ".join(DOCUMENTS)]
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", documents)))
    manifest = prepare(source, tmp_path / "out", val_fraction=val_fraction, shard_tokens=shard_tokens)
    tokens = encoded(documents)
    tail = int(len(tokens) * val_fraction + 0.5)
    assert tail >= 2
    assert read_all(tmp_path / "out") == {"train": tokens[:-tail], "val": tokens[-tail:]}
    assert manifest["tail_tokens"] == tail
    assert verify(tmp_path / "out") == len(tokens)
    starts = np.append(0, np.flatnonzero(np.array(tokens) == END_OF_TEXT)[:-1] + 1)
    at = 0
    for split in ("train", "val"):
        listed = manifest["splits"][split]["shards"]
        for shard in listed:
            assert shard["documents"] == np.sum((starts >= at) & (starts < at + shard["tokens"]))
            at += shard["tokens"]
        assert all(shard["tokens"] == shard_tokens for shard in listed[:-1])


def test_a_tail_at_a_document_boundary_is_a_whole_document(tmp_path: Path) -> None:
    """A twentieth of 101 tokens: the last document is as long, with its end-of-text."""
    texts = [" ".join(["one"] * 95), "one two three four"]
    assert [len(gpt2().encode_ordinary(text)) for text in texts] == [95, 4]
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", texts)))
    for shard_tokens in (96, 1000):
        out = tmp_path / str(shard_tokens)
        manifest = prepare(source, out, val_fraction=0.05, shard_tokens=shard_tokens)
        assert documents_of(out, "train") == texts[:1]
        assert documents_of(out, "val") == texts[1:]
        assert [manifest["splits"][split]["documents"] for split in ("train", "val")] == [1, 1]


def test_a_text_file_is_held_out_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("\n".join(DOCUMENTS * 20), encoding="utf-8")
    assert main(["prepare", str(path), "--out", str(tmp_path / "out")]) == 0
    tokens = encoded(["\n".join(DOCUMENTS * 20)])
    assert f"held out the last {round(len(tokens) * 0.005):,} tokens for validation: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("val_fraction", "shard_tokens"), [(0.15, 25), (0.8, 60)])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_while_the_end_is_moved_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool, val_fraction: float, shard_tokens: int
) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 400)
    monkeypatch.setattr(module, "_JOURNAL_SECONDS", -1.0)
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", DOCUMENTS[:2])))

    def run(folder: Path) -> dict[str, Any]:
        return prepare(source, folder, val_fraction=val_fraction, shard_tokens=shard_tokens)

    assert len(run(tmp_path / "expected")["splits"]["val"]["shards"]) > 1
    expected = contents(tmp_path / "expected")
    crash = CrashPoints(monkeypatch)
    for step in range(1, 1000):
        folder = tmp_path / f"killed_{step}"
        if crash.survives(lambda folder=folder: run(folder), step, after):  # type: ignore[misc]
            break
        found = contents(folder) if folder.exists() else {}
        assert "manifest.json" not in found or found == expected or "journal.json" in found
        run(folder)
        assert contents(folder) == expected, step
    assert 20 < step < 999


@pytest.mark.parametrize(("count", "val_fraction"), [(1, 0.49), (1, 0.5), (1, 0.9), (2, 0.9), (2, 0.999999)])
@pytest.mark.parametrize("shard_tokens", [7, 10**6])
def test_documents_too_few_for_both_splits_are_cut(
    tmp_path: Path, val_fraction: float, shard_tokens: int, count: int
) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", DOCUMENTS[:count])))
    manifest = prepare(source, tmp_path / "out", val_fraction=val_fraction, shard_tokens=shard_tokens)
    found, tokens = read_all(tmp_path / "out"), encoded(DOCUMENTS[:count])
    assert found["train"] + found["val"] == tokens
    tail = min(int(len(tokens) * val_fraction + 0.5), len(tokens) - 2)
    assert manifest["tail_tokens"] == tail == len(found["val"])
    assert sum(split["documents"] for split in manifest["splits"].values()) == count
    assert verify(tmp_path / "out") == len(tokens)


# --- a validation set of its own -------------------------------------------------------------------------------------


def test_a_validation_set_of_its_own_is_all_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 400)
    monkeypatch.setattr(module, "_JOURNAL_SECONDS", -1.0)
    others = [text for text in make_documents(30, seed=5) if text]
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", DOCUMENTS)))
    val = open_source(str(write_corpus(tmp_path / "v.jsonl", others)))

    def run(folder: Path) -> dict[str, Any]:
        return prepare(source, folder, val=val, shard_tokens=100)

    manifest = run(tmp_path / "out")
    assert read_all(tmp_path / "out") == {"train": encoded(DOCUMENTS), "val": encoded(others)}
    assert manifest["documents"] == len(DOCUMENTS) + len(others)
    expected = contents(tmp_path / "out")
    crash = CrashPoints(monkeypatch)
    for step in range(1, 200, 9):
        folder = tmp_path / f"killed_{step}"
        crash.survives(lambda folder=folder: run(folder), step, after=step % 2 == 0)  # type: ignore[misc]
        if step > 20:
            check_unfinished(folder, expected)
        run(folder)
        assert contents(folder) == expected, step
    without = error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.0, shard_tokens=100))
    assert "--val" in without
    write_corpus(tmp_path / "v.jsonl", others[1:])
    changed = open_source(str(tmp_path / "v.jsonl"))
    assert "v.jsonl" in error_of(lambda: prepare(source, tmp_path / "out", val=changed, shard_tokens=100))


def test_files_of_the_validation_set_are_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    folder = tmp_path / "stories"
    folder.mkdir()
    (folder / "train.txt").write_text("one<|end|>two")
    (folder / "valid.txt").write_text("three<|end|>four<|end|>five")
    options = ["--separator", "<|end|>", "--workers", "1"]
    for source, name in ((folder, "a"), (f"{folder}/*.txt", "b")):
        command = ["prepare", str(source), "--val", f"{folder}/valid.txt", "--out", str(tmp_path / name), *options]
        assert main(command) == 0
        assert documents_of(tmp_path / name, "train") == ["one", "two"]
        assert documents_of(tmp_path / name, "val") == ["three", "four", "five"]
        assert f"left out, in --val (1): {folder}/valid.txt" in capsys.readouterr().out
    same = f"{folder}/train.txt"
    assert main(["prepare", same, "--val", same, "--out", str(tmp_path / "c")]) == 2
    assert "--val" in capsys.readouterr().err
    both = ["--val", same, "--val-fraction", "0.1"]
    refusal(["prepare", str(folder), *both, "--out", str(tmp_path / "c")], "--val-fraction: not allowed with", "--val")


@pytest.mark.parametrize("val", ["someone/stories", "other/stories"])
def test_the_hub_is_asked_for_a_split_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal, val: str
) -> None:
    asked: dict[str, tuple[object, ...]] = {}

    def hub_source(name: str, text_key: str, subset: str | None, split: str, revision: str | None) -> Source:
        asked[split] = name, text_key, subset, revision
        source = open_source(str(write_corpus(tmp_path / f"{split}.jsonl", [split])))
        return dataclasses.replace(source, identity={"hub": name, "split": split})

    monkeypatch.setattr("megagpt.data.sources.hub_source", hub_source)
    options = ["--subset", "big", "--revision", "abc", "--out", str(tmp_path / "out")]
    assert main(["prepare", "someone/stories", "--val", val, *options]) == 0
    same = ("big", "abc") if val == "someone/stories" else (None, None)
    assert asked == {"train": ("someone/stories", "text", "big", "abc"), "validation": (val, "text", *same)}
    assert documents_of(tmp_path / "out", "val") == ["validation"]
    assert main(["prepare", "someone/stories", "--val", val, *options, "--val-revision", "def"]) == 0
    assert asked["validation"] == (val, "text", same[0], "def")
    part = "is the text to train on" if val == "someone/stories" else "--val-split was validation, is train"
    refusal(["prepare", "someone/stories", "--val", val, "--val-split", "train", *options], part)


def test_an_empty_validation_set_is_refused(tmp_path: Path) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", DOCUMENTS)))
    val = open_source(str(write_corpus(tmp_path / "v.jsonl", ["", ""])))
    message = error_of(lambda: prepare(source, tmp_path / "out", val=val))
    assert f"{tmp_path}/v.jsonl" in message
    assert "--val" in message
    message = error_of(lambda: prepare(val, tmp_path / "out2", val=source))
    assert "the corpus is empty" in message


def test_the_validation_set_needs_no_separator(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "v.jsonl", DOCUMENTS)
    val, held_out = open_validation(str(path), separator="<|end|>")
    assert held_out == {path.resolve()}
    assert json.loads(json.dumps(val.identity)) == {"text_key": "text", "separator": None}
