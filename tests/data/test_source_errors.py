"""Unreadable sources are refused in one line, with the place of the error."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megagpt.data import documents as batching
from megagpt.data import tables
from megagpt.data.sources import open_source
from megagpt.errors import UserError
from tests.data.writers import (
    DOCUMENTS,
    error_of,
    jsonl,
    read,
    write_gz,
    write_jsonl,
    write_parquet,
    write_text,
    write_zst,
)

# --- what a user can get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson"])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut of', ["not JSON"]),
        (b"hello", ["not JSON"]),
        (b'{"text": "\xff"}', ["not JSON"]),
        (b'{"Text": "a", "id": 1}', ["'text'", "did you mean Text?", "--text-key"]),
        (b'{"url": "a", "id": 1}', ["'text'", "url", "id", "--text-key"]),
        (b'["text"]', ["'text'"]),
        (b'"text"', ["'text'"]),
        (b'{"text": 17}', ["17", "not text"]),
        (b'{"text": null}', ["None", "not text"]),
        (b'{"text": ["a"]}', ["not text"]),
    ],
    ids=lambda value: value[:20].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_a_bad_line_is_named(tmp_path: Path, ending: str, line: bytes, words: list[str]) -> None:
    data = jsonl(DOCUMENTS[:3]) + b"\n" + line + b"\n" + jsonl(DOCUMENTS)
    path = tmp_path / f"corpus{ending}"
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    message = error_of(path)
    for word in [f"{path} line 5:", *words]:
        assert word in message


def test_absurdly_nested_json_is_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOCUMENTS[:3]) + b"[" * 200_000 + b"\n")
    assert f"{path} line 4:" in error_of(path)


def test_the_documents_before_a_bad_line_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOCUMENTS[:3]) + b"oops\n")
    first, second, third, last = open_source(str(path)).batches(None)
    assert [*first.documents, *second.documents, *third.documents] == DOCUMENTS[:3]
    assert last.documents == []
    assert [row.place for row in last.bad] == [f"{path} line 4"]


def test_a_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    message = error_of(tmp_path)
    assert str(path) in message
    assert "byte 2 is not UTF-8" in message


@pytest.mark.parametrize("lost", [1, 5, 100, "half", "all but 3"])
@pytest.mark.parametrize("write", [write_gz, write_zst])
def test_truncated_compression_is_refused(
    tmp_path: Path, write: Callable[[Path, list[str]], Path], lost: int | str
) -> None:
    """The first part of a file must not pass for the whole."""
    path = write(tmp_path / "corpus", DOCUMENTS)
    data = path.read_bytes()
    left = {"half": len(data) // 2, "all but 3": 3}.get(lost) if isinstance(lost, str) else len(data) - lost
    path.write_bytes(data[:left])
    message = error_of(path)
    assert str(path) in message
    assert "fetch the file again" in message


@pytest.mark.parametrize("write", [write_gz, write_zst])
def test_corrupt_compression_is_refused(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    path = write(tmp_path / "corpus", DOCUMENTS)
    data = path.read_bytes()
    for corrupt in (b"\0" * 100 + data[100:], b"garbage", data + b"garbage"):
        path.write_bytes(corrupt)
        assert str(path) in error_of(path)


def test_a_checksum_in_the_compression_finds_a_flipped_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    data = zstandard.ZstdCompressor(write_checksum=True, level=1).compress(jsonl(DOCUMENTS))
    for place in range(20, len(data), 97):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert str(path) in error_of(path)


def test_corrupt_parquet_and_missing_columns_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "corpus", DOCUMENTS)
    data = path.read_bytes()
    message = error_of(path, text_key="txt")
    assert f"{path}: no column 'txt'" in message
    assert "did you mean text?" in message
    for corrupt in (
        data[:-1],
        data[: len(data) // 2],
        data[:3],
        b"",
        b"garbage",
        data[:4] + b"\xff" * 400 + data[404:],
    ):
        path.write_bytes(corrupt)
        assert str(path) in error_of(path)


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (17, "17")])
def test_a_parquet_value_that_is_not_text_is_named(tmp_path: Path, value: int | None, shown: str) -> None:
    path = tmp_path / "a.parquet"
    column: list[object] = ["x"] * 20 if value is None else list(range(20))
    column[17] = value
    pq.write_table(pa.table({"text": column}), path, row_group_size=5)
    message = error_of(path)
    assert shown in message or value is not None
    assert f"{path} row {18 if value is None else 1}:" in message
    assert "not text" in message


def test_columns_that_python_cannot_have_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = pa.array([2**60], pa.timestamp("ms"))  # after the year 9999
    pq.write_table(pa.table({"text": ["a"], "time": times}), path)
    message = error_of(path, text_key="time")
    assert f"{path} row 1: 'time' is timestamp[ms], not text; choose another --text-key" in message
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, path)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), twice.schema) as writer:
        writer.write_table(twice)
    for name in ("a.parquet", "a.arrow"):
        assert f"{name}: 2 columns are called 'text'" in error_of(tmp_path / name)
    with pytest.raises(UserError, match="corrupt, or not a parquet file"), tables._errors(path, "parquet"):
        raise pa.ArrowNotImplementedError("codec")


def test_missing_files_and_empty_folders_are_refused(tmp_path: Path) -> None:
    for name in ("missing.jsonl", "missing", "missing/*.jsonl", "sub/missing.txt"):
        message = error_of(tmp_path / name)
        assert str(tmp_path / name) in message
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.rst").write_text("x")
    message = error_of(tmp_path / "empty")
    assert str(tmp_path / "empty") in message
    assert ".jsonl" in message


def test_relative_names_are_files_before_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "corpus", DOCUMENTS)
    assert read(open_source("corpus.jsonl")) == DOCUMENTS
    assert read(open_source("./corpus.jsonl")) == DOCUMENTS
    assert read(open_source("c*.jsonl")) == DOCUMENTS
    for name in ("corpsu.jsonl", "./corpsu", "data/sub/corpus", "corpsu"):
        assert f"{name}: no such file or folder" in error_of(name)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.html"
    path.write_text("text\nhello\n")
    for name in (path, tmp_path / "*.html"):
        message = error_of(name)
        assert str(path) in message
        assert ".parquet" in message


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "corpus", DOCUMENTS[:3])
    source = open_source(str(folder))
    (folder / "001.txt").unlink()
    # `prepare` turns the OSError into a line for the user.
    with pytest.raises((OSError, UserError), match=r"001\.txt"):
        read(source)
