"""Text to token shards: parallel, resumable after a kill at any moment, the same bytes however often it was killed.

This process reads documents in order, a pool of processes encodes them, and this process appends them in order to one
growing `.partial` file per split. The journal records how much of the source is safely in the files; after a kill the
files are cut back to it and reading resumes at its cursor. A full shard gets its checksums, then its name; the manifest
is last.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megagpt.data import tokenizer
from megagpt.data.documents import Source
from megagpt.data.encoding import encoded
from megagpt.data.journal import Journal, Json, check_finished, load_journal
from megagpt.data.shard_writer import DTYPE, SplitWriter
from megagpt.data.shards import FORMAT, JOURNAL, MANIFEST, manifest_checksum, read_manifest
from megagpt.data.tail import copy_tail
from megagpt.errors import ExpectedError, Interrupted, UserError
from megagpt.files import named_path, write_atomic

SHARD_TOKENS = 100_000_000
VAL_FRACTION = 0.005
_JOURNAL_SECONDS = 5.0  # between two journals: the work that a kill can lose

Report = Callable[[int, int, float | None], None]
"""Called with documents, tokens, and the share of the source that is done (0 to 1; None if its size is unknown)."""


def prepare(
    source: Source,
    folder: str | Path,
    *,
    val: Source | None = None,
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    skip_bad: int = 0,
    report: Report = lambda documents, tokens, fraction: None,
) -> Json:
    """Encode every document of `source` once into `folder`, end-of-text after each; returns the manifest.

    Validation text is `val`, or else a share of the documents: document i if i * val_fraction passes a half-integer, an
    even spread, the same for any number of workers. If that is no document, or all, it is the last `val_fraction` of
    the tokens, as with one long text. Up to `skip_bad` rows without text are left out and counted.

    A second call resumes an interrupted preparation, and does nothing if the folder is finished. Raises UserError if
    the folder holds something else, or the text is empty or unreadable, and Interrupted after Ctrl-C."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: must be at least 0 and below 1")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens {shard_tokens}: must be at least 1")
    folder = named_path(folder)
    sources = [source, val] if val else [source]
    ranks = {"name": tokenizer.NAME, "sha256": tokenizer.RANKS_SHA256}
    identity: Json = {"source": source.identity, "val": val.identity if val else None, "tokenizer": ranks}
    identity |= {"val_fraction": 0.0 if val else val_fraction, "shard_tokens": shard_tokens}
    if manifest := _finished(folder, identity, sources):
        return manifest
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose a folder for --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            # Another process may have finished it meanwhile.
            if manifest := _finished(folder, identity, sources):
                return manifest
            if not (folder / JOURNAL).exists() and {p.name for p in folder.iterdir()} - {JOURNAL + ".tmp"}:
                raise UserError(f"{folder}: is not empty and holds no unfinished preparation; choose another --out")
            return _Preparation(sources, folder, identity, workers, skip_bad, report).run()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: disk full; free some space, run the same command again to resume") from None
        raise UserError(f"{folder}: {error}") from None


def _finished(folder: Path, identity: Json, sources: list[Source]) -> Json | None:
    """The manifest of a finished preparation of the same text; None if the folder is not finished."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    check_finished(folder, manifest, identity, sources)
    (folder / JOURNAL).unlink(missing_ok=True)  # left by a kill after the manifest was written
    return manifest


class _Preparation:
    """One call's work in a folder that no other process prepares."""

    def __init__(
        self, sources: list[Source], folder: Path, identity: Json, workers: int | None, skip_bad: int, report: Report
    ) -> None:
        self.sources, self.folder, self.workers = sources, folder, workers
        self.skip_bad, self.report = skip_bad, report
        self.val_fraction, self.shard_tokens = identity["val_fraction"], identity["shard_tokens"]
        self.journal: Journal = load_journal(folder, identity, sources, skip_bad)
        if not self.journal.documents:
            self.journal.save(folder)
        self.splits = {name: self._writer(name, self.journal.splits.get(name)) for name in ("train", "val")}
        self.saved = time.monotonic()

    def run(self) -> Json:
        try:
            for place in range(len(self.sources)):
                self._encode(place)
        except KeyboardInterrupt:
            # The next call cuts off whatever was appended after the last journal.
            repeated = f"at most the last {_JOURNAL_SECONDS:.0f} s are repeated"
            raise Interrupted(f"stopped; run the same command again to resume: {repeated}") from None
        except ExpectedError:
            self._save()  # a bad row may come after days of work
            raise
        self._check()
        self._save()
        return self._finish()

    def _writer(self, name: str, state: Json | None) -> SplitWriter:
        return SplitWriter(self.folder, name, self.shard_tokens, state)

    def _save(self) -> None:
        self.journal.splits = {name: writer.flush() for name, writer in self.splits.items()}
        self.journal.save(self.folder)
        self.saved = time.monotonic()

    def _encode(self, place: int) -> None:
        """Append the rest of a source: the first is for both splits, the second for validation."""
        journal, reading = self.journal, self.journal.readings[place]
        for batch, (tokens, lengths) in encoded(self.sources[place].batches(reading.cursor), self.workers):
            journal.note(reading, batch, self.skip_bad)
            ends = np.cumsum(lengths)
            for start, end in zip(ends - lengths, ends, strict=True):
                held_out = place > 0 or self._is_held_out(journal.documents)
                self.splits["val" if held_out else "train"].append(tokens[start:end])
                journal.documents += 1
            if time.monotonic() - self.saved > _JOURNAL_SECONDS:
                self._save()
            fraction = None if place else batch.fraction
            self.report(journal.documents, sum(w.total for w in self.splits.values()), fraction)

    def _is_held_out(self, document: int) -> bool:
        return int((document + 1) * self.val_fraction + 0.5) > int(document * self.val_fraction + 0.5)

    def _check(self) -> None:
        """Hold out the end of the text if whole documents leave a split empty. Raises UserError if one stays empty."""
        train, val = self.splits["train"], self.splits["val"]
        name = self.sources[0].name
        if not train.total and (not val.total or len(self.sources) > 1):
            raise UserError(f"{name}: the corpus is empty: none of its documents holds text; choose another source")
        if not train.total:
            self._move("val", "train", val.total)
            train, val = self.splits["train"], self.splits["val"]
        if not val.total and len(self.sources) > 1:
            raise UserError(f"{self.sources[1].name}: none of its documents holds text; choose another --val")
        if val.total or not self.val_fraction:
            return
        count = min(int(train.total * self.val_fraction + 0.5), train.total - 2)
        if count < 2:
            least = math.ceil(150 / train.total) / 100
            larger = f" or at least {least}" if least < 0.5 else ""
            problem = f"--val-fraction {self.val_fraction} of its {train.total} tokens is too little to validate on"
            remedy = f"remove {self.folder} and choose --val-fraction 0 (no validation){larger}"
            raise UserError(f"{name}: {problem}; {remedy}")
        self.journal.tail_tokens = count
        self._move("train", "val", count)

    def _move(self, source: str, target: str, count: int) -> None:
        """Move the last tokens of one split to the other."""
        longer = self.splits[source]
        shorter = copy_tail(longer, self.splits[target], count)
        self.journal.splits = {source: shorter, target: self.splits[target].flush()}
        self.journal.save(self.folder)
        longer.file.close()
        self.splits[source] = self._writer(source, shorter)

    def _finish(self) -> Json:
        finished = {name: writer.finish() for name, writer in self.splits.items()}
        total = sum(split["tokens"] for split in finished.values())
        manifest: Json = {"format": FORMAT, "tokenizer": self.journal.identity["tokenizer"], "dtype": DTYPE.str}
        manifest |= {"documents": self.journal.documents, "tokens": total, "splits": finished} | self.journal.record
        manifest["sources"] = [{"files": [list(file) for file in reading.files]} for reading in self.journal.readings]
        manifest["checksum"] = manifest_checksum(manifest)
        write_atomic(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        (self.folder / JOURNAL).unlink()
        return manifest


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder against a second preparation. The lock ends with the process, even if it is killed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another process is preparing it now; wait for it or choose another --out") from None
    finally:
        os.close(handle)
