"""Text that is prepared already must still be the same; whatever comes after it may be fixed."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagpt.cli import main
from megagpt.data import documents as batching
from megagpt.data import file_source
from megagpt.data import prepare as module
from megagpt.data.documents import DocumentBatch
from megagpt.data.journal import Journal, Reading
from megagpt.data.prepare import prepare
from megagpt.data.readers import Format, Row
from megagpt.data.shards import manifest_checksum
from megagpt.data.sources import open_source
from megagpt.data.tables import as_row
from tests.data.preparation import contents, documents_of, error_of, make_documents, stop_after, write_corpus

pytestmark = pytest.mark.usefixtures("inline")

DOCUMENTS = [text for text in make_documents(60) if text]
SETTINGS: dict[str, Any] = {"val_fraction": 0.1, "shard_tokens": 500}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 600)
    monkeypatch.setattr(module, "_JOURNAL_SECONDS", -1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of twenty documents or fewer."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        write_corpus(tmp_path / "in" / f"{i}.jsonl", DOCUMENTS[20 * i : 20 * i + 20])
    return tmp_path / "in"


def interrupted(folder: Path, out: Path, file: int) -> None:
    """Prepare until the cursor is inside that file."""
    source = open_source(str(folder))
    cursors = [batch.cursor for batch in source.batches(None)]
    batches = next(i for i, cursor in enumerate(cursors, start=1) if cursor["file"] == file and cursor["row"] > 1)
    error_of(lambda: prepare(stop_after(source, batches, KeyboardInterrupt), out, **SETTINGS))
    assert place_of(out)[0] == file


def npy(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name.endswith(".npy")}


def place_of(out: Path) -> tuple[int, int]:
    """File and row of the journal's cursor."""
    cursor = json.loads((out / "journal.json").read_text())["sources"][0]["cursor"]
    return cursor["file"], cursor["row"]


def swap(path: Path, line: int) -> None:
    """Change a line to another text of the same size."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"0/', b'"9/')
    path.write_bytes(b"".join(lines))


def keep_mtime(change: Callable[[], object], path: Path) -> None:
    """Make a change as `tar` and `rsync` do: the file gets its old time again."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("kept", [True, False], ids=["same mtime", "new mtime"])
def test_changed_content_of_the_same_size_is_noticed(tmp_path: Path, folder: Path, finished: bool, kept: bool) -> None:
    out = tmp_path / "out"
    if finished:
        prepare(open_source(str(folder)), out, **SETTINGS)
    else:
        interrupted(folder, out, 1)
    before = contents(out)
    for path, line in ((folder / "0.jsonl", 7), (folder / "1.jsonl", 0)):
        data = path.read_bytes()
        if kept:
            keep_mtime(lambda path=path, line=line: swap(path, line), path)  # type: ignore[misc]
        else:
            swap(path, line)
        message = error_of(lambda: prepare(open_source(str(folder)), out, **SETTINGS))
        assert f"{path}: its text has changed" in message
        assert str(out) in message
        assert contents(out) == before
        path.write_bytes(data)
    manifest = prepare(open_source(str(folder)), out, **SETTINGS)
    assert manifest["documents"] == len(DOCUMENTS)


@pytest.mark.parametrize("finished", [True, False])
def test_only_files_whose_times_changed_are_read_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    out = tmp_path / "out"
    interrupted(folder, out, 2)
    if finished:
        prepare(open_source(str(folder)), out, **SETTINGS)
    (folder / "0.jsonl").touch()
    read: list[tuple[str, int]] = []
    original = file_source.read_rows

    def recorded(path: Path, form: Format, skip: int = 0) -> Iterator[Row]:
        read.append((path.name, skip))
        return original(path, form, skip)

    monkeypatch.setattr(file_source, "read_rows", recorded)
    prepare(open_source(str(folder)), out, **SETTINGS)
    again, *rest = read
    assert again == ("0.jsonl", 0)
    assert [name for name, _ in rest] == ([] if finished else ["2.jsonl"])


def test_a_fixed_line_lets_the_same_command_go_on(tmp_path: Path, folder: Path) -> None:
    expected = tmp_path / "expected"
    prepare(open_source(str(folder)), expected, **SETTINGS)
    out, path = tmp_path / "out", folder / "2.jsonl"
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:15], b'{"text": null}\n', *lines[15:]]))
    for _ in range(2):
        message = error_of(lambda: prepare(open_source(str(folder)), out, **SETTINGS))
        assert f"{path} line 16" in message
        assert "run the same command again" in message
    assert place_of(out) >= (2, 5), "the work before the bad line is kept"
    path.write_bytes(good)
    prepare(open_source(str(folder)), out, **SETTINGS)
    assert npy(out) == npy(expected)


def test_a_fixed_row_of_parquet_lets_the_same_command_go_on(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.parquet", [*DOCUMENTS[:40], None, *DOCUMENTS[40:]]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    message = error_of(lambda: prepare(open_source(str(path)), tmp_path / "out", **SETTINGS))
    assert f"{path} row 41" in message
    pq.write_table(pa.table({"text": DOCUMENTS}), path, row_group_size=11)
    prepare(open_source(str(path)), tmp_path / "out", **SETTINGS)
    prepare(open_source(str(path)), tmp_path / "expected", **SETTINGS)
    assert npy(tmp_path / "out") == npy(tmp_path / "expected")


@pytest.mark.parametrize("remedy", ["removed", "fetched again"])
def test_a_corrupt_file_may_be_removed_or_fetched_again(tmp_path: Path, folder: Path, remedy: str) -> None:
    out, path = tmp_path / "out", folder / "2.jsonl"
    good = path.read_bytes()
    path.write_bytes(b"\x1f\x8b\xff\n" + good)
    assert f"{path} line 1:" in error_of(lambda: prepare(open_source(str(folder)), out, **SETTINGS))
    assert place_of(out)[0] >= 1
    if remedy == "removed":
        path.unlink()
    else:
        path.write_bytes(good)
    manifest = prepare(open_source(str(folder)), out, **SETTINGS)
    prepare(open_source(str(folder)), tmp_path / "expected", **SETTINGS)
    assert npy(out) == npy(tmp_path / "expected")
    assert [name for name, *_ in manifest["sources"][0]["files"]] == [p.name for p in sorted(folder.iterdir())]


def test_nothing_prepared_yet_means_nothing_to_keep(tmp_path: Path) -> None:
    """A wrong --text-key is found at the first row; the right one may use the same folder."""
    path = write_corpus(tmp_path / "a.jsonl", DOCUMENTS)
    path.write_text(path.read_text().replace('"text"', '"body"'))
    out = tmp_path / "out"
    assert "did you mean" in error_of(lambda: prepare(open_source(str(path), text_key="bodi"), out, **SETTINGS))
    prepare(open_source(str(path), text_key="body"), out, **SETTINGS)
    assert len(documents_of(out, "train") + documents_of(out, "val")) == len(DOCUMENTS)


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "added at the end"])
@pytest.mark.parametrize("finished", [True, False])
def test_other_files_before_the_cursor_are_refused(tmp_path: Path, folder: Path, change: str, finished: bool) -> None:
    out = tmp_path / "out"
    interrupted(folder, out, 1)
    if finished:
        prepare(open_source(str(folder)), out, **SETTINGS)
    first = folder / "0.jsonl"
    if change == "added":
        write_corpus(folder / "00.jsonl", ["new"])
    elif change == "removed":
        first.unlink()
    elif change == "renamed":
        first.rename(folder / "00.jsonl")
    else:
        write_corpus(folder / "9.jsonl", ["new"])
    if change == "added at the end" and not finished:
        assert prepare(open_source(str(folder)), out, **SETTINGS)["documents"] == len(DOCUMENTS) + 1
    else:
        assert "something else" in error_of(lambda: prepare(open_source(str(folder)), out, **SETTINGS))


def test_changed_settings_are_named_as_options(tmp_path: Path, folder: Path) -> None:
    prepare(open_source(str(folder)), tmp_path / "out", **SETTINGS)
    other = SETTINGS | {"val_fraction": 0.2, "shard_tokens": 501}
    message = error_of(lambda: prepare(open_source(str(folder), text_key="body"), tmp_path / "out", **other))
    for part in ("--text-key was text, is body", "--val-fraction was 0.1, is 0.2", "--shard-tokens was 500, is 501"):
        assert part in message


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_version_0_1_0_goes_on(tmp_path: Path, folder: Path, finished: bool) -> None:
    """It knows names and sizes only, so that is all that can be compared."""
    expected, out = tmp_path / "expected", tmp_path / "out"
    prepare(open_source(str(folder)), expected, **SETTINGS)
    interrupted(folder, out, 1)
    if finished:
        prepare(open_source(str(folder)), out, **SETTINGS)
    path = out / ("manifest.json" if finished else "journal.json")
    state = json.loads(path.read_text())
    sizes = [[p.name, p.stat().st_size] for p in sorted(folder.iterdir())]
    (source,) = state.pop("sources")
    state["identity"]["source"] = {"files": sizes, "text_key": "text"}
    for key in ("skipped", "tail_tokens"):
        del state[key]
    del state["identity"]["val"]
    if finished:
        state["checksum"] = manifest_checksum(state)
    else:
        state["cursor"] = {key: source["cursor"][key] for key in ("file", "row")}
    path.write_text(json.dumps(state))
    (folder / "0.jsonl").touch()
    prepare(open_source(str(folder)), out, **SETTINGS)
    assert npy(out) == npy(expected)
    path.write_text(json.dumps(state))
    (folder / "0.jsonl").write_text('{"text": "another size"}\n')
    assert "something else" in error_of(lambda: prepare(open_source(str(folder)), out, **SETTINGS)) or not finished


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that is not complete: its first part must not pass for the whole."""
    path, out = write_corpus(tmp_path / "a.jsonl", DOCUMENTS[:30]), tmp_path / "out"
    rows = file_source.read_rows

    def growing(path: Path, form: Format, skip: int = 0) -> Iterator[Row]:
        yield from rows(path, form, skip)
        write_corpus(path, DOCUMENTS)

    with monkeypatch.context() as patch:
        patch.setattr(file_source, "read_rows", growing)
        message = error_of(lambda: prepare(open_source(str(path)), out, **SETTINGS))
    assert f"{path}: has changed while it was read" in message
    assert prepare(open_source(str(path)), out, **SETTINGS)["documents"] == len(DOCUMENTS)
    prepare(open_source(str(path)), tmp_path / "expected", **SETTINGS)
    assert npy(out) == npy(tmp_path / "expected")


# --- bad rows --------------------------------------------------------------------------------------------------------


def bad_corpus(path: Path) -> Path:
    """Five bad rows among the documents."""
    bad = ['{"text": null}', "oops", '{"text": "cut of', "[1]", r'{"\ud800": "half a surrogate pair"}']
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    for i, line in enumerate(bad):
        lines.insert(3 + 11 * i, line)
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("batches", [1, 4, 6])
def test_skipped_rows_are_counted_across_an_interruption(tmp_path: Path, folder: Path, batches: int) -> None:
    path = bad_corpus(tmp_path / "bad.jsonl")
    source = stop_after(open_source(str(path)), batches, KeyboardInterrupt)
    error_of(lambda: prepare(source, tmp_path / "out", skip_bad=5, **SETTINGS))
    left_out = json.loads((tmp_path / "out" / "journal.json").read_text())["skipped"]["rows"]
    for limit in range(left_out):
        message = error_of(lambda n=limit: prepare(source, tmp_path / "out", skip_bad=n, **SETTINGS))  # type: ignore[misc]
        assert f"give --skip-bad {left_out} or more" in message
    manifest = prepare(open_source(str(path)), tmp_path / "out", skip_bad=5, **SETTINGS)
    assert manifest["skipped"]["rows"] == 5
    places = [row.partition(":")[0] for row in manifest["skipped"]["first"]]
    assert places == [f"{path} line {4 + 11 * i}" for i in range(5)]
    prepare(open_source(str(write_corpus(tmp_path / "good.jsonl", DOCUMENTS))), tmp_path / "good", **SETTINGS)
    assert npy(tmp_path / "out") == npy(tmp_path / "good")


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_more_bad_rows_than_the_limit_are_refused(tmp_path: Path, limit: int) -> None:
    path, out = bad_corpus(tmp_path / "bad.jsonl"), tmp_path / "out"
    message = error_of(lambda: prepare(open_source(str(path)), out, skip_bad=limit, **SETTINGS))
    assert f"{path} line {4 + 11 * limit}:" in message
    assert f"--skip-bad {limit or 'N'}" in message
    assert prepare(open_source(str(path)), out, skip_bad=5, **SETTINGS)["skipped"]["rows"] == 5


def test_advice_about_a_bad_row_can_be_followed(tmp_path: Path) -> None:
    """Another key only while no document is prepared; the file only if it is here."""
    row = as_row(3, "someone/stories row 7", "text", remedy="")
    batch = DocumentBatch([], {}, None, (row,))  # type: ignore[arg-type]
    for documents, skip_bad, advice in (
        (0, 0, "choose another --text-key; or leave out up to N such rows with --skip-bad N"),
        (9, 0, "leave out up to N such rows with --skip-bad N"),
    ):
        message = error_of(lambda d=documents, n=skip_bad: Journal({}, [], d).note(Reading(), batch, n))  # type: ignore[misc]
        assert message == f"someone/stories row 7: 'text' is 3, not text; {advice}"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 700 + b'"}\n{"body": "x"}\n')
    message = error_of(lambda: prepare(open_source(str(path)), tmp_path / "out", **SETTINGS))
    assert "; fix or remove the line, or name the files to read by a glob, then run the same command again" in message


def test_skipped_rows_are_reported_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bad_corpus(tmp_path / "bad.jsonl")
    command = ["prepare", str(path), "--out", str(tmp_path / "out"), "--val-fraction", "0.1"]
    assert main([*command, "--skip-bad", "0"]) == 2
    assert "--skip-bad N" in capsys.readouterr().err
    assert main([*command, "--skip-bad", "7"]) == 0
    output = capsys.readouterr().out
    assert f"left out 5 bad rows; the first: {path} line 4: 'text' is None, not text" in output
