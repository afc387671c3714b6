"""Files as a source: their rows in batches, and the check that they still hold the same text."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import xxhash

from megagpt.console import say
from megagpt.data.documents import BadRow, Batch, Cursor, DocumentBatch, FileRecord, Source
from megagpt.data.readers import Format, Row, read_rows
from megagpt.errors import UserError, disk_error, first_line


def file_source(name: str, files: list[Path], form: Format, notes: tuple[str, ...] = ()) -> Source:
    """The rows of these files, one file after the other. Resuming needs the rows before the cursor to be the same as
    before; the rest may have changed, so that a bad row can be fixed. A file that has the same size and times is taken
    to be the same; any other is read again and compared by a checksum of its texts."""
    sizes = [_state(file)[0] for file in files]
    starts = list(itertools.accumulate(sizes, initial=0))
    total = max(1, starts[-1])

    def batches(cursor: Cursor | None) -> Iterator[DocumentBatch]:
        batch = Batch()
        place = cursor or {"file": 0, "row": 0}
        for i in range(place["file"], len(files)):
            row, content = (place["row"], place.get("content")) if i == place["file"] and place["row"] else (0, "")
            state = _state(files[i])
            for text, share in _rows(files[i], form, row):
                row += 1
                content = _chained(content, text)
                if batch.add(text):
                    here = {"file": i, "row": row, "name": files[i].name, "content": content, "state": state}
                    yield batch.take(here, (starts[i] + share * sizes[i]) / total)
            if _state(files[i])[:2] != state[:2]:
                remedy = "wait until it is complete, then run the same command again"
                raise UserError(f"{files[i]}: has changed while it was read; {remedy}")
            batch.files.append(FileRecord(files[i].name, state, content))
        yield batch.take({"file": len(files), "row": 0}, 1.0)

    def difference(cursor: Cursor, records: list[FileRecord], finished: bool) -> str | None:
        names = [file.name for file in files]
        for i, record in enumerate(records):
            if names[i : i + 1] != [record.name]:
                found = files[i] if i < len(files) else "nothing"
                return f"file {i + 1} was {record.name}, is {found}"
        if finished and len(files) > len(records):
            return f"{files[len(records)]} was not there"
        # How many rows of each file to compare; None: all.
        parts = [(file, record, None) for file, record in zip(files, records, strict=False)]
        i = cursor["file"]
        if cursor["row"]:
            if i >= len(files):
                return f"file {i + 1}, which was read in part, is gone"
            record = FileRecord(cursor.get("name", files[i].name), cursor["state"], cursor["content"])
            if record.name != files[i].name:
                return f"file {i + 1} was {record.name}, is {files[i]}"
            parts.append((files[i], record, cursor["row"]))
        changed = [part for part in parts if _may_have_changed(part[0], part[1])]
        if changed:
            more = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
            say(f"{changed[0][0]}{more}: size or time has changed; comparing the text with what was prepared")
        for file, record, rows in changed:
            if record.content is None or _content_sum(file, form, rows) != record.content:
                return f"{file}: its text has changed" + (f" before row {rows}" if rows else "")
        return None

    return Source(name, batches, {"text_key": form.text_key, "separator": form.separator}, notes, difference)


def _rows(file: Path, form: Format, skip: int) -> Iterator[Row]:
    try:
        yield from read_rows(file, form, skip)
    except OSError as error:
        raise disk_error(f"{file}: cannot be read: {first_line(error)}", error) from None


def _state(file: Path) -> list[int]:
    """Size (bytes), and the times of the last change of content and of inode (ns): the second changes even if a
    program sets the first."""
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; restore it") from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _may_have_changed(file: Path, record: FileRecord) -> bool:
    return any(now != before for now, before in zip(_state(file), record.state, strict=True) if before is not None)


def _content_sum(file: Path, form: Format, rows: int | None) -> str | None:
    content: str | None = ""
    for text, _ in itertools.islice(_rows(file, form, 0), rows):
        content = _chained(content, text)
    return content


def _chained(content: str | None, row: str | BadRow) -> str | None:
    """The checksum (xxh3, 128 bits) of a file's rows up to this one from that up to the one before: it can go on after
    an interruption. Unknown, None, stays unknown."""
    if content is None:
        return None
    mark, text = (b"", row) if isinstance(row, str) else (b"\xff", row.problem)
    return xxhash.xxh3_128_hexdigest(content.encode() + mark + text.encode("utf-8", "surrogatepass"))
