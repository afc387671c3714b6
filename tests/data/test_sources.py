"""Documents come in order, reading goes on from every cursor, and what a user can get wrong is said with its place."""

import collections
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megagpt.data import sources
from megagpt.data.sources import Source, open_source
from megagpt.data.tokenizer import gpt2
from megagpt.errors import UserError

DOCUMENTS = [f"Document {i}: naïve 日本 😀\n" + "word " * (i % 7) for i in range(60)]


def jsonl(documents: list[str], key: str = "text") -> bytes:
    """One object a line, with another key beside the text."""
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(documents))


def write_text(path: Path, documents: list[str]) -> Path:
    path.mkdir()
    for i, text in enumerate(documents):
        (path / f"{i:03d}.txt").write_text(text, encoding="utf-8", newline="")
    return path


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_bytes(jsonl(documents))
    return path


def write_gz(path: Path, documents: list[str]) -> Path:
    """Two members, as `cat a.gz b.gz` makes them."""
    path = path.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(jsonl(documents[:25])) + gzip.compress(jsonl(documents[25:])))
    return path


def write_zst(path: Path, documents: list[str]) -> Path:
    """Three frames; the second boundary lies within a line, as parallel compressors put it."""
    path = path.with_suffix(".jsonl.zst")
    data = jsonl(documents)
    cut = len(jsonl(documents[: len(documents) // 3]))
    pieces = (data[:cut], data[cut : cut + len(data) // 3 + 5], data[cut + len(data) // 3 + 5 :])
    assert all(pieces)
    assert not pieces[1].endswith(b"\n")
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(piece) for piece in pieces))
    return path


def write_parquet(path: Path, documents: list[str]) -> Path:
    path = path.with_suffix(".parquet")
    table = pa.table({"id": list(range(len(documents))), "text": documents})
    pq.write_table(table, path, row_group_size=13)
    assert pq.ParquetFile(path).num_row_groups > 1
    return path


def write_folder(path: Path, documents: list[str]) -> Path:
    """All kinds, in subfolders too, with a file that is none of them."""
    (path / "b").mkdir(parents=True)
    (path / "a.txt").write_text(documents[0], encoding="utf-8", newline="")
    (path / "b" / "c.jsonl").write_bytes(jsonl(documents[1:20]))
    (path / "b" / "d.json.gz").write_bytes(gzip.compress(jsonl(documents[20:30])))
    (path / "b" / "ignored.csv").write_text("text\nno\n")
    write_parquet(path / "c", documents[30:50])
    write_zst(path / "d", documents[50:])
    return path


def write_glob(path: Path, documents: list[str]) -> Path:
    path.mkdir()
    for i, first in enumerate(range(0, len(documents), 25)):
        (path / f"part_{i}.jsonl").write_bytes(jsonl(documents[first : first + 25]))
    (path / "other.jsonl").write_bytes(jsonl(["not asked for"]))
    return path / "part_*.jsonl"


WRITERS = [write_text, write_jsonl, write_gz, write_zst, write_parquet, write_folder, write_glob]


def read(source: Source, cursor: dict[str, object] | None = None) -> list[str]:
    return [text for batch in source.batches(cursor) for text in batch.documents]


def error_of(name: Path | str, **options: str) -> str:
    """The message with which reading this source fails; it must fit on a line."""
    with pytest.raises(UserError) as caught:
        read(open_source(str(name), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("characters", [1, 200, 10**6])
def test_order_and_every_cursor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, list[str]], Path],
    characters: int,
) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", characters)
    name = str(write(tmp_path / "corpus", DOCUMENTS))
    batches = list(open_source(name).batches(None))
    assert [text for batch in batches for text in batch.documents] == DOCUMENTS
    if characters == 1:
        assert len(batches) >= len(DOCUMENTS), "a cursor behind every document"
    shares = [batch.fraction for batch in batches]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    done = 0
    for batch in batches:
        done += len(batch.documents)
        cursor = json.loads(json.dumps(batch.cursor))
        assert read(open_source(name), cursor) == DOCUMENTS[done:]


def test_a_batch_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 100)
    longest = max(map(len, DOCUMENTS))
    for batch in open_source(str(write_jsonl(tmp_path / "corpus", DOCUMENTS))).batches(None):
        assert sum(map(len, batch.documents)) < 100 + longest


def test_blank_lines_and_a_missing_last_newline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "one"}\r\n\n  \n{"text": ""}\n{"text": "two"}')
    batches = list(open_source(str(path)).batches(None))
    assert [text for batch in batches for text in batch.documents if text] == ["one", "two"]
    for batch, rest in zip(batches, (["two"], []), strict=False):
        assert [text for text in read(open_source(str(path)), batch.cursor) if text] == rest


@pytest.mark.parametrize("write", [write_jsonl, write_zst, write_parquet])
def test_no_documents(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    if write is write_zst:
        path = tmp_path / "a.jsonl.zst"
        path.write_bytes(zstandard.ZstdCompressor().compress(b""))
    elif write is write_parquet:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path = write(tmp_path / "a", [])
    assert read(open_source(str(path))) == []


def test_another_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOCUMENTS, "body"))
    pq.write_table(pa.table({"body": DOCUMENTS}), tmp_path / "b.parquet")
    assert read(open_source(str(tmp_path), text_key="body")) == DOCUMENTS * 2


def test_parquet_kinds_of_string(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(DOCUMENTS).cast(kind)}), tmp_path / "a.parquet")
        assert read(open_source(str(tmp_path / "a.parquet"))) == DOCUMENTS, kind


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_folder])
def test_identity_tells_sources_apart(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    first = open_source(str(write(tmp_path / "one", DOCUMENTS))).identity
    (tmp_path / "two").mkdir()
    assert open_source(str(write(tmp_path / "two" / "one", DOCUMENTS))).identity == first, "moved, not changed"
    (tmp_path / "three").mkdir()
    assert open_source(str(write(tmp_path / "three" / "one", DOCUMENTS[:-1]))).identity != first
    json.dumps(first)


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
def test_bad_lines(tmp_path: Path, ending: str, line: bytes, words: list[str]) -> None:
    data = jsonl(DOCUMENTS[:3]) + b"\n" + line + b"\n" + jsonl(DOCUMENTS)
    path = tmp_path / f"corpus{ending}"
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    message = error_of(path)
    for word in [f"{path} line 5:", *words]:
        assert word in message


def test_absurdly_nested_json_is_a_bad_line_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOCUMENTS[:3]) + b"[" * 200_000 + b"\n")
    assert f"{path} line 4:" in error_of(path)


def test_the_documents_before_a_bad_line_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOCUMENTS[:3]) + b"oops\n")
    found = []
    with pytest.raises(UserError):  # noqa: PT012
        for batch in open_source(str(path)).batches(None):
            found += batch.documents
    assert found == DOCUMENTS[:3]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    message = error_of(tmp_path)
    assert str(path) in message
    assert "byte 2 is not UTF-8" in message


@pytest.mark.parametrize("lost", [1, 5, 100, "half", "all but 3"])
@pytest.mark.parametrize("write", [write_gz, write_zst])
def test_truncated_compression(tmp_path: Path, write: Callable[[Path, list[str]], Path], lost: int | str) -> None:
    """Of a download that broke off, the documents that are there must not pass for the whole."""
    path = write(tmp_path / "corpus", DOCUMENTS)
    data = path.read_bytes()
    left = {"half": len(data) // 2, "all but 3": 3}.get(lost) if isinstance(lost, str) else len(data) - lost
    path.write_bytes(data[:left])
    message = error_of(path)
    assert str(path) in message
    assert "fetch the file again" in message


@pytest.mark.parametrize("write", [write_gz, write_zst])
def test_damaged_compression(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    path = write(tmp_path / "corpus", DOCUMENTS)
    data = path.read_bytes()
    for damaged in (b"\0" * 100 + data[100:], b"garbage", data + b"garbage"):
        path.write_bytes(damaged)
        assert str(path) in error_of(path)


def test_zst_of_a_long_window(tmp_path: Path) -> None:
    """As `zstd --long=31` writes it; public dumps are distributed so."""
    path = tmp_path / "a.jsonl.zst"
    settings = zstandard.ZstdCompressionParameters(
        window_log=28, hash_log=6, chain_log=6, search_log=1, min_match=4, strategy=zstandard.STRATEGY_FAST
    )
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path.write_bytes(compressor.compress(jsonl(DOCUMENTS)) + compressor.flush())
    assert read(open_source(str(path))) == DOCUMENTS


def test_compression_with_checksum_finds_a_flipped_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    data = zstandard.ZstdCompressor(write_checksum=True, level=1).compress(jsonl(DOCUMENTS))
    for place in range(20, len(data), 97):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert str(path) in error_of(path)


def test_parquet_errors(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "corpus", DOCUMENTS)
    data = path.read_bytes()
    message = error_of(path, text_key="txt")
    assert f"{path}: no column 'txt'" in message
    assert "did you mean text?" in message
    for damaged in (
        data[:-1],
        data[: len(data) // 2],
        data[:3],
        b"",
        b"garbage",
        data[:4] + b"\xff" * 400 + data[404:],
    ):
        path.write_bytes(damaged)
        assert str(path) in error_of(path)


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (17, "17")])
def test_parquet_values_that_are_not_text(tmp_path: Path, value: int | None, shown: str) -> None:
    path = tmp_path / "a.parquet"
    column: list[object] = ["x"] * 20 if value is None else list(range(20))
    column[17] = value
    pq.write_table(pa.table({"text": column}), path, row_group_size=5)
    message = error_of(path)
    assert shown in message or value is not None
    assert f"{path} row {18 if value is None else 1}:" in message
    assert "not text" in message


def test_nothing_to_read(tmp_path: Path) -> None:
    for name in ("missing.jsonl", "missing", "missing/*.jsonl", "sub/missing.txt"):
        message = error_of(tmp_path / name)
        assert str(tmp_path / name) in message
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.rst").write_text("x")
    message = error_of(tmp_path / "empty")
    assert str(tmp_path / "empty") in message
    assert ".jsonl" in message


def test_relative_names_are_looked_for_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "corpus", DOCUMENTS)
    assert read(open_source("corpus.jsonl")) == DOCUMENTS
    assert read(open_source("./corpus.jsonl")) == DOCUMENTS
    assert read(open_source("c*.jsonl")) == DOCUMENTS
    for name in ("corpsu.jsonl", "./corpsu", "data/sub/corpus", "corpsu"):
        assert f"{name}: no such file or folder" in error_of(name)


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text\nhello\n")
    for name in (path, tmp_path / "*.csv"):
        message = error_of(name)
        assert str(path) in message
        assert ".parquet" in message


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "corpus", DOCUMENTS[:3])
    source = open_source(str(folder))
    (folder / "001.txt").unlink()
    # `prepare` turns it into a line for the user.
    with pytest.raises((OSError, UserError), match=r"001\.txt"):
        read(source)


# --- the standard library --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib() -> list[str]:
    return read(open_source("stdlib"))


def test_stdlib_is_prose(stdlib: list[str]) -> None:
    assert len(stdlib) > 300
    assert all(text.strip() for text in stdlib)
    tokens = np.concatenate([np.array(gpt2().encode_ordinary(text)) for text in stdlib])
    assert len(tokens) > 300_000
    assert np.mean(tokens == gpt2().encode_single_token(" ")) < 0.10


def test_stdlib_has_no_document_twice(stdlib: list[str]) -> None:
    """A text in both splits would make validation look better than it is."""
    twice = {text[:60] for text, count in collections.Counter(stdlib).items() if count > 1}
    assert not twice


def test_stdlib_has_a_fixed_order(stdlib: list[str]) -> None:
    program = """
import hashlib, json
from megagpt.data.sources import open_source
texts = [text for batch in open_source("stdlib").batches(None) for text in batch.documents]
print(hashlib.sha256(json.dumps(texts).encode()).hexdigest())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == hashlib.sha256(json.dumps(stdlib).encode()).hexdigest()


@pytest.mark.parametrize("characters", [5000, 10**6])
def test_stdlib_every_cursor(monkeypatch: pytest.MonkeyPatch, stdlib: list[str], characters: int) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", characters)
    monkeypatch.setattr(sources, "_stdlib_documents", lambda: iter(stdlib))
    source = open_source("stdlib")
    done = 0
    for batch in source.batches(None):
        done += len(batch.documents)
        assert read(source, json.loads(json.dumps(batch.cursor))) == stdlib[done:]
    assert done == len(stdlib)


def test_stdlib_identity_names_the_python() -> None:
    assert sys.version in open_source("stdlib").identity.values()
