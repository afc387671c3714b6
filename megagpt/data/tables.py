"""Rows of a column of parquet and Arrow files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt.data.documents import BadRow
from megagpt.errors import UserError, did_you_mean, first_line

_BATCH_ROWS = 256
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's IPC streaming format since 0.15

Row = tuple[str | BadRow, float]


def read_parquet(path: Path, text_key: str, skip: int) -> Iterator[Row]:
    """The column `text_key` from row `skip` on, each text with the share of the file read so far. A row group that is
    skipped is not read."""
    import pyarrow.parquet

    with _errors(path, "parquet"), pyarrow.parquet.ParquetFile(path) as file:
        _check_column(path, text_key, file.schema_arrow.names)
        row, rows = 0, file.metadata.num_rows
        for group in range(file.num_row_groups):
            length = file.metadata.row_group(group).num_rows
            if row + length <= skip:
                row += length
                continue
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=[text_key]):
                for text in texts_of(batch.column(0)):
                    row += 1
                    if row > skip:
                        yield as_row(text, f"{path} row {row}", text_key), row / rows


def read_arrow(path: Path, text_key: str, skip: int) -> Iterator[Row]:
    """The same for Arrow's file format, and for its stream format, which `datasets` writes."""
    import pyarrow

    with _errors(path, "Arrow"), pyarrow.OSFile(str(path)) as raw:
        size = raw.size()
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(max(0, size - len(_STREAM_END)))
        if not is_file and raw.read() != _STREAM_END:
            # The reader takes a stream that was cut off between two of its messages for a whole one.
            raise UserError(f"{path}: cut off, or not an Arrow file; fetch it again")
        raw.seek(0)
        table = pyarrow.ipc.open_file(raw) if is_file else pyarrow.ipc.open_stream(raw)
        _check_column(path, text_key, table.schema.names)
        batches = (table.get_batch(i) for i in range(table.num_record_batches)) if is_file else table
        row = 0
        for whole in batches:
            column = whole.column(text_key)
            for start in range(0, len(column), _BATCH_ROWS):
                for text in texts_of(column[start : start + _BATCH_ROWS]):
                    row += 1
                    if row > skip:
                        yield as_row(text, f"{path} row {row}", text_key), min(1.0, raw.tell() / size)


def texts_of(column: Any) -> list[Any]:
    """The values of an Arrow array; in the place of one that Python cannot have, such as a string that is not UTF-8 or
    a time in nanoseconds, the error."""
    try:
        return column.to_pylist()
    except MemoryError:  # no row is to blame
        raise
    except Exception:  # of many types: each Arrow type has its own
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
    except MemoryError:
        raise
    except Exception:  # not a text: it becomes a bad row, which names its type
        return TypeError(str(scalar.type))


def as_row(value: Any, place: str, text_key: str, remedy: str = "remove the row") -> str | BadRow:
    """A value of the text's column as a document, or as a bad row."""
    if isinstance(value, str):
        return value
    if isinstance(value, UnicodeDecodeError):
        return BadRow(place, f"byte {value.start} of {text_key!r} is not UTF-8", remedy)
    if isinstance(value, TypeError):
        return BadRow(place, f"{text_key!r} is {value}, not text", remedy, other_key=True)
    return BadRow(place, f"{text_key!r} is {value!r:.40}, not text", remedy, other_key=value is not None)


def _check_column(path: Path, text_key: str, names: list[str]) -> None:
    if text_key not in names:
        raise UserError(f"{path}: no column {text_key!r}; {did_you_mean(text_key, names)} (--text-key)")
    if names.count(text_key) > 1:
        raise UserError(f"{path}: {names.count(text_key)} columns are called {text_key!r}; write it with one")


@contextlib.contextmanager
def _errors(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's
        raise UserError(f"{path}: corrupt, or not a {kind} file: {first_line(error)}; fetch it again") from None
