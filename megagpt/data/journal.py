"""The memory of a preparation: how far it is, which rows it left out, and whether its sources are still the same."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.data.documents import BadRow, Cursor, DocumentBatch, FileRecord, Source
from megagpt.data.shards import JOURNAL
from megagpt.errors import UserError
from megagpt.files import write_atomic

Json = dict[str, Any]
# Bad rows that are named in the manifest.
_NAMED_ROWS = 10
# Settings whose options have other names.
_OPTIONS = {
    "hub": "the data set", "stdlib": "Python", "tokenizer": "the tokenizer", "val_hub": "--val", "val_stdlib": "--val",
    "val_subset": "--subset", "val_text_key": "--text-key", "val_separator": "--separator",
}  # fmt: skip


@dataclass
class Reading:
    """The part of one source that is read."""

    cursor: Cursor | None = None
    files: list[FileRecord] = field(default_factory=list)
    """Files that ended before the cursor."""


@dataclass
class Journal:
    """The state of a preparation; `splits` is that of its writers."""

    identity: Json
    readings: list[Reading]
    documents: int = 0
    skipped: int = 0
    """Bad rows that were left out."""
    first_skipped: list[str] = field(default_factory=list)
    tail_tokens: int = 0
    """Tokens held out at the end of the text because no whole document was."""
    splits: Json = field(default_factory=dict)

    def note(self, reading: Reading, batch: DocumentBatch, skip_bad: int) -> None:
        """Take over a batch's cursor, files and bad rows. Raises UserError if there are more than `skip_bad`."""
        if self.skipped + len(batch.bad) > skip_bad:
            raise _too_many(batch.bad[skip_bad - self.skipped], skip_bad, self.documents == 0)
        self.skipped += len(batch.bad)
        named = [f"{row.place}: {row.problem}" for row in batch.bad]
        self.first_skipped = (self.first_skipped + named)[:_NAMED_ROWS]
        reading.cursor = batch.cursor
        reading.files += batch.files

    @property
    def record(self) -> Json:
        """The part that the manifest keeps, too."""
        skipped = {"rows": self.skipped, "first": self.first_skipped}
        return {"skipped": skipped, "tail_tokens": self.tail_tokens, "identity": self.identity}

    def save(self, folder: Path) -> None:
        sources = [{"cursor": reading.cursor, "files": reading.files} for reading in self.readings]
        state = self.record | {"documents": self.documents, "sources": sources, "splits": self.splits}
        write_atomic(folder / JOURNAL, json.dumps(state).encode())


def _too_many(row: BadRow, skip_bad: int, fresh: bool) -> UserError:
    """fresh: no document is prepared yet, so that every setting may change."""
    ways = ["choose another --text-key"] if row.other_key and fresh else []
    ways += [f"{row.remedy}, then run the same command again"] if row.remedy else []
    if skip_bad:
        more = f"more than --skip-bad {skip_bad} rows are bad; the next one is"
        return UserError(f"{more} {row.place}: {row.problem}; {'; or '.join([*ways, 'allow more'])}")
    ways.append("leave out up to N such rows with --skip-bad N")
    return UserError(f"{row.place}: {row.problem}; {'; or '.join(ways)}")


def load_journal(folder: Path, identity: Json, sources: list[Source], skip_bad: int) -> Journal:
    """The journal of an unfinished preparation, or a new one if it has no document yet. Raises UserError if the journal
    is corrupt, of another preparation, or has left out more than `skip_bad` rows."""
    path = folder / JOURNAL
    fresh = Journal(identity, [Reading() for _ in sources])
    if not path.exists():
        return fresh
    try:
        state = _upgraded(json.loads(path.read_text(encoding="utf-8")))
        readings = [Reading(s["cursor"], [FileRecord(*file) for file in s["files"]]) for s in state["sources"]]
        skipped = state["skipped"]
        journal = Journal(
            state["identity"], readings, state["documents"], skipped["rows"], skipped["first"], state["tail_tokens"],
            state["splits"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: corrupt ({error!r:.60}); remove {folder} and prepare the data again") from None
    if journal.documents == 0:
        return fresh
    _same_settings(folder, journal.identity, identity)
    for source, reading in zip(sources, journal.readings, strict=True):
        if reading.cursor is not None:
            _refuse(folder, source.difference(reading.cursor, reading.files, False))
    if journal.skipped > skip_bad:
        problem = f"{journal.skipped} bad rows are left out already, more than --skip-bad {skip_bad}"
        raise UserError(f"{folder}: {problem}; give --skip-bad {journal.skipped} or more, or choose another --out")
    journal.identity = identity
    return journal


def check_finished(folder: Path, manifest: Json, identity: Json, sources: list[Source]) -> None:
    """Raises UserError unless the manifest's sources and settings are these."""
    state = _upgraded(manifest)
    _same_settings(folder, state["identity"], identity)
    for source, recorded in zip(sources, state["sources"], strict=True):
        files = [FileRecord(*file) for file in recorded["files"]]
        _refuse(folder, source.difference({"file": len(files), "row": 0}, files, True))


def _same_settings(folder: Path, before: Json, now: Json) -> None:
    if (before["val"] is None) != (now["val"] is None):
        _refuse(folder, f"--val was {'not given' if before['val'] is None else 'given'}")
    before, now = _flat(before), _flat(now)
    if before == now:
        return
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if all(key.endswith("revision") and before.get(key) and now.get(key) for key in keys):
        commits = " ".join(f"{_option(key)} {before[key]}" for key in keys)
        problem = "was prepared from something else: the data set has changed since"
        raise UserError(f"{folder}: {problem}; {commits} goes on with the data set as it was")
    # --val shares options with SOURCE.
    changes = dict.fromkeys(f"{_option(key)} was {before.get(key)}, is {now.get(key)}" for key in keys)
    _refuse(folder, ", ".join(changes))


def _option(key: str) -> str:
    """The option that decides a setting."""
    return _OPTIONS.get(key, f"--{key.replace('_', '-')}")


def _flat(identity: Json) -> Json:
    """Settings by the names of their options."""
    val = {f"val_{key}": value for key, value in (identity["val"] or {}).items()}
    rest = {key: value for key, value in identity.items() if key not in ("source", "val")}
    return {**identity["source"], **val, **rest}


def _refuse(folder: Path, difference: str | None) -> None:
    if difference:
        problem = f"was prepared from something else: {difference}"
        raise UserError(f"{folder}: {problem}; choose another --out, or remove the folder")


def _upgraded(state: Json) -> Json:
    """A journal or a manifest of version 0.1.0 in today's form: it knows its files by name and size only."""
    if "sources" in state:
        return state
    source, cursor = dict(state["identity"]["source"]), state.get("cursor")
    files = [[name, [size, None, None], None] for name, size in source.pop("files", [])]
    if "text_key" in source and "hub" not in source:
        source["separator"] = None
        if cursor is not None:
            if cursor["file"] < len(files):
                cursor = {**cursor, "content": None, "state": files[cursor["file"]][1]}
            files = files[: cursor["file"]]
    return {
        **state,
        "identity": {**state["identity"], "source": source, "val": None},
        "sources": [{"cursor": cursor, "files": files}],
        "skipped": {"rows": 0, "first": []},
        "tail_tokens": 0,
    }
