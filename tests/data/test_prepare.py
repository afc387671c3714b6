"""Every document once, in order, and the same bytes however often the preparation was killed and on how many cores."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.data import prepare as module
from megagpt.data import sources
from megagpt.data.prepare import encode_documents, prepare
from megagpt.data.shards import open_stream, verify
from megagpt.data.sources import Batch, Source, open_source
from megagpt.data.tokenizer import END_OF_TEXT, gpt2
from megagpt.errors import ExpectedError

Prepare = Callable[[Path], dict[str, Any]]


def make_documents(count: int, seed: int = 0, longest: int = 80) -> list[str]:
    """Texts no two of which are equal; a few are empty, a few spell the end-of-text token."""
    draw = random.Random(seed)
    words = ["the", "of", "token", "shard", "naïve", "42", "日本", "block,", "end.", "\n\n", "<|endoftext|>", "  "]
    texts = [f"{seed}/{i} " + " ".join(draw.choices(words, k=draw.randint(0, longest))) for i in range(count)]
    for i in range(3, count, 17):
        texts[i] = ""
    return texts


def write_corpus(path: Path, documents: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def documents_of(folder: Path, split: str) -> list[str]:
    """The documents that the shards hold, read by numpy and cut at end-of-text."""
    files = sorted(p for p in folder.glob(f"{split}_*.npy") if not p.name.endswith(".crc32.npy"))
    tokens = np.concatenate([np.load(p) for p in files]) if files else np.empty(0, np.uint16)
    assert not len(tokens) or tokens[-1] == END_OF_TEXT
    pieces = np.split(tokens, np.flatnonzero(tokens == END_OF_TEXT) + 1)[:-1]
    return [gpt2().decode(piece[:-1].tolist()) for piece in pieces]


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ExpectedError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_unfinished(folder: Path, expected: dict[str, bytes]) -> None:
    """Nothing in a killed folder passes for a whole corpus, and what has a shard's name is a whole shard."""
    found = contents(folder) if folder.exists() else {}
    assert "manifest.json" not in found or found["manifest.json"] == expected["manifest.json"]
    for name, data in found.items():
        if name.endswith(".npy"):
            assert data == expected[name], f"{name} has its name, and is not whole"
    if "manifest.json" not in found and found:
        message = error_of(lambda: open_stream(folder, "train"))
        assert "not finished" in message or set(found) == {"journal.json.tmp"}


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode in this process: the same batches and tokens without the second that a pool takes to start."""

    def encoded(batches: Iterable[Batch], workers: int | None) -> Iterator[tuple[Batch, tuple[np.ndarray, np.ndarray]]]:
        return ((batch, encode_documents(batch.documents)) for batch in batches)

    monkeypatch.setattr(module, "_encoded", encoded)
    # Nor is the power cut here; the disk's patience is not what is tested.
    monkeypatch.setattr(os, "fsync", lambda file: None)


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("val_fraction", [0.0, 0.005, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shard_tokens", [97, 1000, 10**8])
def test_every_document_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val_fraction: float, shard_tokens: int
) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 2000)
    texts = make_documents(300)
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", texts)))
    manifest = prepare(source, tmp_path / "out", val_fraction=val_fraction, shard_tokens=shard_tokens)
    texts = [text for text in texts if text]
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    held_out = set(val)
    assert train == [text for text in texts if text not in held_out]
    assert val == [text for text in texts if text in held_out]
    # An even spread: the share is right to half a document after each of them.
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
def test_documents_that_fill_a_shard_exactly(tmp_path: Path) -> None:
    """Ten tokens each with their end; shards of ten, of twenty, and of one token."""
    texts = ["one two three four five six seven eight nine"] * 6
    assert len(gpt2().encode_ordinary(texts[0])) == 9
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", texts)))
    for shard_tokens, count in ((10, 6), (20, 3), (60, 1), (1, 60), (7, 9)):
        manifest = prepare(source, tmp_path / str(shard_tokens), val_fraction=0.0, shard_tokens=shard_tokens)
        shards = manifest["splits"]["train"]["shards"]
        assert len(shards) == count
        assert sum(shard["documents"] for shard in shards) == 6
        assert documents_of(tmp_path / str(shard_tokens), "train") == texts


def test_the_same_bytes_on_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 3000)
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(400))))
    for workers in (1, 2, 5):
        prepare(source, tmp_path / str(workers), val_fraction=0.1, shard_tokens=5000, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


@pytest.mark.usefixtures("inline")
def test_the_same_bytes_whatever_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(200))))
    for characters in (1, 1000, 10**6):
        monkeypatch.setattr(sources, "_BATCH_CHARACTERS", characters)
        prepare(source, tmp_path / str(characters), val_fraction=0.1, shard_tokens=3000)
    assert contents(tmp_path / "1") == contents(tmp_path / "1000") == contents(tmp_path / "1000000")


@pytest.mark.usefixtures("inline")
def test_report_counts_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 1000)
    calls: list[tuple[int, int, float | None]] = []
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(100))))
    manifest = prepare(source, tmp_path / "out", val_fraction=0.1, report=lambda *call: calls.append(call))
    assert len(calls) > 3
    assert calls == sorted(calls)
    assert calls[-1] == (manifest["documents"], manifest["tokens"], 1.0)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", make_documents(50))
    command = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--val-fraction", "0.1", "--workers", "1"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert f"{len([t for t in make_documents(50) if t])} documents" in output
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main([*command[:-1], "0"]) == 2
    assert "--workers" in capsys.readouterr().err


# --- again, and with something else ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(50))))
    manifest = prepare(source, tmp_path / "out", val_fraction=0.1)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir()}

    def forbidden(cursor: object) -> Iterator[Batch]:
        raise AssertionError("the source must not be read again")

    assert prepare(Source(source.name, forbidden, source.identity), tmp_path / "out", val_fraction=0.1) == manifest
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir()} == before


def stop_after(source: Source, batches: int, error: type[BaseException]) -> Source:
    """The same source, whose reading ends with an error."""

    def limited(cursor: dict[str, Any] | None) -> Iterator[Batch]:
        for i, batch in enumerate(source.batches(cursor)):
            if i == batches:
                raise error
            yield batch

    return Source(source.name, limited, source.identity)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("finished", [True, False])
def test_something_else_into_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 1000)
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
def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(20))))
    before = contents(tmp_path)
    assert str(tmp_path) in error_of(lambda: prepare(source, tmp_path, val_fraction=0.1))
    assert contents(tmp_path) == before
    assert str(tmp_path / "a.jsonl") in error_of(lambda: prepare(source, tmp_path / "a.jsonl", val_fraction=0.1))
    assert str(tmp_path / "a.jsonl") in error_of(lambda: prepare(source, tmp_path / "a.jsonl" / "x", val_fraction=0.1))
    assert contents(tmp_path) == before
    (tmp_path / "new").mkdir()
    prepare(source, tmp_path / "new", val_fraction=0.1)


# --- what a user can get wrong ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("documents", [[], [""], ["", "", ""]])
def test_an_empty_corpus(tmp_path: Path, documents: list[str]) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", documents)))
    for _ in range(2):
        message = error_of(lambda: prepare(source, tmp_path / "out"))
        assert str(tmp_path / "a.jsonl") in message
        assert "empty" in message
    error_of(lambda: open_stream(tmp_path / "out", "train"))


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("count", [1, 2, 7, 33, 99])
def test_a_split_without_documents(tmp_path: Path, count: int) -> None:
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
def test_a_bad_fraction(tmp_path: Path, val_fraction: float) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(20))))
    assert "--val-fraction" in error_of(lambda: prepare(source, tmp_path / "out", val_fraction=val_fraction))
    assert "--shard-tokens" in error_of(lambda: prepare(source, tmp_path / "out", shard_tokens=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("inline")
def test_a_bad_line_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 100)
    path = write_corpus(tmp_path / "a.jsonl", make_documents(20))
    path.write_text(path.read_text() + "oops\n")
    source = open_source(str(path))
    for _ in range(2):
        assert f"{path} line 21:" in error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.1))
    assert "not finished" in error_of(lambda: open_stream(tmp_path / "out", "train"))


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", [])
    for arguments in ([str(corpus)], [str(tmp_path / "none.jsonl")], [str(corpus), "--val-fraction", "2"]):
        assert main(["prepare", *arguments, "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("megagpt: error: ")


# --- interruptions, one at a time ------------------------------------------------------------------------------------


@pytest.fixture
def reference(tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch) -> tuple[Prepare, dict[str, bytes]]:
    """A preparation of some shards of both splits, journalled after every batch; and what it gives undisturbed."""
    monkeypatch.setattr(sources, "_BATCH_CHARACTERS", 900)
    monkeypatch.setattr(module, "_JOURNAL_SECONDS", -1.0)
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(60))))

    def run(folder: Path) -> dict[str, Any]:
        return prepare(source, folder, val_fraction=0.2, shard_tokens=800)

    manifest = run(tmp_path / "reference")
    assert all(len(split["shards"]) >= 2 for split in manifest["splits"].values())
    return run, contents(tmp_path / "reference")


class Killed(BaseException):
    """What no `except Exception` catches, as no handler runs when a process is killed."""


class CrashPoints:
    """Makes the process "die" before or after the k-th change to the file system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.after = -1, False
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "fsync"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise Killed
            result = original(*arguments, **options)
            if self.left == 0:
                raise Killed
            return result

        return call

    def survives(self, action: Callable[[], object], left: int, after: bool) -> bool:
        self.left, self.after = left, after
        try:
            action()
        except Killed:
            return False
        finally:
            self.left = -1
        return True


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_step_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple[Prepare, dict[str, bytes]], after: bool
) -> None:
    run, expected = reference
    crash = CrashPoints(monkeypatch)
    wrong: dict[int, str] = {}
    for step in range(1, 1000):
        folder = tmp_path / f"killed_{step}"
        if crash.survives(lambda folder=folder: run(folder), step, after):  # type: ignore[misc]
            break
        check_unfinished(folder, expected)
        try:
            run(folder)
        except ExpectedError as error:
            wrong[step] = str(error)
            continue
        if contents(folder) != expected:
            wrong[step] = f"differs in {sorted({name for name, _ in contents(folder).items() ^ expected.items()})}"
    assert not wrong
    assert 30 < step < 999


@pytest.mark.parametrize("steps", [29, 37, 50])
def test_killed_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple[Prepare, dict[str, bytes]], steps: int
) -> None:
    """No start gets far; together they arrive."""
    run, expected = reference
    crash = CrashPoints(monkeypatch)
    kills = 0
    while not crash.survives(lambda: run(tmp_path / "killed"), steps, after=kills % 2 == 0):
        check_unfinished(tmp_path / "killed", expected)
        kills += 1
        assert kills < 300
    assert kills >= 2
    assert contents(tmp_path / "killed") == expected


@pytest.mark.parametrize("batches", [0, 1, 5])
@pytest.mark.parametrize("journal_seconds", [-1.0, 3600.0])
def test_ctrl_c_can_be_resumed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: tuple[Prepare, dict[str, bytes]],
    batches: int,
    journal_seconds: float,
) -> None:
    run, expected = reference
    monkeypatch.setattr(module, "_JOURNAL_SECONDS", journal_seconds)
    source = stop_after(open_source(str(tmp_path / "a.jsonl")), batches, KeyboardInterrupt)
    for _ in range(2):
        message = error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.2, shard_tokens=800))
        assert "run the same command again" in message
        check_unfinished(tmp_path / "out", expected)
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_crash_between_journals_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple[Prepare, dict[str, bytes]]
) -> None:
    """The journal is old, shards have got their names since, and the partial files are longer than it knows."""
    run, expected = reference
    source = open_source(str(tmp_path / "a.jsonl"))
    for early in (0, 1, 3):
        for late in (1, 4, 8):
            folder = tmp_path / f"{early}_{late}"
            for batches, seconds in ((early, -1.0), (late, 3600.0)):
                monkeypatch.setattr(module, "_JOURNAL_SECONDS", seconds)
                with pytest.raises(Killed):
                    prepare(stop_after(source, batches, Killed), folder, val_fraction=0.2, shard_tokens=800)
                check_unfinished(folder, expected)
            run(folder)
            assert contents(folder) == expected


def test_a_damaged_journal_is_not_built_upon(tmp_path: Path, reference: tuple[Prepare, dict[str, bytes]]) -> None:
    run, _ = reference
    source = stop_after(open_source(str(tmp_path / "a.jsonl")), 5, KeyboardInterrupt)
    error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.2, shard_tokens=800))
    journal = tmp_path / "out" / "journal.json"
    for text in ("", "{", "[]", "{}", journal.read_text()[:-40]):
        journal.write_text(text)
        assert str(journal) in error_of(lambda: run(tmp_path / "out"))


@pytest.mark.parametrize("change", ["gone", "short"])
def test_lost_partial_files_are_not_filled_with_zeros(
    tmp_path: Path, reference: tuple[Prepare, dict[str, bytes]], change: str
) -> None:
    run, expected = reference
    source = stop_after(open_source(str(tmp_path / "a.jsonl")), 5, KeyboardInterrupt)
    error_of(lambda: prepare(source, tmp_path / "out", val_fraction=0.2, shard_tokens=800))
    (partial,) = (tmp_path / "out").glob("train_*.partial")
    assert partial.stat().st_size > 200
    if change == "gone":
        partial.unlink()
    else:
        partial.write_bytes(partial.read_bytes()[:150])
    try:
        run(tmp_path / "out")
        complaint = ""
    except ExpectedError as error:
        complaint = str(error)
    assert str(tmp_path / "out") in complaint or contents(tmp_path / "out") == expected


# --- real processes --------------------------------------------------------------------------------------------------

# The command line with a journal and batches that suit a small corpus; `pace` seconds of rest after each batch give
# the test time to interfere.
_PROGRAM = """
import sys, time
from megagpt.data import prepare, progress, sources
pace = float(sys.argv.pop(1))
prepare._JOURNAL_SECONDS = 0.01
sources._BATCH_CHARACTERS = 10_000
progress.PrepareProgress.report = lambda *_: time.sleep(pace)
from megagpt.cli import main
sys.exit(main())
"""


def start(corpus: Path, out: Path, pace: float = 0.0, workers: int = 2) -> subprocess.Popen[str]:
    """`megagpt prepare` in a process group of its own."""
    options = ["--out", str(out), "--val-fraction", "0.05", "--shard-tokens", "60000", "--workers", str(workers)]
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(pace), "prepare", str(corpus), *options],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: a shell that runs the suite in the background lets its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def journalled(out: Path) -> int:
    """Documents that the journal knows of."""
    try:
        return int(json.loads((out / "journal.json").read_text())["documents"])
    except FileNotFoundError:
        return 0


def wait_for_progress(process: subprocess.Popen[str], out: Path, beyond: int) -> None:
    deadline = time.monotonic() + 60
    while journalled(out) <= beyond and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and what it wrote to standard error."""
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A corpus of some hundred batches, and what an undisturbed preparation of it gives."""
    folder = tmp_path_factory.mktemp("big")
    corpus = write_corpus(folder / "a.jsonl", make_documents(4000, seed=1, longest=300))
    code, err = finish(start(corpus, folder / "out"))
    assert (code, err) == (0, "")
    return corpus, contents(folder / "out")


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path, big: tuple[Path, dict[str, bytes]]) -> None:
    corpus, expected = big
    out, draw, kills, in_the_middle = tmp_path / "out", random.Random(), 0, 0
    while kills < 6:
        process = start(corpus, out, pace=0.01)
        try:
            before = journalled(out)
            if kills == 3:
                time.sleep(draw.uniform(0, 0.7))  # perhaps before it has begun
            else:
                wait_for_progress(process, out, before)
                time.sleep(draw.uniform(0, 0.06))
            alive = process.poll() is None
            in_the_middle += alive and journalled(out) > before
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            finish(process)
        assert alive, "the corpus is too small for this test"
        kills += 1
        check_unfinished(out, expected)
    assert in_the_middle >= 5
    assert finish(start(corpus, out)) == (0, "")
    assert contents(out) == expected


@pytest.mark.parametrize("moment", ["starting", "first batch", "working"])
def test_sigint_to_the_whole_group(tmp_path: Path, big: tuple[Path, dict[str, bytes]], moment: str) -> None:
    """Ctrl-C in a terminal reaches the workers too, while they start as well."""
    corpus, expected = big
    process = start(corpus, tmp_path / "out", pace=0.01, workers=4)
    if moment == "starting":
        while not (tmp_path / "out" / "journal.json").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.1)
    else:
        wait_for_progress(process, tmp_path / "out", 0 if moment == "first batch" else 1500)
    os.killpg(process.pid, signal.SIGINT)
    code, err = finish(process)
    assert code in (2, 130)
    assert len(err.splitlines()) == 1, err
    assert err.startswith("megagpt: ")
    check_unfinished(tmp_path / "out", expected)
    assert finish(start(corpus, tmp_path / "out")) == (0, "")
    assert contents(tmp_path / "out") == expected


def test_two_at_once(tmp_path: Path, big: tuple[Path, dict[str, bytes]]) -> None:
    """The same command started again while the first still runs: it must not write into the other's shards."""
    corpus, expected = big
    first = start(corpus, tmp_path / "out", pace=0.05)
    try:
        wait_for_progress(first, tmp_path / "out", 0)
        code, err = finish(start(corpus, tmp_path / "out"))
        still_running = first.poll() is None
    finally:
        stop(first)
    assert still_running
    assert code == 2
    assert len(err.splitlines()) == 1
    assert str(tmp_path / "out") in err
    assert finish(start(corpus, tmp_path / "out")) == (0, "")
    assert contents(tmp_path / "out") == expected


in_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")


@in_proc
def test_a_worker_that_dies(tmp_path: Path, big: tuple[Path, dict[str, bytes]]) -> None:
    """As the kernel ends one when memory is short."""
    corpus, expected = big
    process = start(corpus, tmp_path / "out", pace=0.01)
    wait_for_progress(process, tmp_path / "out", 0)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    code, err = finish(process)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "run the same command again" in err
    check_unfinished(tmp_path / "out", expected)
    assert finish(start(corpus, tmp_path / "out")) == (0, "")
    assert contents(tmp_path / "out") == expected


@in_proc
def test_no_worker_outlives_a_killed_parent(tmp_path: Path, big: tuple[Path, dict[str, bytes]]) -> None:
    """`kill -9` of the one process that a user knows of."""
    corpus, _ = big
    process = start(corpus, tmp_path / "out", pace=0.01)
    try:
        wait_for_progress(process, tmp_path / "out", 0)
        workers = workers_of(process)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 8
        while (left := [w for w in workers if is_worker(Path(f"/proc/{w}"))]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finally:
        stop(process)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    entries = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    workers = [int(entry.name) for entry in entries if is_worker(entry, process.pid)]
    assert len(workers) == 2
    return workers


def is_worker(process: Path, parent: int | None = None) -> bool:
    try:
        state, parent_id = (process / "stat").read_text().rpartition(")")[2].split()[:2]
        is_child = parent is None or int(parent_id) == parent
        return state != "Z" and is_child and b"spawn_main" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def stop(process: subprocess.Popen[str]) -> None:
    """End what is left of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    finish(process)


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many pages; called again, it is resized."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def resize(pages: int) -> Path:
        nonlocal mounted
        size = f"size={pages * os.sysconf('SC_PAGE_SIZE')}"
        options = f"remount,{size}" if mounted else size
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted = True
        return folder

    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root on Linux")
    yield resize
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12])
def test_full_disk(
    disk: Callable[[int], Path],
    tmp_path: Path,
    reference: tuple[Prepare, dict[str, bytes]],
    capsys: pytest.CaptureFixture[str],
    pages: int,
) -> None:
    _, expected = reference
    folder = disk(pages) / "out"
    command = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(folder), "--val-fraction", "0.2"]
    command += ["--shard-tokens", "800"]
    for _ in range(2):
        assert main(command) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert f"{folder}: disk full" in lines[0]
        check_unfinished(folder, expected)
    disk(10_000)
    assert main(command) == 0
    assert contents(folder) == expected


def test_full_disk_of_a_real_process(
    disk: Callable[[int], Path], tmp_path: Path, big: tuple[Path, dict[str, bytes]]
) -> None:
    corpus, expected = big
    folder = disk(sum(map(len, expected.values())) // os.sysconf("SC_PAGE_SIZE") // 2) / "out"
    code, err = finish(start(corpus, folder))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"{folder}: disk full" in err
    check_unfinished(folder, expected)
    assert journalled(folder) > 0
    disk(100_000)
    assert finish(start(corpus, folder)) == (0, "")
    assert contents(folder) == expected


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC, errno.EIO])
def test_disk_errors_while_flushing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple[Prepare, dict[str, bytes]], code: int
) -> None:
    """Some file systems say only then that there is no room."""
    run, expected = reference
    original, calls = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise OSError(code, os.strerror(code))
        original(file)

    monkeypatch.setattr(os, "fsync", fsync)
    message = error_of(lambda: run(tmp_path / "out"))
    assert str(tmp_path / "out") in message
    assert ("disk full" in message) == (code != errno.EIO)
    check_unfinished(tmp_path / "out", expected)
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == expected
