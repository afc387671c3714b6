"""Every document comes once, in order, and the same bytes on any number of workers."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.data import documents as batching
from megagpt.data import prepare as module
from megagpt.data.documents import DocumentBatch
from megagpt.data.encoding import encoded
from megagpt.data.prepare import prepare
from megagpt.data.shards import open_stream, verify
from megagpt.data.sources import open_source
from megagpt.data.tokenizer import gpt2
from megagpt.errors import UserError
from tests.data.preparation import contents, documents_of, error_of, make_documents, stop_after, write_corpus

# --- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("val_fraction", [0.0, 0.005, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shard_tokens", [97, 1000, 10**8])
def test_every_document_comes_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val_fraction: float, shard_tokens: int
) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 2000)
    texts = make_documents(150)
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", texts)))
    manifest = prepare(source, tmp_path / "out", val_fraction=val_fraction, shard_tokens=shard_tokens)
    texts = [text for text in texts if text]
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    held_out = set(val)
    assert train == [text for text in texts if text not in held_out]
    assert val == [text for text in texts if text in held_out]
    # An even spread: the share is exact to half a document at every prefix.
    taken = np.cumsum([text in held_out for text in texts])
    assert np.all(np.abs(taken - val_fraction * np.arange(1, len(texts) + 1)) <= 0.5 + 1e-9)

    assert manifest["documents"] == len(texts)
    tokens = {
        split: sum(len(gpt2().encode_ordinary(t)) + 1 for t in ts) for split, ts in (("train", train), ("val", val))
    }
    for split, found in (("train", train), ("val", val)):
        listed = manifest["splits"][split]
        assert listed["documents"] == sum(shard["documents"] for shard in listed["shards"]) == len(found)
        assert listed["tokens"] == sum(shard["tokens"] for shard in listed["shards"]) == tokens[split]
        assert all(shard["tokens"] == shard_tokens for shard in listed["shards"][:-1])
        assert [shard["file"] for shard in listed["shards"]] == [
            f"{split}_{i:05d}.npy" for i in range(len(listed["shards"]))
        ]
    assert manifest["tokens"] == sum(tokens.values()) == verify(tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = {p.name for p in (tmp_path / "out").iterdir()}
    listed_names = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    assert names == {"manifest.json"} | listed_names | {name[:-4] + ".crc32.npy" for name in listed_names}


@pytest.mark.usefixtures("inline")
def test_documents_may_fill_a_shard_exactly(tmp_path: Path) -> None:
    """Documents of ten tokens with end-of-text, in shards of ten, of twenty, and of one token."""
    texts = ["one two three four five six seven eight nine"] * 6
    assert len(gpt2().encode_ordinary(texts[0])) == 9
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", texts)))
    for shard_tokens, count in ((10, 6), (20, 3), (60, 1), (1, 60), (7, 9)):
        manifest = prepare(source, tmp_path / str(shard_tokens), val_fraction=0.0, shard_tokens=shard_tokens)
        shards = manifest["splits"]["train"]["shards"]
        assert len(shards) == count
        assert sum(shard["documents"] for shard in shards) == 6
        assert documents_of(tmp_path / str(shard_tokens), "train") == texts


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 3000)
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(400))))
    for workers in (1, 3):
        prepare(source, tmp_path / str(workers), val_fraction=0.1, shard_tokens=5000, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_documents_in_front_of_an_error_are_encoded() -> None:
    """The reader is some batches ahead of the writer."""

    def batches() -> Iterator[DocumentBatch]:
        for i in range(3):
            yield DocumentBatch([f"document {i}"], {"row": i}, None)
        raise UserError("corrupt")

    results = encoded(batches(), workers=1)
    assert [next(results)[0].cursor["row"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="corrupt"):
        next(results)


@pytest.mark.usefixtures("inline")
def test_batches_of_any_size_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(200))))
    for characters in (1, 1000, 10**6):
        monkeypatch.setattr(batching, "_BATCH_CHARACTERS", characters)
        prepare(source, tmp_path / str(characters), val_fraction=0.1, shard_tokens=3000)
    assert contents(tmp_path / "1") == contents(tmp_path / "1000") == contents(tmp_path / "1000000")


@pytest.mark.usefixtures("inline")
def test_report_counts_up_to_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 1000)
    calls: list[tuple[int, int, float | None]] = []
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(100))))
    manifest = prepare(source, tmp_path / "out", val_fraction=0.1, report=lambda *call: calls.append(call))
    assert len(calls) > 3
    assert calls == sorted(calls)
    assert calls[-1] == (manifest["documents"], manifest["tokens"], 1.0)


def test_prepare_and_verify_run_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", make_documents(50))
    command = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--val-fraction", "0.1", "--workers", "1"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert f"{len([t for t in make_documents(50) if t])} documents" in output
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main([*command[:-1], "0"]) == 2
    assert "--workers" in capsys.readouterr().err


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(("count", "said"), [(1, ": 1 document, "), (2, ": 2 documents, ")])
def test_prepared_documents_are_counted(
    count: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", ["one", "two"][:count])
    assert main(["prepare", str(corpus), "--out", str(tmp_path / "out"), "--val-fraction", "0"]) == 0
    assert said in capsys.readouterr().out


# --- a folder that holds something -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(50))))
    manifest = prepare(source, tmp_path / "out", val_fraction=0.1)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir()}

    def forbidden(cursor: object) -> Iterator[DocumentBatch]:
        raise AssertionError("the source must not be read again")

    unread = dataclasses.replace(source, batches=forbidden)
    assert prepare(unread, tmp_path / "out", val_fraction=0.1) == manifest
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.usefixtures("inline")
def test_a_folder_that_another_process_finishes_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(50))))
    alone = module._alone

    @contextlib.contextmanager
    def late(folder: Path) -> Iterator[None]:
        monkeypatch.setattr(module, "_alone", alone)
        prepare(source, folder, val_fraction=0.1)
        with alone(folder):
            yield

    monkeypatch.setattr(module, "_alone", late)
    unread = dataclasses.replace(source, batches=None)
    manifest = prepare(unread, tmp_path / "out", val_fraction=0.1)
    assert manifest["documents"] == len(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val"))
    assert not (tmp_path / "out" / "journal.json").exists()


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("finished", [True, False])
def test_another_corpus_in_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(module, "_JOURNAL_SECONDS", -1.0)
    texts = make_documents(60)
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", texts)))
    out = tmp_path / "out"
    settings = {"val_fraction": 0.1, "shard_tokens": 500}
    if finished:
        prepare(source, out, **settings)
    else:
        error_of(lambda: prepare(stop_after(source, 3, KeyboardInterrupt), out, **settings))
    before = contents(out)
    assert ("manifest.json" in before) == finished
    other = open_source(str(write_corpus(tmp_path / "b.jsonl", make_documents(61))))
    other_key = open_source(str(tmp_path / "a.jsonl"), text_key="body")
    for action in (
        lambda: prepare(other, out, **settings),
        lambda: prepare(other_key, out, **settings),
        lambda: prepare(source, out, **(settings | {"val_fraction": 0.2})),
        lambda: prepare(source, out, **(settings | {"shard_tokens": 501})),
    ):
        message = error_of(action)
        assert str(out) in message
        assert "something else" in message
        assert contents(out) == before
    prepare(source, out, **settings)
    assert documents_of(out, "train") + documents_of(out, "val")


@pytest.mark.usefixtures("inline")
def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(20))))
    before = contents(tmp_path)
    assert str(tmp_path) in error_of(lambda: prepare(source, tmp_path, val_fraction=0.1))
    assert contents(tmp_path) == before
    assert str(tmp_path / "a.jsonl") in error_of(lambda: prepare(source, tmp_path / "a.jsonl", val_fraction=0.1))
    assert str(tmp_path / "a.jsonl") in error_of(lambda: prepare(source, tmp_path / "a.jsonl" / "x", val_fraction=0.1))
    assert contents(tmp_path) == before
    (tmp_path / "new").mkdir()
    prepare(source, tmp_path / "new", val_fraction=0.1)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("documents", [[], [""], ["", "", ""]])
def test_an_empty_corpus_is_refused(tmp_path: Path, documents: list[str]) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", documents)))
    for _ in range(2):
        message = error_of(lambda: prepare(source, tmp_path / "out"))
        assert str(tmp_path / "a.jsonl") in message
        assert "empty" in message
    error_of(lambda: open_stream(tmp_path / "out", "train"))


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("count", [1, 2, 7, 33, 99])
def test_an_empty_validation_split_is_refused_with_a_remedy(tmp_path: Path, count: int) -> None:
    texts = [f"document {i}" for i in range(count)]
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", texts)))
    message = error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.005))
    for words in (str(tmp_path / "a.jsonl"), "--val-fraction", str(tmp_path / "out"), "at least" if count > 1 else "0"):
        assert words in message
    if count > 1:
        advised = float(message.split("at least")[1].split()[0].rstrip(".;,"))
        prepare(source, tmp_path / "advised", val_fraction=advised)
        assert len(documents_of(tmp_path / "advised", "val")) == 1
    prepare(source, tmp_path / "none", val_fraction=0.0)
    assert documents_of(tmp_path / "none", "train") == texts


@pytest.mark.parametrize("val_fraction", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_impossible_settings_are_refused(tmp_path: Path, val_fraction: float) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(20))))
    assert "--val-fraction" in error_of(lambda: prepare(source, tmp_path / "out", val_fraction=val_fraction))
    assert "--shard-tokens" in error_of(lambda: prepare(source, tmp_path / "out", shard_tokens=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("inline")
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 100)
    path = write_corpus(tmp_path / "a.jsonl", make_documents(20))
    path.write_text(path.read_text() + "oops\n")
    source = open_source(str(path))
    for _ in range(2):
        assert f"{path} line 21:" in error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.1))
    assert "not finished" in error_of(lambda: open_stream(tmp_path / "out", "train"))


def test_the_command_line_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", [])
    for arguments in ([str(corpus)], [str(tmp_path / "none.jsonl")], [str(corpus), "--val-fraction", "2"]):
        assert main(["prepare", *arguments, "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("megagpt: error: ")
