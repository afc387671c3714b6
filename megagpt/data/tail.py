"""Holding out the end of a text whose documents are too few for both splits."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megagpt.data.shard_writer import SplitWriter
from megagpt.data.tokenizer import END_OF_TEXT

_PIECE = 2**24  # tokens in memory at a time


def copy_tail(source: SplitWriter, target: SplitWriter, count: int) -> dict[str, Any]:
    """Append the last `count` tokens of `source` to `target`; returns the state of `source` without them. A journal
    with both states must be written before a writer opens with the shorter one, which removes the tokens."""
    cut = source.total - count
    kept: list[dict[str, Any]] = []
    shorter: dict[str, Any] = {}
    start, last = 0, END_OF_TEXT  # so that the first token starts a document
    for entry, tokens in source.read():
        here = min(max(0, cut - start), len(tokens))
        if here:
            last = int(tokens[here - 1])
        if here < len(tokens):
            started = target.documents_total
            for piece in _documents(tokens[here:]):
                if last == END_OF_TEXT:
                    target.append(piece)
                else:
                    target.write(piece)
                last = int(piece[-1])
            moved = target.documents_total - started
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
