"""Batches for a rank, a pure function of the sequence number, read ahead of the engine by one thread."""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from megagpt.config import DataConfig
from megagpt.data.order import integer_weights, locate
from megagpt.data.shards import open_stream
from megagpt.data.token_stream import TokenStream
from megagpt.errors import UserError
from megagpt.files import named_path
from megagpt.models.loss import IGNORE
from megagpt.schedule import Cut, cut

_AHEAD = 3  # optimizer steps
# Name of the range that a trace shows while a rank waits for its batch.
WAITING_FOR_DATA = "megagpt: waiting for data"
# Places and tokens at each, by which two sources of equal length are compared.
_WINDOWS, _WINDOW_TOKENS = 16, 256


@dataclass(frozen=True)
class Share:
    """One of the equal parts of every global batch, and how it is cut up. Tensor ranks of one group take the same."""

    index: int
    count: int
    micro_batch: int
    """Sequences of a micro-batch, at most."""
    compiled: bool = False
    """Whether the model is compiled, once for each size of a micro-batch."""

    def cut(self, sequences: int) -> Cut:
        """The micro-batches that every rank takes for a global batch of `sequences`."""
        return cut(sequences, self.count, self.micro_batch, self.compiled)


@dataclass(frozen=True)
class Batch:
    """One share of the global batch of an optimizer step: a rank's, or that of a group of tensor ranks."""

    micro_batches: list[tuple[Tensor, Tensor]]
    """Tokens and targets, int64 (sequences, context) each; every rank has as many pairs of the same shape. Targets are
    -100 in rows that only fill up a micro-batch."""
    sequences: int
    """Sequences of the global batch."""
    tokens: int
    """Targets of the global batch, without those in rows that only fill up."""


@dataclass(frozen=True)
class Corpus:
    """One split of all sources, as numbered sequences of context + 1 tokens."""

    streams: list[TokenStream]
    weights: list[int]
    context: int
    seed: int
    skips: tuple[tuple[int, int], ...] = ()
    """Stretches to leave out: position in the run at which one would come, and its length, both in sequences."""

    @property
    def sizes(self) -> list[int]:
        """Sequences of each source. Neighbours share a token: the last target of one is the next one's first input."""
        return [max(0, (s.tokens - 1) // self.context) for s in self.streams]

    @property
    def rounding(self) -> int:
        """Sequences by which `interleave` may exceed a source's exact share."""
        return (len(self.weights) - 1).bit_length()

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The sequences with these numbers, int64 (len(numbers), context + 1)."""
        source, index = locate(numbers, self.sizes, self.weights, self.seed)
        places = zip(source.tolist(), index.tolist(), strict=True)
        read = [self.streams[s].read(i * self.context, self.context + 1) for s, i in places]
        return np.stack(read) if read else np.empty((0, self.context + 1), dtype=np.int64)

    def numbers_at(self, positions: np.ndarray) -> np.ndarray:
        """The sequence numbers that a run takes at these positions, past the stretches that it leaves out."""
        numbers = positions.copy()
        for at, length in self.skips:
            numbers[positions >= at] += length
        return numbers

    def batch(self, sequences: range, share: Share, size: int | None = None) -> Batch:
        """The sequences at these positions of the run, dealt to the shares in turn; the one `share`, cut into
        micro-batches of `size` sequences, or of as many as the longest share needs. Shares differ by at most one
        sequence. Rows that do not count fill them up, so all ranks take micro-batches of one number and shape, even
        if the batch does not divide over them."""
        rows = self.rows(self.numbers_at(np.array(sequences[share.index :: share.count], dtype=np.int64)))
        size = size or share.cut(len(sequences)).size
        count = -(-len(sequences) // (share.count * size))
        filled = np.full((count * size, self.context + 1), IGNORE, dtype=np.int64)
        filled[: len(rows)] = rows
        pairs = torch.from_numpy(filled).split(size)
        micro_batches = [(p[:, :-1].clamp_min(0), p[:, 1:].contiguous()) for p in pairs]
        return Batch(micro_batches, len(sequences), len(sequences) * self.context)


def open_corpus(data: DataConfig, split: str, context: int, seed: int) -> Corpus:
    """Open "train" or "val" of every source. Raises UserError if a source is missing, empty, too short, or given
    twice."""
    refuse_same_folder(data)
    streams = [open_stream(source.path, split) for source in data.sources]
    skips = [(-(-s.at // context), -(-s.tokens // context)) for s in data.skip] if split == "train" else []
    corpus = Corpus(streams, integer_weights(tuple(s.weight for s in data.sources)), context, seed, tuple(skips))
    for stream, size in zip(streams, corpus.sizes, strict=True):
        if split == "train" and size == 0:
            problem = f"{stream.tokens} tokens are less than one sequence of model.context {context} + 1"
            raise UserError(f"{stream.name}: {problem}; prepare more text, or reduce model.context")
    for one, other in itertools.combinations(streams, 2):
        if split == "train" and _same_tokens(one, other):
            raise _given_twice(one.name, other.name, "hold the same tokens")
    return corpus


def refuse_same_folder(data: DataConfig) -> None:
    """Raises UserError if two sources are one folder, by whatever paths. The folders need not exist."""
    for one, other in itertools.combinations([source.path for source in data.sources], 2):
        if named_path(one).resolve() == named_path(other).resolve():
            raise _given_twice(one, other, "are the same folder")


def _given_twice(one: str, other: str, problem: str) -> UserError:
    return UserError(f"data.sources: {one} and {other} {problem}; give it once, with the sum of the weights")


def _same_tokens(one: TokenStream, other: TokenStream) -> bool:
    """Whether two streams are of the same text, by samples of it: in whatever files, under whatever names."""
    if one.tokens != other.tokens:
        return False
    count = min(one.tokens, _WINDOW_TOKENS)
    starts = np.linspace(0, one.tokens - count, _WINDOWS).astype(int).tolist()
    return all(np.array_equal(one.read(start, count), other.read(start, count)) for start in starts)


def validation_corpus(held_out: Corpus) -> Corpus:
    """Those sources of a held-out split that hold enough text to be validated on at all."""
    kept = [i for i, size in enumerate(held_out.sizes) if size > held_out.rounding]
    streams, weights = held_out.streams, held_out.weights
    return replace(held_out, streams=[streams[i] for i in kept], weights=[weights[i] for i in kept])


def validation_sequences(corpus: Corpus, tokens: int) -> int:
    """Sequences of the validation set: `tokens` worth of them, or fewer if a source would otherwise repeat. A function
    of config and corpus alone, so any number of ranks validates on the same tokens."""
    total = sum(corpus.weights)
    sizes = zip(corpus.sizes, corpus.weights, strict=True)
    available = [(size - corpus.rounding) * total // weight for size, weight in sizes]
    return max(0, min(tokens // corpus.context, *available)) if available else 0


def read_ahead(batches: Iterator[Batch]) -> Generator[Batch]:
    """The same batches, made by a thread that stays a few steps ahead. An error in the thread is raised in its turn."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        ready = deque(thread.submit(next, batches, None) for _ in range(_AHEAD))
        while True:
            with record_function(WAITING_FOR_DATA):
                batch = ready.popleft().result()
            if batch is None:
                return
            ready.append(thread.submit(next, batches, None))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)


def placed(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches in memory from which the device can fetch them while the host goes on: for a GPU, page-locked. To be
    read by one thread."""
    for batch in batches:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own; otherwise all ranks would use the first GPU, too
            pairs = [(tokens.pin_memory(), targets.pin_memory()) for tokens, targets in batch.micro_batches]
            batch = replace(batch, micro_batches=pairs)
        yield batch


def train_batches(corpus: Corpus, start: int, total: int, size: Callable[[int], int], share: Share) -> Iterator[Batch]:
    """This rank's share of every step from sequence `start` to sequence `total`; size: number of sequences
    already seen -> sequences in the next global batch. If `total` cuts the last batch short, its micro-batches keep
    their size: a compiled model would be compiled again for one step."""
    while start < total:
        wanted = size(start)
        end = min(start + wanted, total)
        yield corpus.batch(range(start, end), share, share.cut(wanted).size)
        start = end
