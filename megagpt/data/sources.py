"""Documents from text, JSON, CSV, parquet and Arrow files, the Hugging Face hub and Python's standard library.

A source yields batches of documents in a fixed order. Each batch comes with a cursor, which is JSON and marks the place
at which the next batch starts, so another process can resume reading there.
"""

import contextlib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from megagpt.data.compression import opened
from megagpt.data.documents import Source
from megagpt.data.file_list import Files, check_readable, files_of, is_pattern, matches_of, notes_of
from megagpt.data.file_source import file_source
from megagpt.data.hub import hub_source
from megagpt.data.readers import TEXT_KINDS, Format, kind_of, known_kinds
from megagpt.data.stdlib_text import BUILTIN, stdlib_source
from megagpt.errors import UserError
from megagpt.files import named_path

# How text files of stories and web pages often separate documents; encoded as text, it is 7 ordinary tokens.
_END_OF_TEXT = "<|endoftext|>"
_PEEK = 2**20  # bytes of a text file that are searched for it


def open_source(
    name: str,
    text_key: str = "text",
    subset: str | None = None,
    split: str = "train",
    *,
    revision: str | None = None,
    separator: str | None = None,
    held_out: Set[Path] = frozenset(),
) -> Source:
    """The source called `name`: `stdlib`, a file, a folder or a glob of files, or a data set on the hub. `held_out`:
    real paths of files to leave out. Raises UserError if there is none."""
    if separator == "":
        raise UserError("--separator: is empty; give the text that is between two documents")
    found = None if name == BUILTIN else local_files(name, held_out)
    texts = [path for path in found.files if kind_of(path) in TEXT_KINDS] if found else []
    if separator and not texts:
        raise UserError(f"--separator: only {' '.join(TEXT_KINDS)} files are split, and {name} has none; leave it out")
    if found:
        notes = (*notes_of(found), *_separator_note(texts, separator))
        return file_source(name, found.files, Format(text_key, separator), notes)
    return stdlib_source() if name == BUILTIN else hub_source(name, text_key, subset, split, revision)


def open_validation(name: str, separator: str | None = None, **options: Any) -> tuple[Source, frozenset[Path]]:
    """A source for validation only, and the real paths of its files, which training must leave out. Takes the options
    of `open_source`; files that have no separator may lack it here."""
    found = None if name == BUILTIN else local_files(name)
    files = found.files if found else []
    has_texts = any(kind_of(path) in TEXT_KINDS for path in files)
    source = open_source(name, separator=separator if has_texts else None, **options)
    return source, frozenset(path.resolve() for path in files)


def _separator_note(texts: list[Path], separator: str | None) -> Iterator[str]:
    """A word about a separator that is missing in the start of the first text file, or spelled there and not named."""
    for path in texts[:1]:
        with contextlib.suppress(UserError, OSError), opened(path) as (data, _):
            start = data.read(_PEEK)
            if separator and separator.encode() not in start:
                hint = "; a shell passes a line break as $'\\n'" if "\\" in separator else ""
                shown = f"'{separator}'" if separator.isprintable() else repr(separator)
                yield f"{path} has no {shown} (--separator) in its first {len(start):,} bytes{hint}"
            elif separator is None and _END_OF_TEXT.encode() in start:
                yield f"{path} spells {_END_OF_TEXT}; --separator '{_END_OF_TEXT}' makes it the end of a document"


def local_files(name: str, held_out: Set[Path] = frozenset()) -> Files | None:
    """The files that a name means; None if only the hub can have it."""
    path = named_path(name)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{name}: a link to {path.readlink()}, which does not exist; restore that")
    if path.is_dir():
        return files_of(path, held_out)
    if path.exists():
        if kind_of(path) is None:
            raise UserError(f"{path}: unknown kind of file; convert it to one of: {known_kinds()}")
        check_readable(path)
        if path.resolve() in held_out:
            raise UserError(f"{name}: is in --val, too; choose another file to train on")
        return Files([path], {})
    if is_pattern(name):
        return matches_of(str(path), held_out)
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1 or kind_of(path):
        raise UserError(f"{name}: no such file or folder")
    return None
