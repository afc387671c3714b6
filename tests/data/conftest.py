"""Preparations and folders of shards that several files of tests share."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagpt.data import documents as batching
from megagpt.data import prepare as module
from megagpt.data.documents import DocumentBatch
from megagpt.data.encoding import Encoded, encode_documents
from megagpt.data.loader import Corpus, open_corpus
from megagpt.data.prepare import prepare
from megagpt.data.sources import open_source
from tests.data.folders import CONTEXT, data_of, write_bin
from tests.data.preparation import Prepare, contents, finish, make_documents, start, write_corpus


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode in this process: the same batches and tokens without the second that a pool takes to start."""

    def encoded(batches: Iterable[DocumentBatch], workers: int | None) -> Iterator[tuple[DocumentBatch, Encoded]]:
        return ((batch, encode_documents(batch.documents)) for batch in batches)

    monkeypatch.setattr(module, "encoded", encoded)
    # No test cuts the power, so nothing need wait for the disk.
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def reference(tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch) -> tuple[Prepare, dict[str, bytes]]:
    """A preparation of several shards of both splits, journalled after every batch, and its undisturbed result."""
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", 900)
    monkeypatch.setattr(module, "_JOURNAL_SECONDS", -1.0)
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", make_documents(60))))

    def run(folder: Path) -> dict[str, Any]:
        return prepare(source, folder, val_fraction=0.2, shard_tokens=800)

    manifest = run(tmp_path / "reference")
    assert all(len(split["shards"]) >= 2 for split in manifest["splits"].values())
    return run, contents(tmp_path / "reference")


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A corpus of more than a hundred batches, and the result of an undisturbed preparation by real processes."""
    folder = tmp_path_factory.mktemp("big")
    corpus = write_corpus(folder / "a.jsonl", make_documents(2000, seed=1, longest=300))
    code, err = finish(start(corpus, folder / "out"))
    assert (code, err) == (0, "")
    return corpus, contents(folder / "out")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three sources without a common token: a sequence is known by its first token."""
    made = []
    for i, counts in enumerate(([1000, 700, 1], [161], [350, 350])):
        folder = tmp_path_factory.mktemp(f"source{i}")
        first = 10_000 * i
        for j, count in enumerate(counts):
            write_bin(folder / f"x_train_{j:03d}.bin", np.arange(first, first + count))
            first += count
        write_bin(folder / "x_val_000.bin", np.arange(10_000 * i + 5000, 10_000 * i + 5000 + 100 * (i + 1)))
        made.append(folder)
    return made


@pytest.fixture(scope="session")
def mixture(folders: list[Path]) -> Corpus:
    """The training split of the three sources, weighted 5 : 2 : 3."""
    return open_corpus(data_of(folders), "train", CONTEXT, seed=3)
