"""A source of text: documents in a fixed order, in batches, each with a place to resume at."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Characters of text in a batch: enough to be worth sending to a worker, few enough to bound memory.
_BATCH_CHARACTERS = 1_000_000
# Bad rows in a batch: a file of nothing else is noticed after this many.
_BATCH_BAD_ROWS = 100

Cursor = dict[str, Any]


class BadRow(NamedTuple):
    """A row that gives no text."""

    place: str
    """Such as "a.jsonl line 7"."""
    problem: str
    remedy: str
    """Advice on how to fix the file; empty if the user cannot change it, as on the hub."""
    other_key: bool = False
    """Whether the text may be under another key."""


class FileRecord(NamedTuple):
    """A file that was read to its end: what tells whether it still holds the same text."""

    name: str
    state: Sequence[int | None]
    """Size (bytes), and times of the last change of the content and of the inode (ns)."""
    content: str | None
    """Checksum of its rows. None, like the times, in a folder that version 0.1.0 prepared."""


class DocumentBatch(NamedTuple):
    """Documents, bad rows and ends of files between the cursor of the batch before and this one's."""

    documents: list[str]
    cursor: Cursor
    """Where the next batch starts: JSON, so that another process can resume there."""
    fraction: float | None
    """Share of the source read so far, 0 to 1; None if unknown."""
    bad: tuple[BadRow, ...] = ()
    files: tuple[FileRecord, ...] = ()
    """Files that ended."""


def _none(cursor: Cursor, files: list[FileRecord], finished: bool) -> None:
    """For sources whose identity tells all: the same identity is the same text."""


@dataclass(frozen=True)
class Source:
    """A corpus in a fixed order."""

    name: str
    batches: Callable[[Cursor | None], Iterator[DocumentBatch]] = field(repr=False)
    """Batches from a cursor on, from the start if it is None."""
    identity: dict[str, Any]
    """The settings that decide which documents come: a preparation resumes only with equal ones."""
    notes: tuple[str, ...] = ()
    """Lines for the user: what is read, and what is left out."""
    difference: Callable[[Cursor, list[FileRecord], bool], str | None] = field(repr=False, default=_none)
    """(cursor, files that ended before it, whether the cursor is the source's end) -> how the documents before the
    cursor differ from those that it was made with; None if they are the same."""


class Batch:
    """Collects rows until they are worth a batch."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.documents: list[str] = []
        self.bad: list[BadRow] = []
        self.files: list[FileRecord] = []
        self.characters = 0

    def add(self, row: str | BadRow) -> bool:
        """Add a row; returns whether the batch is full. A byte order mark at a document's start is no part of it."""
        if isinstance(row, str):
            self.documents.append(row.removeprefix("\ufeff"))
            self.characters += len(row)
        else:
            self.bad.append(row)
        return self.characters >= _BATCH_CHARACTERS or len(self.bad) >= _BATCH_BAD_ROWS

    def take(self, cursor: Cursor, fraction: float | None) -> DocumentBatch:
        """The batch, up to `cursor`; the next one starts empty."""
        batch = DocumentBatch(self.documents, cursor, fraction, tuple(self.bad), tuple(self.files))
        self._clear()
        return batch
