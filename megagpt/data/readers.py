"""Rows of text files, JSON and CSV, each a document. Nothing in a text is changed: line ends stay as they are."""

import codecs
import contextlib
import csv
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megagpt.data.compression import COMPRESSIONS, opened
from megagpt.data.documents import BadRow
from megagpt.data.tables import read_arrow, read_parquet
from megagpt.errors import UserError, did_you_mean

_CHUNK = 2**20
_FIX_LINE = "fix or remove the line"
# First line of the small file that Git LFS leaves for a large one, from its specification.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_DECODER = json.JSONDecoder()
_BLANKS = " \t\r\n"  # of JSON
# Characters that the error handler "surrogateescape" makes of bytes that are not UTF-8.
_ESCAPED = re.compile("[\udc80-\udcff]")


class Format(NamedTuple):
    """Options for reading files."""

    text_key: str = "text"
    """Key or column that holds the text."""
    separator: str | None = None
    """Text between two documents of a text file; None: a text file is one document."""


Row = tuple[str | BadRow, float]
"""A document or a bad row, and the share of the file read so far, 0 to 1."""


def read_rows(path: Path, form: Format, skip: int = 0) -> Iterator[Row]:
    """The rows of a file but for the first `skip`. Raises UserError if the file is corrupt or of no known kind."""
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{path}: unknown kind of file; convert it to one of: {known_kinds()}")
    with path.open("rb") as raw:
        if raw.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{path}: Git LFS's pointer to the file, not the file; fetch it with `git lfs pull`")
    if kind in _COLUMNS:
        yield from _COLUMNS[kind](path, form.text_key, skip)
        return
    with opened(path) as (data, share):
        for row in _ROWS[kind](path, data, form, skip):
            yield row, share()


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read, without that of its compression; None if no reader knows it."""
    ending, compression = endings_of(path)
    return ending if ending in _ROWS or (ending in _COLUMNS and not compression) else None


def endings_of(path: Path) -> tuple[str, str]:
    """The ending of the file without its compression, and that of the compression: ".jsonl" and ".gz"."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def known_kinds() -> str:
    return f"{' '.join(_ROWS)} (or one of them with {' '.join(COMPRESSIONS)}), {' '.join(_COLUMNS)}"


# --- text ------------------------------------------------------------------------------------------------------------


def _text_rows(path: Path, data: BinaryIO, form: Format, skip: int) -> Iterator[str | BadRow]:
    if form.separator is None:
        if skip == 0:
            yield _decoded(data.read(), str(path), "convert the file to UTF-8")
        return
    # No character's UTF-8 begins inside another's, so bytes are cut at the same places as text.
    pieces = enumerate(_split(data, form.separator.encode()), start=1)
    for number, piece in itertools.islice(pieces, skip, None):
        yield _decoded(piece, f"{path} document {number}", "convert the file to UTF-8")


def _split(data: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """The pieces between separators. Line breaks beside a separator belong to it."""
    rest, first = b"", True
    # A chunk as long as what is left of the last one: the work stays linear, however long a document is.
    while chunk := data.read(max(_CHUNK, len(rest))):
        *pieces, rest = (rest + chunk).split(separator)
        for piece in pieces:
            yield (piece if first else piece.lstrip(b"\r\n")).rstrip(b"\r\n")
            first = False
    yield rest if first else rest.lstrip(b"\r\n")


def _decoded(data: bytes, place: str, remedy: str) -> str | BadRow:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return BadRow(place, f"line {line}: byte {error.start} is not UTF-8", remedy)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _jsonl_rows(path: Path, data: Iterable[bytes], form: Format, skip: int) -> Iterator[str | BadRow]:
    for number, line in itertools.islice(enumerate(data, start=1), skip, None):
        # A blank line counts as an empty document; `prepare` drops empty documents.
        yield _json_line(line, f"{path} line {number}", form.text_key) if line.strip() else ""


def _json_line(line: bytes, place: str, text_key: str) -> str | BadRow:
    try:
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        return BadRow(place, f"not JSON: byte {error.start} is not UTF-8", _FIX_LINE)
    except (ValueError, RecursionError) as error:
        return BadRow(place, f"not JSON ({error})", _FIX_LINE)
    return _text_of(value, place, text_key, _FIX_LINE)


def _text_of(value: Any, place: str, text_key: str, remedy: str) -> str | BadRow:
    if not isinstance(value, dict) or text_key not in value:
        found = did_you_mean(text_key, value) if isinstance(value, dict) and value else f"it is {value!s:.40}"
        remedy = f"{remedy}, or name the files to read by a glob"
        return BadRow(place, f"no key {text_key!r}; {found}", remedy, other_key=True)
    text = value[text_key]
    return text if isinstance(text, str) else BadRow(place, f"{text_key!r} is {text!r:.40}, not text", remedy)


def _json_rows(path: Path, data: BinaryIO, form: Format, skip: int) -> Iterator[str | BadRow]:
    """A `.json` file holds JSON lines, an array of objects, or objects one after the other."""
    head = data.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()  # type: ignore[attr-defined]
    # An array may be one line of any length, and is not read as a line.
    first = [] if head.startswith(b"[") else _up_to_a_value(data)
    if not first or _goes_on(first[-1]):
        rows = _json_values(_JsonText(path, data, b"".join(first)), form)
    else:
        rows = _json_lines(path, itertools.chain(first, data), form)
    return itertools.islice(rows, skip, None)


def _up_to_a_value(data: BinaryIO) -> list[bytes]:
    """The lines up to the first one that is not blank."""
    lines = []
    for line in data:
        lines.append(line)
        if line.removeprefix(codecs.BOM_UTF8).strip():
            break
    return lines


def _goes_on(line: bytes) -> bool:
    """Whether an array starts in the line, or an object that ends in a later one."""
    start = line.removeprefix(codecs.BOM_UTF8).strip()
    if not start.startswith(b"{") or not line.endswith(b"\n"):
        return start.startswith(b"[")
    try:
        text = start.decode()
        _values_of(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) - 1
    except (ValueError, RecursionError):
        return False
    return False


def _values_of(text: str) -> list[Any]:
    """The JSON values of a text, one after the other. Raises ValueError and RecursionError."""
    values, at = [], 0
    while at < len(text):
        value, at = _DECODER.raw_decode(text, at)
        values.append(value)
        while at < len(text) and text[at] in _BLANKS:
            at += 1
    return values


def _json_lines(path: Path, lines: Iterable[bytes], form: Format) -> Iterator[str | BadRow]:
    """As of a `.jsonl` file, but a line may hold several objects."""
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        row = _json_line(line, place, form.text_key) if line.strip() else ""
        values: list[Any] = []
        if isinstance(row, BadRow):
            with contextlib.suppress(ValueError, RecursionError):
                values = _values_of(line.removeprefix(codecs.BOM_UTF8).decode().strip(_BLANKS))
        if len(values) > 1 and all(isinstance(value, dict) for value in values):
            yield from (_text_of(value, place, form.text_key, _FIX_LINE) for value in values)
        else:
            yield row


def _json_values(text: "_JsonText", form: Format) -> Iterator[str | BadRow]:
    """The values of one array, or one after the other, of a file that need not fit into memory."""
    array = text.next_sign() == "["
    text.at += array
    number = 0
    while (sign := text.next_sign()) and not (array and sign == "]"):
        if array and number:
            text.take(",")
        number += 1
        place = f"{text.path} row {number}"
        row = _text_of(text.value(place), place, form.text_key, "fix or remove the row")
        yield _utf8(row, place, "fix or remove the row")
    if array:
        text.take("]")
        if text.next_sign():
            raise UserError(f"{text.path}: not JSON: text follows the array; make it JSON lines, or one array")


class _JsonText:
    """JSON that is read piece by piece."""

    def __init__(self, path: Path, data: BinaryIO, first: bytes) -> None:
        """first: bytes before those of `data`."""
        self.path, self.data = path, data
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.text, self.at = self.decoder.decode(first), 0

    def more(self) -> bool:
        chunk = self.data.read(max(_CHUNK, len(self.text) - self.at))
        self.text = self.text[self.at :] + self.decoder.decode(chunk, final=not chunk)
        self.at = 0
        return bool(chunk)

    def next_sign(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _BLANKS:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, sign: str) -> None:
        found = self.next_sign()
        if found != sign:
            problem = f"{found!r} instead of {sign!r}" if found else "the array is not closed: the file is cut off"
            raise UserError(f"{self.path}: not JSON: {problem}; fix the file, or fetch it again")
        self.at += 1

    def value(self, place: str) -> Any:
        self.next_sign()
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
                return value
            except (ValueError, RecursionError) as error:
                if not self._is_cut_off(error) or not self.more():
                    raise UserError(f"{place}: not JSON ({error}); fix the file, or fetch it again") from None

    def _is_cut_off(self, error: Exception) -> bool:
        """Whether the value may go on in the next piece: its end, or the end of a number or a word, is missing."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16


# --- CSV -------------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, data: BinaryIO, form: Format, skip: int) -> Iterator[str | BadRow]:
    return itertools.islice(_csv_records(path, data, form), skip, None)


def _csv_records(path: Path, data: BinaryIO, form: Format) -> Iterator[str | BadRow]:
    """Rows under a line of column names; a text in quotes may go over several lines."""
    csv.field_size_limit(sys.maxsize)
    lines = (line.decode("utf-8", "surrogateescape") for line in data)
    reader = csv.reader(itertools.chain([next(lines, "").removeprefix("\ufeff")], lines), strict=True)
    try:
        columns = next(reader, [])
    except csv.Error as error:
        raise UserError(f"{path} line 1: {_header_problem(str(error))}; {_FIX_LINE}, or fetch the file again") from None
    if form.text_key not in columns:
        if not any(columns):
            return
        raise UserError(f"{path}: no column {form.text_key!r}; {did_you_mean(form.text_key, columns)} (--text-key)")
    at = columns.index(form.text_key)
    while True:
        place = f"{path} line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            if "end of data" in str(error):
                raise UserError(f"{place}: a quote is never closed; {_FIX_LINE}, or fetch the file again") from None
            yield BadRow(place, f"not CSV ({error})", _FIX_LINE)
            continue
        if row is None:
            return
        if row and len(row) != len(columns):
            problem = f"{len(row)} fields under {len(columns)} columns; a text that has commas needs quotes"
            yield BadRow(place, problem, _FIX_LINE)
        else:
            yield _utf8(row[at], place, _FIX_LINE) if row else ""


def _header_problem(error: str) -> str:
    if "end of data" in error:
        return "a quote is never closed"
    if "new-line" in error:
        return "it ends with CR alone; lines end with LF or CR LF"
    return f"not CSV ({error})"


def _utf8(row: str | BadRow, place: str, remedy: str) -> str | BadRow:
    """The row, bad if "surrogateescape" has stood in for bytes that are not UTF-8."""
    if isinstance(row, str) and not row.isascii() and _ESCAPED.search(row):
        return BadRow(place, "its text is not UTF-8", remedy)
    return row


TEXT_KINDS = (".txt", ".md", ".text")
_ROWS: dict[str, Callable[[Path, BinaryIO, Format, int], Iterator[str | BadRow]]] = {
    **dict.fromkeys(TEXT_KINDS, _text_rows),
    **dict.fromkeys((".jsonl", ".ndjson"), _jsonl_rows),
    ".json": _json_rows,
    ".csv": _csv_rows,
}
_COLUMNS = {".parquet": read_parquet, ".arrow": read_arrow}
