"""Documents to tokens, by a pool of processes."""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from megagpt.data import tokenizer
from megagpt.data.documents import DocumentBatch
from megagpt.data.shard_writer import DTYPE
from megagpt.errors import ExpectedError, UserError

Encoded = tuple[np.ndarray, np.ndarray]
"""Tokens of several documents, end to end, and each document's length."""


def encode_documents(documents: list[str]) -> Encoded:
    """Tokens of all non-empty documents, each followed by end-of-text, uint16 (N,); and their lengths with it."""
    parts = [np.append(tokenizer.encode(text), tokenizer.END_OF_TEXT).astype(DTYPE) for text in documents if text]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return np.concatenate(parts) if parts else np.empty(0, DTYPE), lengths


def encoded(batches: Iterable[DocumentBatch], workers: int | None) -> Iterator[tuple[DocumentBatch, Encoded]]:
    """Each batch with its tokens, in order, at most a few batches ahead of the consumer. An expected error of `batches`
    is raised after all batches before it."""
    workers = workers or os.cpu_count() or 1
    waiting: collections.deque[tuple[DocumentBatch, Future[Encoded]]] = collections.deque()
    # Spawned, not forked: the parent may have threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    failure: ExpectedError | None = None
    source = iter(batches)
    try:
        with _without_interrupts():
            pool.submit(int)  # no work: a process starts while the first documents are read
        while True:
            try:
                batch = next(source, None)
            except ExpectedError as error:
                batch, failure = None, error
            if batch is None:
                break
            with _without_interrupts():
                waiting.append((batch, pool.submit(encode_documents, batch.documents)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
        if failure:
            raise failure
    except BrokenProcessPool:
        remedy = "run the same command again to resume, with fewer --workers if this repeats"
        raise UserError(f"an encoding process died (out of memory?); {remedy}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
