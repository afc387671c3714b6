"""The files of a source: those that are read, those that are left out and why, and those that cannot be read."""

import collections
import fnmatch
import os
import re
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from megagpt.data.readers import TEXT_KINDS, endings_of, kind_of, known_kinds
from megagpt.data.shards import JOURNAL, MANIFEST, first_names
from megagpt.errors import UserError

# Files that come with a corpus and are not part of it: the papers of a repository, pip's list, the descriptions that
# `datasets` writes, and those of prepared shards, whose folder may be below the corpus.
_ABOUT_TEXT = re.compile(
    r"(readme|licen[cs]e|requirements)([._-].*)?|copying|notice|changelog|contributing|code_of_conduct|citation"
)
_ABOUT_JSON = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", MANIFEST, JOURNAL)
_MAGIC = re.compile(r"[*?\[]")


class Files(NamedTuple):
    """The files of a source."""

    files: list[Path]
    """In the order of reading: sorted by path."""
    left_out: dict[str, list[str]]
    """Reason -> names."""


def is_pattern(name: str) -> bool:
    return bool(_MAGIC.search(name))


def files_of(folder: Path, held_out: Set[Path] = frozenset()) -> Files:
    """All files below a folder whose kind is known; links are followed. Hidden files, files about the corpus and empty
    ones are left out, and so are those that are `held_out` (real paths). Raises UserError for links that lead nowhere
    or back, and for what may not be read."""
    found = Files([], {})
    for path in _below(folder, ("**", "*"), found, frozenset()):
        if path.is_dir():
            continue
        reason = _reason_against(path, held_out)
        if reason:
            _leave_out(found, reason, path)
        else:
            found.files.append(path)
    advice = f"holds no files to read ({known_kinds()}); choose another source, or name files by a glob"
    return _sorted(found, f"{folder}: {advice}")


def matches_of(pattern: str, held_out: Set[Path] = frozenset()) -> Files:
    """The files that a glob matches: every one that it asks for, so hidden ones only if it spells their dot, as in a
    shell. Raises UserError for a file of unknown kind, for links that lead nowhere, and for what may not be read."""
    found = Files([], {})
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    for match in _below(Path(path.anchor), (*parts, "*") if parts[-1] == "**" else parts, found, frozenset()):
        if match.is_dir():
            if "**" not in parts:
                _leave_out(found, "folders", match)
        elif held_out and match.resolve() in held_out:
            _leave_out(found, _HELD_OUT, match)
        elif check_readable(match) and kind_of(match) is None:
            raise UserError(f"{match}: unknown kind of file; convert it to one of: {known_kinds()}")
        else:
            found.files.append(match)
    return _sorted(found, f"{pattern}: no such file or folder")


def check_readable(path: Path) -> bool:
    """True. Raises UserError for a file that may not be read, or only once, as a pipe."""
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; write its text to one")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: may not be read; change its permissions, or remove it")
    return True


def notes_of(found: Files) -> tuple[str, ...]:
    """Lines for the user: how many files of which kinds are read, and what is left out."""
    return (*_read(found.files), *_left_out(found))


# --- the walk --------------------------------------------------------------------------------------------------------


def _below(folder: Path, parts: Sequence[str], found: Files, above: Set[Path]) -> Iterator[Path]:
    """The paths that match the parts of a pattern. Python's own globs stop at links and pass over what may not be read.
    `above`: the real paths of the folders that `**` has entered on the way."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part != "**" and not is_pattern(part):
        if (folder / part).exists():
            yield from _below(folder / part, rest, found, above)
        return
    if not folder.is_dir():
        return
    if part == "**":
        real = folder.resolve()
        # From a folder above one on the way, the walk would come back to that one.
        if any(entered.is_relative_to(real) for entered in above):
            raise UserError(f"{folder}: a link back to {real}, which it is in; remove the link")
        above = above | {real}
        yield from _below(folder, rest, found, above)
    for entry in _entries(folder):
        path = folder / entry.name
        if entry.name.startswith(".") and not part.startswith("."):
            if part != "**" and fnmatch.fnmatchcase(entry.name, part):
                _leave_out(found, "hidden", path)
        elif part == "**":
            _check_link(path, entry)
            if entry.is_dir():
                yield from _below(path, parts, found, above)
        elif fnmatch.fnmatchcase(entry.name, part):
            _check_link(path, entry)
            yield from _below(path, rest, found, above)


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; make it readable, or remove it") from None


def _check_link(path: Path, entry: "os.DirEntry[str]") -> None:
    if entry.is_symlink():
        try:
            path.stat()
        except OSError as error:
            problem = f"a link to {path.readlink()}, which cannot be read: {error.strerror}"
            raise UserError(f"{path}: {problem}; restore that, or remove the link") from None


_HELD_OUT = "in --val"


def _reason_against(path: Path, held_out: Set[Path]) -> str | None:
    """Why a folder's file is not read; None if it is."""
    kind = kind_of(path)
    if kind is None or not path.is_file():
        return "other kinds"
    if held_out and path.resolve() in held_out:
        return _HELD_OUT
    if _is_about(path):
        return "files about the corpus"
    check_readable(path)
    # A compressed file or a table of 0 bytes is a failed download: its reader refuses it.
    is_plain = path.name.lower().endswith(kind) and kind not in (".parquet", ".arrow")
    return "empty" if is_plain and path.stat().st_size == 0 else None


def _is_about(path: Path) -> bool:
    name, kind = path.name.lower(), kind_of(path)
    return name in _ABOUT_JSON or (kind in TEXT_KINDS and bool(_ABOUT_TEXT.fullmatch(name[: name.rindex(kind)])))


# --- lines for the user ----------------------------------------------------------------------------------------------


def _sorted(found: Files, otherwise: str) -> Files:
    if not found.files:
        raise UserError("; ".join([otherwise, *_left_out(found)]))
    return Files(sorted(set(found.files)), found.left_out)


def _read(files: list[Path]) -> Iterator[str]:
    kinds = collections.Counter("".join(endings_of(path)) for path in files)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    yield f"reading {len(files):,} file{'s' * (len(files) > 1)}: {listed}"
    if about := [str(path) for path in files if _is_about(path)]:
        yield f"among them, files about the corpus ({len(about):,}): {first_names(about)}"
    seen: dict[tuple[int, int], Path] = {}
    places = ((path, path.stat()) for path in files)
    if again := [str(path) for path, at in places if seen.setdefault((at.st_dev, at.st_ino), path) != path]:
        yield f"read more than once, through links ({len(again):,}): {first_names(again)}"


def _leave_out(found: Files, reason: str, path: Path) -> None:
    found.left_out.setdefault(reason, []).append(f"{path}/" if path.is_dir() else str(path))


def _left_out(found: Files) -> Iterator[str]:
    for reason, names in sorted(found.left_out.items()):
        yield f"left out, {reason} ({len(names):,}): {first_names(sorted(names))}"
