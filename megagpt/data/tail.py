"""Holding out the end of a text that has too few documents to hold out a whole one."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megagpt.data.shard_writer import SplitWriter
from megagpt.data.tokenizer import END_OF_TEXT

_PIECE = 2**24  # tokens in memory at a time


def copy_tail(train: SplitWriter, val: SplitWriter, count: int) -> dict[str, Any]:
    """Append the last `count` tokens of `train` to `val`; returns the state of `train` without them. A journal with
    both states must be written before a writer opens with the shorter one, which removes the tokens."""
    cut = train.total - count
    kept: list[dict[str, Any]] = []
    shorter: dict[str, Any] = {}
    start, last = 0, END_OF_TEXT  # so that the first token starts a document
    for entry, tokens in train.read():
        here = min(max(0, cut - start), len(tokens))
        if here:
            last = int(tokens[here - 1])
        if here < len(tokens):
            started = val.documents_total
            for piece in _documents(tokens[here:]):
                if last == END_OF_TEXT:
                    val.append(piece)
                else:
                    val.write(piece)
                last = int(piece[-1])
            moved = val.documents_total - started
            shorter = shorter or {"shards": kept, "tokens": here, "documents": entry["documents"] - moved}
        elif not shorter:
            kept.append(entry)
        start += len(tokens)
    return shorter


def _documents(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Cut after each end-of-text; a long document comes in several pieces."""
    for first in range(0, len(tokens), _PIECE):
        piece = np.array(tokens[first : first + _PIECE])
        yield from (part for part in np.split(piece, np.flatnonzero(piece == END_OF_TEXT) + 1) if len(part))
