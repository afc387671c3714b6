"""Batches for a rank, a pure function of the sequence number, read ahead of the engine by one thread."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megagpt.config import DataConfig
from megagpt.data.order import integer_weights, locate
from megagpt.data.shards import TokenStream, open_stream
from megagpt.errors import UserError
from megagpt.models.loss import IGNORE

_AHEAD = 2  # optimizer steps


@dataclass(frozen=True)
class Batch:
    """One optimizer step's share of a rank."""

    micro_batches: list[tuple[Tensor, Tensor]]
    """Tokens and targets, int64 (micro_batch, context) each, equally many on every rank; targets are -100 in rows that
    only fill up a micro-batch."""
    sequences: int
    """Sequences of the global batch."""
    tokens: int
    """Targets of the global batch that count."""


@dataclass(frozen=True)
class Corpus:
    """One split of all sources, seen as numbered sequences of context + 1 tokens."""

    streams: list[TokenStream]
    weights: list[int]
    context: int
    seed: int

    @property
    def sizes(self) -> list[int]:
        """Sequences of each source; neighbours share one token, which is the last target of one and the first input of
        the next."""
        return [max(0, (s.tokens - 1) // self.context) for s in self.streams]

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The sequences of these numbers, int64 (len(numbers), context + 1)."""
        source, place = locate(numbers, self.sizes, self.weights, self.seed)
        read = [
            self.streams[s].read(p * self.context, self.context + 1)
            for s, p in zip(source.tolist(), place.tolist(), strict=True)
        ]
        return np.stack(read) if read else np.empty((0, self.context + 1), dtype=np.int64)

    def batch(self, first: int, sequences: int, rank: int, world: int, micro_batch: int, accumulation: int) -> Batch:
        """Sequences [first, first + sequences), dealt to the ranks in turn and cut into micro-batches.

        The ranks' shares differ by one sequence at most, and are filled up with rows that do not count, so that all
        ranks take equally many steps whatever divides.
        """
        rows = self.rows(np.arange(first + rank, first + sequences, world))
        filled = np.full((accumulation * micro_batch, self.context + 1), IGNORE, dtype=np.int64)
        filled[: len(rows)] = rows
        pairs = torch.from_numpy(filled).split(micro_batch)
        micro_batches = [(p[:, :-1].clamp_min(0), p[:, 1:].contiguous()) for p in pairs]
        return Batch(micro_batches, sequences, sequences * self.context)


def rounds(sequences: int, world: int, micro_batch: int) -> int:
    """Micro-batches that every rank takes for a global batch of `sequences`."""
    return -(-sequences // (world * micro_batch))


def open_corpus(data: DataConfig, split: str, context: int, seed: int) -> Corpus:
    """Open "train" or "val" of every source. Raises UserError where a source is missing, empty or too short."""
    streams = [open_stream(source.path, split) for source in data.sources]
    corpus = Corpus(streams, integer_weights(tuple(s.weight for s in data.sources)), context, seed)
    for stream, size in zip(streams, corpus.sizes, strict=True):
        if split == "train" and size == 0:
            raise UserError(
                f"{stream.name}: {stream.tokens} tokens are less than one sequence of model.context {context} + 1; "
                "prepare more text, or train with a smaller context"
            )
    return corpus


def validation_sequences(corpus: Corpus, tokens: int) -> int:
    """Sequences of the validation set: `tokens` worth of them, or as many as come before a source would repeat.

    A function of config and corpus alone, so every world size validates on the same tokens.
    """
    wanted = tokens // corpus.context
    total = sum(corpus.weights)
    # `interleave` may give a source this many sequences more than its exact share.
    error = (len(corpus.weights) - 1).bit_length()
    available = [(size - error) * total // weight for size, weight in zip(corpus.sizes, corpus.weights, strict=True)]
    return max(0, min(wanted, *available))


def read_ahead(batches: Iterator[Batch]) -> Generator[Batch]:
    """The same batches, made by a thread that stays a few steps ahead. Its errors are raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def train_batches(
    corpus: Corpus,
    sequences_seen: int,
    total_sequences: int,
    batch_size: Callable[[int], int],
    rank: int,
    world: int,
    micro_batch: int,
) -> Iterator[Batch]:
    """Every step's batch of this rank from `sequences_seen` on; `batch_size` maps sequences seen to the next batch."""
    while sequences_seen < total_sequences:
        sequences = min(batch_size(sequences_seen), total_sequences - sequences_seen)
        yield corpus.batch(sequences_seen, sequences, rank, world, micro_batch, rounds(sequences, world, micro_batch))
        sequences_seen += sequences
