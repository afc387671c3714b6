"""Text to token shards: parallel, resumable after a kill at any moment, the same bytes however often it was killed.

This process reads documents in order, a pool of processes encodes them, and this process appends them in order to one
growing `.partial` file per split. The journal records how much of the source is safely in the files; after a kill the
files are cut back to it and reading resumes at its cursor. A full shard gets its checksums, then its name; the manifest
is last.
"""

import collections
import contextlib
import errno
import fcntl
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
from megagpt.data.shard_writer import DTYPE, SplitWriter
from megagpt.data.shards import FORMAT, JOURNAL, MANIFEST, manifest_checksum, read_manifest
from megagpt.data.sources import DocumentBatch, Source
from megagpt.errors import Interrupted, UserError
from megagpt.files import write_atomic

SHARD_TOKENS = 100_000_000
_JOURNAL_SECONDS = 5.0  # between two journals: the work that a kill can lose

Json = dict[str, Any]
Report = Callable[[int, int, float | None], None]
"""Called with documents, tokens, and the share of the source that is done (0 to 1; None if its size is unknown)."""


def prepare(
    source: Source,
    folder: str | Path,
    *,
    val_fraction: float = 0.005,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    report: Report = lambda documents, tokens, fraction: None,
) -> Json:
    """Encode every document of `source` once into `folder`, end-of-text after each; returns the manifest. Document i
    goes to validation if i * val_fraction passes a half-integer: an even spread, the same for any number of workers. A
    second call resumes an interrupted preparation, and does nothing if the folder is finished. Raises UserError if the
    folder holds something else, or the text is empty or unreadable, and Interrupted after Ctrl-C."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: must be at least 0 and below 1")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens {shard_tokens}: must be at least 1")
    folder = Path(folder).expanduser()
    ranks = {"name": tokenizer.NAME, "sha256": tokenizer.RANKS_SHA256}
    identity: Json = {"source": source.identity, "tokenizer": ranks}
    identity |= {"val_fraction": val_fraction, "shard_tokens": shard_tokens}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _same_identity(folder, manifest["identity"], identity)
        (folder / JOURNAL).unlink(missing_ok=True)  # left by a kill after the manifest was written
        return manifest
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose a folder for --out")
    names = {p.name for p in folder.iterdir()} if folder.exists() else set()
    if names - {JOURNAL + ".tmp"} and not (folder / JOURNAL).exists():
        raise UserError(f"{folder}: is not empty and holds no unfinished preparation; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return _prepare(source, folder, identity, workers, report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: disk full; free some space, run the same command again to resume") from None
        raise UserError(f"{folder}: {error}") from None


def _prepare(source: Source, folder: Path, identity: Json, workers: int | None, report: Report) -> Json:
    val_fraction, shard_tokens = identity["val_fraction"], identity["shard_tokens"]
    journal: Json = {"identity": identity, "cursor": None, "documents": 0, "splits": {}}
    path = folder / JOURNAL
    if not path.exists():
        write_atomic(path, json.dumps(journal).encode())
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
        found, cursor, documents, states = (journal[key] for key in ("identity", "cursor", "documents", "splits"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: corrupt ({error!r:.60}); remove {folder} and prepare the data again") from None
    _same_identity(folder, found, identity)
    splits = {s: SplitWriter(folder, s, shard_tokens, states.get(s)) for s in ("train", "val")}

    def save() -> None:
        states = {name: writer.flush() for name, writer in splits.items()}
        state = {"identity": identity, "cursor": cursor, "documents": documents, "splits": states}
        write_atomic(path, json.dumps(state).encode())

    saved = time.monotonic()
    try:
        for batch, (tokens, lengths) in _encoded(source.batches(cursor), workers):
            ends = np.cumsum(lengths)
            for start, end in zip(ends - lengths, ends, strict=True):
                held_out = int((documents + 1) * val_fraction + 0.5) > int(documents * val_fraction + 0.5)
                splits["val" if held_out else "train"].append(tokens[start:end])
                documents += 1
            cursor = batch.cursor
            if time.monotonic() - saved > _JOURNAL_SECONDS:
                save()
                saved = time.monotonic()
            report(documents, sum(w.total for w in splits.values()), batch.fraction)
    except KeyboardInterrupt:
        # The next call cuts off whatever was appended after the last journal.
        repeated = f"at most the last {_JOURNAL_SECONDS:.0f} s are repeated"
        raise Interrupted(f"stopped; run the same command again to resume: {repeated}") from None
    if documents == 0:
        raise UserError(f"{source.name}: the corpus is empty: none of its documents holds text; choose another source")
    if val_fraction and splits["val"].total == 0:
        larger = f" or at least {math.ceil(51 / documents) / 100}" if documents > 1 else ""
        problem = f"none of its {documents} document(s) went to validation at --val-fraction {val_fraction}"
        remedy = f"remove {folder} and choose --val-fraction 0 (no validation){larger}"
        raise UserError(f"{source.name}: {problem}; {remedy}")
    save()
    finished = {name: writer.finish() for name, writer in splits.items()}
    total = sum(split["tokens"] for split in finished.values())
    manifest: Json = {"format": FORMAT, "tokenizer": identity["tokenizer"], "dtype": DTYPE.str, "documents": documents}
    manifest |= {"tokens": total, "splits": finished, "identity": identity}
    manifest["checksum"] = manifest_checksum(manifest)
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    path.unlink()
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


def _same_identity(folder: Path, found: Json, wanted: Json) -> None:
    for key, value in json.loads(json.dumps(wanted)).items():
        if found.get(key) != value:
            change = f"{key} was {json.dumps(found.get(key))[:80]}, is now {json.dumps(value)[:80]}"
            raise UserError(f"{folder}: was prepared from something else ({change}); remove it or choose another --out")


# --- encoding --------------------------------------------------------------------------------------------------------

Encoded = tuple[np.ndarray, np.ndarray]
"""Tokens of several documents, end to end, and each document's length."""


def encode_documents(documents: list[str]) -> Encoded:
    """Tokens of all non-empty documents, each followed by end-of-text, uint16 (N,); and their lengths with it."""
    parts = [np.append(tokenizer.encode(text), tokenizer.END_OF_TEXT).astype(DTYPE) for text in documents if text]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return np.concatenate(parts) if parts else np.empty(0, DTYPE), lengths


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Defer Ctrl-C during the block, and for good in the workers that start in it: Ctrl-C reaches the whole process
    group, but only the parent must act on it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    tokenizer.gpt2()
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A killed parent cannot end its workers, so they watch the parent.
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encoded(batches: Iterable[DocumentBatch], workers: int | None) -> Iterator[tuple[DocumentBatch, Encoded]]:
    """Each batch with its tokens, in order, at most a few batches ahead of the consumer."""
    workers = workers or os.cpu_count() or 1
    waiting: collections.deque[tuple[DocumentBatch, Future[Encoded]]] = collections.deque()
    # Spawned, not forked: the parent may have threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        for batch in batches:
            with _without_interrupts():
                waiting.append((batch, pool.submit(encode_documents, batch.documents)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool:
        remedy = "run the same command again to resume, with fewer --workers if this repeats"
        raise UserError(f"an encoding process died (out of memory?); {remedy}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
