"""Writes files that are either complete or absent, and reads files that a crash may have cut off."""

import datetime
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt.errors import UserError


def now() -> str:
    """The time as files store it: ISO 8601, UTC, whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def named_path(name: str | Path) -> Path:
    """The path that a person has named, with `~` expanded. Raises UserError for a name that no file can have."""
    if not str(name):
        raise UserError("a name is empty; give that of a file or a folder")
    path = Path(name)
    try:
        path = path.expanduser()
        path.lstat()
    except RuntimeError:
        problem = f"{path.parts[0]} is no user's home folder"
        raise UserError(f"{name}: {problem}; give the path in full, or ./{path.parts[0]} for a name here") from None
    except OSError as error:  # most are for whoever opens the file
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{name!s:.60}...: the name is too long for a file; choose a shorter one") from None
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a complete file or none: it is flushed to disk before it gets its name."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def create_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file that must not exist yet. Raises FileExistsError."""
    with path.open("x", encoding="utf-8") as file:
        json.dump(values, file, indent=1)


def read_json(path: Path) -> dict[str, Any]:
    """The file's content; empty if the file is missing or was cut off when its writer died."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def flush_folder(folder: Path) -> None:
    """Put a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_lines(path: Path, last_bytes: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of a JSON lines file, without those that a crash cut off; none if the file is missing. `last_bytes`:
    read no more than that from the end; 0: read all."""
    if not path.exists():
        return
    with path.open("rb") as file:
        skipped = max(0, file.seek(0, os.SEEK_END) - last_bytes) if last_bytes else 0
        file.seek(skipped)
        if skipped:
            file.readline()  # the rest of a line
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line
