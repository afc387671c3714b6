"""Documents come in order, and reading resumes at every cursor."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megagpt.data import documents as batching
from megagpt.data.file_source import file_source
from megagpt.data.readers import Format
from megagpt.data.sources import open_source
from tests.data.writers import DOCUMENTS, jsonl, read, write_gz, write_jsonl, write_parquet, write_text, write_zst


def write_folder(path: Path, documents: list[str]) -> Path:
    """Files of all kinds, also in subfolders, and one of an unknown kind."""
    (path / "b").mkdir(parents=True)
    (path / "a.txt").write_text(documents[0], encoding="utf-8", newline="")
    (path / "b" / "c.jsonl").write_bytes(jsonl(documents[1:20]))
    (path / "b" / "d.json.gz").write_bytes(gzip.compress(jsonl(documents[20:30])))
    (path / "b" / "ignored.html").write_text("no")
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


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("characters", [1, 200, 10**6])
def test_documents_are_ordered_and_every_cursor_resumes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, list[str]], Path],
    characters: int,
) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", characters)
    name = str(write(tmp_path / "corpus", DOCUMENTS))
    batches = list(open_source(name).batches(None))
    assert [text for batch in batches for text in batch.documents] == DOCUMENTS
    if characters == 1:
        assert len(batches) >= len(DOCUMENTS), "a cursor after every document"
    shares = [batch.fraction for batch in batches]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    done = 0
    for batch in batches:
        done += len(batch.documents)
        cursor = json.loads(json.dumps(batch.cursor))
        assert read(open_source(name), cursor) == DOCUMENTS[done:]


def test_a_batch_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 100)
    longest = max(map(len, DOCUMENTS))
    for batch in open_source(str(write_jsonl(tmp_path / "corpus", DOCUMENTS))).batches(None):
        assert sum(map(len, batch.documents)) < 100 + longest


def test_blank_lines_and_a_missing_last_newline_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "one"}\r\n\n  \n{"text": ""}\n{"text": "two"}')
    batches = list(open_source(str(path)).batches(None))
    assert [text for batch in batches for text in batch.documents if text] == ["one", "two"]
    for batch, rest in zip(batches, (["two"], []), strict=False):
        assert [text for text in read(open_source(str(path)), batch.cursor) if text] == rest


@pytest.mark.parametrize("write", [write_jsonl, write_zst, write_parquet])
def test_an_empty_file_gives_no_documents(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    if write is write_zst:
        path = tmp_path / "a.jsonl.zst"
        path.write_bytes(zstandard.ZstdCompressor().compress(b""))
    elif write is write_parquet:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path = write(tmp_path / "a", [])
    assert read(open_source(str(path))) == []


def test_text_may_have_another_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOCUMENTS, "body"))
    pq.write_table(pa.table({"body": DOCUMENTS}), tmp_path / "b.parquet")
    assert read(open_source(str(tmp_path), text_key="body")) == DOCUMENTS * 2


def test_every_parquet_kind_of_string_is_read(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(DOCUMENTS).cast(kind)}), tmp_path / "a.parquet")
        assert read(open_source(str(tmp_path / "a.parquet"))) == DOCUMENTS, kind


def test_zst_with_a_long_window_is_read(tmp_path: Path) -> None:
    """As from `zstd --long=31`, the form of many public dumps."""
    path = tmp_path / "a.jsonl.zst"
    settings = zstandard.ZstdCompressionParameters(
        window_log=28, hash_log=6, chain_log=6, search_log=1, min_match=4, strategy=zstandard.STRATEGY_FAST
    )
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path.write_bytes(compressor.compress(jsonl(DOCUMENTS)) + compressor.flush())
    assert read(open_source(str(path))) == DOCUMENTS


@pytest.mark.parametrize("files", [20, 80])
def test_work_grows_with_the_rows_not_with_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    """Additions of file sizes are counted: a sum over all earlier files at each row would be 10 or 40 of them."""
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 1)
    additions = 0

    class Size(int):
        def __add__(self, other: int) -> "Size":
            nonlocal additions
            additions += 1
            return Size(int(self) + int(other))

        __radd__ = __add__

    class Counted(type(tmp_path)):  # type: ignore[misc]
        def stat(self, **options: bool) -> os.stat_result:
            values = list(super().stat(**options))
            values[6] = Size(values[6])
            return os.stat_result(values)

    paths = [Counted(tmp_path / f"{i:03d}.jsonl") for i in range(files)]
    for path in paths:
        path.write_bytes(jsonl(["one", "two", "three"]))
    source = file_source("many", paths, Format())
    batches = list(source.batches(None))
    rows = 3 * files
    assert len(batches) == rows + 1
    assert [batch.fraction for batch in batches] == sorted(batch.fraction or 0 for batch in batches)
    assert files <= additions <= 2 * (files + rows)
