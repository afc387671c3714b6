"""Batches for a rank, a pure function of the sample number, read ahead of the engine by one thread."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megagpt.config import DataConfig
from megagpt.data.sampler import integer_weights, locate
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
    samples: int
    """Sequences of the global batch."""
    tokens: int
    """Targets of the global batch that count."""


@dataclass(frozen=True)
class Corpus:
    """One split of all sources, seen as numbered samples of context + 1 tokens."""

    streams: list[TokenStream]
    weights: list[int]
    context: int
    seed: int

    @property
    def sizes(self) -> list[int]:
        """Samples of each source. Neighbours share one token: the last target of one is the first input of the next."""
        return [max(0, (s.tokens - 1) // self.context) for s in self.streams]

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The samples of these numbers, int64 (len(numbers), context + 1)."""
        source, place = locate(numbers, self.sizes, self.weights, self.seed)
        read = [
            self.streams[s].read(p * self.context, self.context + 1)
            for s, p in zip(source.tolist(), place.tolist(), strict=True)
        ]
        return np.stack(read) if read else np.empty((0, self.context + 1), dtype=np.int64)

    def batch(self, first: int, samples: int, rank: int, world: int, micro_batch: int, accumulation: int) -> Batch:
        """Samples [first, first + samples), dealt to the ranks in turn and cut into micro-batches.

        The ranks' shares differ by one sample at most, and are filled up with rows that do not count, so that all
        ranks take equally many steps whatever divides.
        """
        rows = self.rows(np.arange(first + rank, first + samples, world))
        filled = np.full((accumulation * micro_batch, self.context + 1), IGNORE, dtype=np.int64)
        filled[: len(rows)] = rows
        pairs = torch.from_numpy(filled).split(micro_batch)
        micro_batches = [(p[:, :-1].clamp_min(0), p[:, 1:].contiguous()) for p in pairs]
        return Batch(micro_batches, samples, samples * self.context)


def rounds(samples: int, world: int, micro_batch: int) -> int:
    """Micro-batches that every rank takes for a global batch of `samples`."""
    return -(-samples // (world * micro_batch))


def open_corpus(data: DataConfig, split: str, context: int, seed: int) -> Corpus:
    """Open "train" or "val" of every source. Raises UserError where a source is missing, empty or too short."""
    streams = [open_stream(source.path, split) for source in data.sources]
    corpus = Corpus(streams, integer_weights(tuple(s.weight for s in data.sources)), context, seed)
    for stream, size in zip(streams, corpus.sizes, strict=True):
        if split == "train" and size == 0:
            raise UserError(
                f"{stream.name}: {stream.tokens} tokens are less than one sample of model.context {context} + 1; "
                "prepare more text, or train with a smaller context"
            )
    return corpus


def validation_samples(corpus: Corpus, tokens: int) -> int:
    """Samples of the validation set: `tokens` worth of them, or as many as come before a source would repeat.

    A function of config and corpus alone, so every world size validates on the same tokens.
    """
    wanted = tokens // corpus.context
    total = sum(corpus.weights)
    # `interleave` may give a source this many samples more than its exact share.
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
    samples_seen: int,
    total_samples: int,
    batch_size: Callable[[int], int],
    rank: int,
    world: int,
    micro_batch: int,
) -> Iterator[Batch]:
    """Every step's batch of this rank from `samples_seen` on; `batch_size` maps samples seen to the next batch."""
    while samples_seen < total_samples:
        samples = min(batch_size(samples_seen), total_samples - samples_seen)
        yield corpus.batch(samples_seen, samples, rank, world, micro_batch, rounds(samples, world, micro_batch))
        samples_seen += samples
