"""The same documents as files of every kind."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megagpt.data.documents import Cursor, Source
from megagpt.data.journal import Journal, Reading
from megagpt.data.sources import open_source
from megagpt.errors import UserError

DOCUMENTS = [f"Document {i}: naïve 日本 😀\n" + "word " * (i % 7) for i in range(60)]


def jsonl(documents: list[str], key: str = "text") -> bytes:
    """One object per line, with another key beside the text."""
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
    """Two members, as from `cat a.gz b.gz`."""
    path = path.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(jsonl(documents[:25])) + gzip.compress(jsonl(documents[25:])))
    return path


def write_zst(path: Path, documents: list[str]) -> Path:
    """Three frames; the second boundary is within a line, as parallel compressors write it."""
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


def read(source: Source, cursor: Cursor | None = None) -> list[str]:
    """All documents, as `prepare` takes them: the first bad row is an error."""
    texts: list[str] = []
    for batch in source.batches(cursor):
        Journal({}, [Reading()]).note(Reading(), batch, 0)
        texts += batch.documents
    return texts


def error_of(name: Path | str, **options: str) -> str:
    """The message of the error that reading this source raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        read(open_source(str(name), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)
