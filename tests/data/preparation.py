"""Corpora to prepare, real `megagpt data prepare` processes, and checks of the folders that they leave."""

import contextlib
import dataclasses
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

from megagpt.data.documents import DocumentBatch, Source
from megagpt.data.prepare import prepare
from megagpt.data.shards import open_stream
from megagpt.data.sources import open_source
from megagpt.data.tokenizer import END_OF_TEXT, gpt2
from megagpt.errors import ExpectedError

Prepare = Callable[[Path], dict[str, Any]]


def make_documents(count: int, seed: int = 0, longest: int = 80) -> list[str]:
    """Different texts; a few are empty, a few spell the end-of-text token."""
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
    """A killed folder does not pass for a complete corpus, and a file with a shard's name is a complete shard."""
    found = contents(folder) if folder.exists() else {}
    assert "manifest.json" not in found or found["manifest.json"] == expected["manifest.json"]
    for name, data in found.items():
        if name.endswith(".npy"):
            assert data == expected[name], f"{name} has its name, but is incomplete"
    if "manifest.json" not in found and found:
        message = error_of(lambda: open_stream(folder, "train"))
        assert "not finished" in message or set(found) == {"journal.json.tmp"}


def stop_after(source: Source, batches: int, error: type[BaseException]) -> Source:
    """The same source, but reading it fails after `batches` batches."""

    def limited(cursor: dict[str, Any] | None) -> Iterator[DocumentBatch]:
        for i, batch in enumerate(source.batches(cursor)):
            if i == batches:
                raise error
            yield batch

    return dataclasses.replace(source, batches=limited)


# --- real processes --------------------------------------------------------------------------------------------------

# The command line with a journal and batches for a small corpus; it sleeps `pace` seconds after each batch, so that a
# test has time to interfere.
_PROGRAM = """
import sys, time
from megagpt.data import documents, prepare, progress
pace = float(sys.argv.pop(1))
prepare._JOURNAL_SECONDS = 0.01
documents._BATCH_CHARACTERS = 10_000
progress.PrepareProgress.report = lambda *_: time.sleep(pace)
from megagpt.cli import main
sys.exit(main())
"""


def start(corpus: Path, out: Path, pace: float = 0.0, workers: int = 2) -> subprocess.Popen[str]:
    """`megagpt data prepare` in a process group of its own."""
    options = ["--out", str(out), "--val-fraction", "0.05", "--shard-tokens", "60000", "--workers", str(workers)]
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(pace), "prepare", str(corpus), *options],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: a shell in the background lets its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def resume(corpus: Path, out: Path) -> None:
    """The same preparation as `start`'s, in this process."""
    prepare(open_source(str(corpus)), out, val_fraction=0.05, shard_tokens=60_000, workers=1)


def journalled(out: Path) -> int:
    """Documents that the journal records."""
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
    """Exit code and standard error."""
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def stop(process: subprocess.Popen[str]) -> None:
    """Kill the rest of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    finish(process)
