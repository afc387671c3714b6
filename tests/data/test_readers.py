"""Files of every kind give the same documents, under every compression; the first part never passes for the whole."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megagpt.data import documents as batching
from megagpt.data import readers
from megagpt.data.sources import open_source
from tests.data.writers import DOCUMENTS, error_of, jsonl, read

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".ZSTD": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def assert_refused(path: Path, data: bytes, words: list[str]) -> None:
    path.write_bytes(data)
    message = error_of(path)
    for word in [str(path), *words]:
        assert word in message


def csv_of(documents: list[str]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([("id", "text"), *enumerate(documents)])
    return file.getvalue().encode()


def rows_of(documents: list[str]) -> list[dict[str, object]]:
    return [{"id": i, "text": text} for i, text in enumerate(documents)]


PLAIN: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "jsonl": (".jsonl", jsonl),
    "ndjson": (".NDJSON", jsonl),
    "lines in json": (".json", jsonl),
    "array": (".json", lambda documents: json.dumps(rows_of(documents), ensure_ascii=False).encode()),
    "indented": (".json", lambda documents: json.dumps(rows_of(documents), indent=2).encode() + b"\n"),
    "objects": (".json", lambda documents: b"\n".join(json.dumps(r, indent=1).encode() for r in rows_of(documents))),
    "one line of objects": (".json", lambda documents: b" ".join(json.dumps(r).encode() for r in rows_of(documents))),
    "objects without blanks": (".json", lambda documents: jsonl(documents).replace(b"}\n{", b"}{")),
    "a long first line": (".json", lambda documents: b'{"id": "' + b"x" * 10**5 + b'",\n' + jsonl(documents)[10:]),
    "csv": (".csv", csv_of),
    "csv with a mark": (".csv", lambda documents: b"\xef\xbb\xbf" + csv_of(documents)),
    "separated": (".txt", lambda documents: "\n<|sep|>\n\n".join(documents).encode() + b"\n<|sep|>\n"),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", PLAIN)
def test_every_kind_gives_the_documents_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, compression: str
) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 500)
    monkeypatch.setattr(readers, "_CHUNK", 300)  # texts, numbers and separators are cut anywhere
    ending, make = PLAIN[kind]
    documents = [text.rstrip("\n") for text in DOCUMENTS]
    path = tmp_path / f"corpus{ending}{compression}"
    path.write_bytes(COMPRESS[compression](make(documents)))
    options = {"separator": "<|sep|>"} if ending == ".txt" else {}
    source = open_source(str(path), **options)
    batches = list(source.batches(None))
    texts = [text for batch in batches for text in batch.documents if text]
    assert texts == documents
    done = 0
    for batch in batches[::3]:
        done = sum(len(b.documents) for b in batches[: batches.index(batch) + 1])
        assert [t for t in read(source, json.loads(json.dumps(batch.cursor))) if t] == documents[done:]


@pytest.mark.parametrize("compression", [".gz", ".zst", ".xz", ".bz2"])
def test_corrupt_and_truncated_compression_is_refused(tmp_path: Path, compression: str) -> None:
    half, whole = (COMPRESS[compression](jsonl(DOCUMENTS[:n])) for n in (30, 60))
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(half + half)
    assert read(open_source(str(path))) == DOCUMENTS[:30] * 2, "two frames"
    for corrupt in (
        whole[:-1],
        whole[: len(whole) // 2],
        half + whole[: len(whole) // 2],
        whole + b"garbage",
        half + b"\1" * 5 + half,
        b"\0" * 20 + whole,
        b"garbage",
        b"",
        jsonl(DOCUMENTS),
    ):
        path.write_bytes(corrupt)
        message = error_of(path)
        assert f"{path}: corrupt compression" in message
        assert "fetch the file again" in message


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 500)
    path = tmp_path / "a.arrow"
    table = pa.table({"id": range(60), "text": DOCUMENTS})
    with pa.OSFile(str(path), "wb") as file:
        make = pa.ipc.new_stream if stream else pa.ipc.new_file
        with make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=17)
    source = open_source(str(path))
    assert read(source) == DOCUMENTS
    for batch in source.batches(None):
        rest = read(source, batch.cursor)
        assert rest == DOCUMENTS[len(DOCUMENTS) - len(rest) :]
    data = path.read_bytes()
    for cut in (1, 8, len(data) // 2, len(data) - 4):
        path.write_bytes(data[:-cut])
        assert str(path) in error_of(path)
    path.write_bytes(b'{"text":"other"}\n')
    assert str(path) in error_of(path)
    path.write_bytes(data)
    assert "did you mean text?" in error_of(path, text_key="txt")


@pytest.mark.parametrize(
    "text", ["one\r\ntwo\r\n\r\nend\r\n", "old\rMac\r", "\ufeffHello world\n", "a\ufeffb\n", "\ufeff\ufefftwice", " \n"]
)
def test_line_ends_and_byte_order_marks_are_alike_everywhere(tmp_path: Path, text: str) -> None:
    """Line ends stay as they are; one mark at the start of a document is dropped."""
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\r\n", newline="")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text}]))
    (tmp_path / "a.csv").write_bytes(b'text\r\n"' + text.encode() + b'"\r\n')
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    expected = text[1:] if text[0] == "\ufeff" else text
    for kind in ("txt", "jsonl", "json", "csv", "parquet"):
        assert read(open_source(str(tmp_path / f"a.{kind}"))) == [expected], kind


def test_a_mark_at_the_start_of_a_json_file_is_dropped(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", jsonl(["x"])), ("a.json", b'[{"text": "x"}]'), ("b.json", b'{\n"text": "x"\n}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
        assert read(open_source(str(tmp_path / name))) == ["x"]


INVALID = {
    "a.txt": (b"good\nna\xefve", "line 2"),
    "a.txt.gz": (b"good\nna\xefve", "line 2"),
    "a.jsonl": (b'{"text": "ok"}\n{"text": "na\xefve"}\n', "a.jsonl line 2"),
    "a.json": (b'[{"text": "ok"},\n{"text": "na\xefve"}]\n', "a.json row 2"),
    "a.csv": (b"text,id\nok,1\nna\xefve,2\n", "a.csv line 3"),
}


@pytest.mark.parametrize("name", [*INVALID, "a.parquet", "dictionary.parquet", "a.arrow"])
def test_invalid_utf8_names_file_and_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    place = f"{name} row 2"
    if name in INVALID:
        data, place = INVALID[name]
        path.write_bytes(COMPRESS[path.suffix](data) if path.suffix in COMPRESS else data)
    else:
        strings = pa.array([b"ok", b"na\xefve", b"ok"]).view(pa.string())
        if name.startswith("dictionary"):
            strings = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), strings)
        table = pa.table({"text": strings})
        if name.endswith("parquet"):
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
    message = error_of(path)
    assert place in message
    assert "not UTF-8" in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'[{"text": "a"}, {"text": "b"}', ["not closed"]),
        (b'[{"text": "a"}, {"text": "b', ["row 2", "not JSON"]),
        (b'[{"text": "a"} {"text": "b"}]', ["not JSON", "','"]),
        (b'[{"text": "a"},]', ["row 2", "not JSON"]),
        (b'[{"text": "a"}] []', ["follows the array"]),
        (b'[{"text": "a"}, {"Text": "b"}]', ["row 2", "did you mean Text?"]),
        (b'{"text": "a"}\n{"text": 3}', ["line 2", "not text"]),
        (b'{\n"text": "a"\n}\n{\n"text": "b"', ["row 2", "not JSON"]),
        (b'["a", "b"]', ["row 1", "'text'"]),
        (b'{"text": "a"} {"text": 3}', ["line 1", "not text"]),
        (b'{"text": "a"} garbage {"text": "b"}', ["line 1", "not JSON (Extra data"]),
        ('{"text": "a"}\r\n{"text": "b"}'.encode("utf-16"), ["line 1", "not UTF-8; convert the file from UTF-16"]),
        (b"[" * 8000, ["row 1", "not JSON"]),
        (b'{"a": ' + b"[" * 200_000, ["line 1", "not JSON"]),
        (b'{"id": ' + b"1" * 5000 + b', "text": "a"}', ["line 1", "not JSON"]),
    ],
)
def test_bad_json_files_are_refused_with_the_place(tmp_path: Path, data: bytes, words: list[str]) -> None:
    assert_refused(tmp_path / "a.json", data, words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"txt\na\n", ["no column 'text'", "did you mean txt?"]),
        (b"text,id\nhello, world,1\n", ["line 2", "3 fields under 2 columns"]),
        (b"id,text\n1,a\n2\n", ["line 3", "1 fields under 2 columns"]),
        (b'text\na\n"never closed\n', ["line 3", "never closed"]),
        (b'text\na\n"b"c\n', ["line 3", "not CSV"]),
        (b"id,text\r1,a\r2,b\r", ["line 1", "CR alone", "CR LF"]),
        (b'"text"x,y\na,b\n', ["line 1", "not CSV"]),
        ("id,text\r\n1,a\r\n".encode("utf-16"), ["line 1", "from UTF-16 to UTF-8"]),
        (b'id,"text\n1,a\n', ["line 1", "a quote is never closed"]),
    ],
)
def test_bad_csv_files_are_refused_with_the_place(tmp_path: Path, data: bytes, words: list[str]) -> None:
    assert_refused(tmp_path / "a.csv", data, words)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.zst"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "git lfs pull" in error_of(path)


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_separators_split_a_text_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes("\n\none—\n\ntwo\r\n<|end|>\r\nthree<|end|><|end|>\n<|end|>\n four \n".encode())
    found = [text for text in read(open_source(str(path), separator="<|end|>")) if text]
    assert found == ["\n\none—\n\ntwo", "three", " four \n"]
    assert read(open_source(str(path), separator="no such")) == read(open_source(str(path)))
    assert read(open_source(str(path), separator="—"))[0] == "\n\none"


def test_a_separator_needs_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS[:3]))
    for name in (tmp_path / "a.jsonl", tmp_path, "stdlib"):
        assert "--separator" in error_of(name, separator="<|endoftext|>")
    (tmp_path / "b.txt").write_text("one<|endoftext|>two")
    assert read(open_source(str(tmp_path), separator="<|endoftext|>")) == [*DOCUMENTS[:3], "one", "two"]
    assert "--separator: is empty" in error_of(tmp_path, separator="")


def test_a_separator_that_is_spelled_is_pointed_out(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("one\n<|endoftext|>\ntwo\n")
    (note,) = (note for note in open_source(str(path)).notes if "<|endoftext|>" in note)
    assert str(path) in note
    assert "--separator '<|endoftext|>'" in note
    assert not any("endoftext" in note for note in open_source(str(path), separator="<|endoftext|>").notes)
    for separator, hint in (("<end>", "no '<end>'"), (r"\n\n", "$'\\n'"), ("\r\r", r"no '\r\r'")):
        assert any(hint in note for note in open_source(str(path), separator=separator).notes)
