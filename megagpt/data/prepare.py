"""Text to token shards: parallel, resumable after a kill at any moment, the same bytes however often it was killed.

Documents are read in order by this process, encoded by a pool of processes, and appended in order to one growing
`.partial` file per split. A journal says how far source and files are known to be whole; after a kill the files are
cut back to it and reading goes on at its cursor. A full shard gets its checksums, then its name; the manifest is last.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data import tokenizer
from megagpt.data.shards import (
    FORMAT,
    HEADER_BYTES,
    JOURNAL,
    MANIFEST,
    block_checksums,
    checksum_path,
    manifest_checksum,
    npy_header,
    read_manifest,
)
from megagpt.data.sources import Batch, Source
from megagpt.errors import Interrupted, UserError
from megagpt.files import write_atomic

SHARD_TOKENS = 100_000_000
_JOURNAL_SECONDS = 5.0
_DTYPE = np.dtype("<u2")  # GPT-2's ids stay below 65,536

Report = Callable[[int, int, float | None], None]
"""Called with documents, tokens, and the share of the source that is done."""


def prepare(
    source: Source,
    folder: str | Path,
    *,
    val_fraction: float = 0.005,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    report: Report = lambda documents, tokens, fraction: None,
) -> dict[str, Any]:
    """Encode every document of `source` once into `folder`, end-of-text after each; returns the manifest.

    The document numbered i goes to validation where i * val_fraction passes a half-integer: an even spread, the same
    for any number of workers. Run again after an interruption, it goes on; on a finished folder of the same source it
    does nothing. Raises UserError where the folder holds something else, or the text is empty or unreadable.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: must be at least 0 and below 1")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens {shard_tokens}: must be at least 1")
    folder = Path(folder).expanduser()
    ranks = {"name": tokenizer.NAME, "sha256": tokenizer.RANKS_SHA256}
    identity = {
        "source": source.identity,
        "tokenizer": ranks,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _same_identity(folder, manifest["identity"], identity)
        (folder / JOURNAL).unlink(missing_ok=True)  # a kill may have come between the two
        return manifest
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --out takes a folder")
    if (
        folder.exists()
        and not (folder / JOURNAL).exists()
        and any(p.name != JOURNAL + ".tmp" for p in folder.iterdir())
    ):
        raise UserError(f"{folder}: is not empty and holds no preparation to go on with; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return _prepare(source, folder, identity, val_fraction, shard_tokens, workers, report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: disk full; free some space and run the same command again to go on") from None
        raise UserError(f"{folder}: {error}") from None


def _prepare(
    source: Source,
    folder: Path,
    identity: dict[str, Any],
    val_fraction: float,
    shard_tokens: int,
    workers: int | None,
    report: Report,
) -> dict[str, Any]:
    journal: dict[str, Any] = {"identity": identity, "cursor": None, "documents": 0, "splits": {}}
    if (folder / JOURNAL).exists():
        journal = _read_journal(folder)
        _same_identity(folder, journal["identity"], identity)
    else:
        write_atomic(folder / JOURNAL, json.dumps(journal).encode())
    documents: int = journal["documents"]
    splits = {s: _SplitWriter(folder, s, shard_tokens, journal["splits"].get(s)) for s in ("train", "val")}

    def save(cursor: Any) -> None:
        states = {name: writer.flush() for name, writer in splits.items()}
        state = {"identity": identity, "cursor": cursor, "documents": documents, "splits": states}
        write_atomic(folder / JOURNAL, json.dumps(state).encode())

    saved = time.monotonic()
    cursor = journal["cursor"]
    fraction = None
    try:
        for batch, (tokens, lengths) in _encoded(source.batches(cursor), workers):
            ends = np.cumsum(lengths)
            for start, end in zip(ends - lengths, ends, strict=True):
                held_out = int((documents + 1) * val_fraction + 0.5) > int(documents * val_fraction + 0.5)
                splits["val" if held_out else "train"].append(tokens[start:end])
                documents += 1
            cursor, fraction = batch.cursor, batch.fraction
            if time.monotonic() - saved > _JOURNAL_SECONDS:
                save(cursor)
                saved = time.monotonic()
            report(documents, sum(w.total for w in splits.values()), fraction)
    except KeyboardInterrupt:
        # Between two batches at the latest: what is appended since is cut off again by the next start.
        raise Interrupted(
            f"stopped; run the same command again to go on from the last {_JOURNAL_SECONDS:.0f} s"
        ) from None
    if documents == 0:
        raise UserError(f"{source.name}: the corpus is empty: not one document with text in it")
    if val_fraction and splits["val"].total == 0:
        larger = f" or at least {math.ceil(51 / documents) / 100}" if documents > 1 else ""
        raise UserError(
            f"{source.name}: none of its {documents} document(s) fell to validation at --val-fraction {val_fraction}; "
            f"remove {folder} and choose 0 (no validation){larger}"
        )
    save(cursor)
    manifest = {
        "format": FORMAT,
        "tokenizer": identity["tokenizer"],
        "dtype": _DTYPE.str,
        "documents": documents,
        "tokens": sum(w.total for w in splits.values()),
        "splits": {name: writer.finish() for name, writer in splits.items()},
        "identity": identity,
    }
    manifest["checksum"] = manifest_checksum(manifest)
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    (folder / JOURNAL).unlink()
    return manifest


def _read_journal(folder: Path) -> dict[str, Any]:
    try:
        journal: dict[str, Any] = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        journal["identity"], journal["cursor"], journal["documents"], journal["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / JOURNAL}: not readable ({error!r:.60}); remove {folder} and start over") from None
    return journal


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second preparation; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another process is preparing it now") from None
    finally:
        os.close(handle)


def _same_identity(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"{folder}: was prepared from something else ({key}: {json.dumps(found.get(key))[:80]} there, "
            f"{json.dumps(wanted[key])[:80]} now); remove it or choose another --out"
        )


# --- encoding --------------------------------------------------------------------------------------------------------


def encode_documents(documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the non-empty documents back to back, each with end-of-text behind it; and their lengths."""
    parts, lengths = [], []
    end = np.array([tokenizer.END_OF_TEXT], dtype=_DTYPE)
    for text in documents:
        if text:
            parts += [tokenizer.encode(text).astype(_DTYPE), end]
            lengths.append(len(parts[-2]) + 1)
    return np.concatenate(parts) if parts else np.empty(0, _DTYPE), np.array(lengths, dtype=np.int64)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Put Ctrl-C off. A worker that is started meanwhile inherits that for good: Ctrl-C reaches the whole process
    group, and the parent alone decides what it means."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    tokenizer.gpt2()
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A parent that is killed cannot end its workers: they watch for it themselves.
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encoded(batches: Iterable[Batch], workers: int | None) -> Iterator[tuple[Batch, tuple[np.ndarray, np.ndarray]]]:
    """Each batch with its tokens, in order, at most a few batches ahead of the consumer."""
    workers = workers or os.cpu_count() or 1
    waiting: collections.deque[tuple[Batch, Future[tuple[np.ndarray, np.ndarray]]]] = collections.deque()
    # Spawned, not forked: the parent may hold threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        for batch in batches:
            with _without_interrupts():
                waiting.append((batch, pool.submit(encode_documents, batch.documents)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError("an encoding process died (out of memory?); run the same command again to go on") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- writing ---------------------------------------------------------------------------------------------------------


class _SplitWriter:
    """Appends the documents of one split to shards of at most `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, state: dict[str, Any] | None) -> None:
        state = state or {"shards": [], "tokens": 0, "documents": 0}
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards: list[dict[str, Any]] = state["shards"]
        self.tokens: int = state["tokens"]
        """Tokens in the shard that is being written."""
        self.documents: int = state["documents"]
        """Documents that start in it."""
        self._open()

    @property
    def total(self) -> int:
        return self.tokens + sum(s["tokens"] for s in self.shards)

    def _path(self) -> Path:
        return self.folder / f"{self.split}_{len(self.shards):05d}.npy"

    def _open(self) -> None:
        """Open the unfinished shard, cut back to what the journal knows of it."""
        path, partial = self._path(), self._path().with_suffix(".npy.partial")
        if path.exists():  # got its name, but the journal never heard of it
            path.rename(partial)
        for stale in self.folder.glob(f"{self.split}_*"):
            index = int(stale.name[len(self.split) + 1 :][:5])
            if index > len(self.shards) or (index == len(self.shards) and stale != partial):
                stale.unlink()
        self.file = partial.open("r+b" if partial.exists() else "w+b")
        known = HEADER_BYTES + self.tokens * _DTYPE.itemsize
        if self.tokens and self.file.seek(0, os.SEEK_END) < known:
            raise UserError(f"{partial}: is shorter than what was written to it; remove {self.folder} and start over")
        self.file.truncate(HEADER_BYTES + self.tokens * _DTYPE.itemsize)
        self.file.seek(0, os.SEEK_END)

    def append(self, document: np.ndarray) -> None:
        self.documents += 1
        while True:
            room = self.shard_tokens - self.tokens
            self.file.write(document[:room].tobytes())
            self.tokens += min(room, len(document))
            document = document[room:]
            if self.tokens < self.shard_tokens:
                return
            self._complete()
            self._open()
            if not len(document):
                return

    def flush(self) -> dict[str, Any]:
        """Everything appended so far is on disk; returns the state that says so."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"shards": list(self.shards), "tokens": self.tokens, "documents": self.documents}

    def _complete(self) -> None:
        self.file.seek(0)
        self.file.write(npy_header(_DTYPE, self.tokens))
        self.flush()
        self.file.close()
        path = self._path()
        partial = path.with_suffix(".npy.partial")
        data = np.memmap(partial, dtype=np.uint8, mode="r")
        crcs = block_checksums(data[HEADER_BYTES:].data)
        write_atomic(checksum_path(path), npy_header(crcs.dtype, len(crcs)) + crcs.tobytes())
        digest = hashlib.sha256(data.data).hexdigest()
        partial.rename(path)
        self.shards.append({"file": path.name, "tokens": self.tokens, "documents": self.documents, "sha256": digest})
        self.tokens = self.documents = 0

    def finish(self) -> dict[str, Any]:
        """Complete the last shard; returns the split's part of the manifest."""
        if self.tokens:
            self._complete()
        else:
            self.file.close()
            self._path().with_suffix(".npy.partial").unlink()
        return {
            "tokens": sum(s["tokens"] for s in self.shards),
            "documents": sum(s["documents"] for s in self.shards),
            "shards": self.shards,
        }
