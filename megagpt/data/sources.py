"""Documents from text, jsonl, parquet, the Hugging Face hub and Python's standard library.

A source yields batches of documents in a fixed order. Each batch comes with a cursor, which is JSON and marks the place
at which the next batch starts, so another process can resume reading there.
"""

import ast
import gzip
import inspect
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from megagpt.errors import UserError, did_you_mean, first_line

# Characters of text in a batch: enough to be worth sending to a worker, few enough to bound memory.
_BATCH_CHARACTERS = 1_000_000

Cursor = dict[str, Any]
Reader = Callable[[Path, str, int], Iterator[tuple[str, float]]]
"""(path, text key, rows to skip) -> texts, each with the share of the file read so far."""


class DocumentBatch(NamedTuple):
    """Documents, the cursor of the next batch, and the share of the source read so far (0 to 1, None if unknown)."""

    documents: list[str]
    cursor: Cursor
    fraction: float | None


@dataclass(frozen=True)
class Source:
    """A corpus in a fixed order."""

    name: str
    batches: Callable[[Cursor | None], Iterator[DocumentBatch]] = field(repr=False)
    """Batches from a cursor on, from the start if it is None."""
    identity: dict[str, Any]
    """Equal identities give equal documents."""


def open_source(name: str, text_key: str = "text", subset: str | None = None, split: str = "train") -> Source:
    """The source called `name`: `stdlib`, a file, a folder or a glob of files, or a data set on the hub. Raises
    UserError if there is none."""
    if name == "stdlib":
        return _stdlib_source()
    path = Path(name).expanduser()
    if path.is_file():
        return _file_source(name, [path], text_key)
    if path.is_dir():
        known = tuple(_READERS)
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.lower().endswith(known)]
        return _file_source(name, files, text_key)
    if any(c in name for c in "*?["):
        found = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        return _file_source(name, [p for p in sorted(found) if p.is_file()], text_key)
    if path.suffix or path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"{name}: no such file or folder")
    return _hub_source(name, text_key, subset, split)


# --- files -----------------------------------------------------------------------------------------------------------


def _file_source(name: str, files: list[Path], text_key: str) -> Source:
    if not files:
        raise UserError(f"{name}: holds no {', '.join(_READERS)} files; choose another source")
    readers = [_reader(file) for file in files]
    sizes = [file.stat().st_size for file in files]
    total = max(1, sum(sizes))

    def batches(cursor: Cursor | None) -> Iterator[DocumentBatch]:
        start, skip = (cursor["file"], cursor["row"]) if cursor else (0, 0)
        documents: list[str] = []
        characters = 0
        for i in range(start, len(files)):
            for row, (text, share) in enumerate(readers[i](files[i], text_key, skip), start=skip + 1):
                documents.append(text)
                characters += len(text)
                if characters >= _BATCH_CHARACTERS:
                    fraction = (sum(sizes[:i]) + share * sizes[i]) / total
                    yield DocumentBatch(documents, {"file": i, "row": row}, fraction)
                    documents, characters = [], 0
            skip = 0
        yield DocumentBatch(documents, {"file": len(files), "row": 0}, 1.0)

    listed = [[file.name, size] for file, size in zip(files, sizes, strict=True)]
    return Source(name, batches, {"files": listed, "text_key": text_key})


def _reader(path: Path) -> Reader:
    for ending, reader in _READERS.items():
        if path.name.lower().endswith(ending):
            return reader
    raise UserError(f"{path}: unknown kind of file; convert it to one of: {', '.join(_READERS)}")


def _read_text(path: Path, text_key: str, skip: int) -> Iterator[tuple[str, float]]:
    """A text file is one document."""
    if skip == 0:
        try:
            yield path.read_text(encoding="utf-8"), 1.0
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None


def _read_jsonl(path: Path, text_key: str, skip: int) -> Iterator[tuple[str, float]]:
    size = max(1, path.stat().st_size)
    with path.open("rb") as raw:
        try:
            for number, line in itertools.islice(enumerate(_decompress(path, raw), start=1), skip, None):
                # The cursor counts a blank line as an empty document; `prepare` drops empty documents.
                text = _json_text(path, number, line, text_key) if line.strip() else ""
                yield text, raw.tell() / size
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{path}: corrupt compression: {first_line(error)}; fetch the file again") from None


def _decompress(path: Path, raw: BinaryIO) -> Iterable[bytes]:
    """The lines of a file, decompressed according to its name."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return _zstd_lines(raw)
    return raw


def _zstd_lines(raw: BinaryIO) -> Iterator[bytes]:
    """Decompress frame by frame: the library's own stream ends without an error if the file is cut off."""
    # Many corpora are compressed with --long, whose largest window is 2 GiB.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, rest = None, b""
    while compressed := raw.read(2**17):
        while compressed:
            frame = frame or decompressor.decompressobj()
            *lines, rest = (rest + frame.decompress(compressed)).split(b"\n")
            yield from lines
            compressed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("ends in the middle of a frame")
    if rest:
        yield rest


def _json_text(path: Path, number: int, line: bytes, text_key: str) -> str:
    remedy = "fix or remove the line"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number}: not JSON ({error}); {remedy}") from None
    if not isinstance(row, dict) or text_key not in row:
        found = did_you_mean(text_key, row) if isinstance(row, dict) and row else f"the line is {row!s:.40}"
        raise UserError(f"{path} line {number}: no key {text_key!r}; {found} (--text-key)")
    if not isinstance(row[text_key], str):
        raise UserError(f"{path} line {number}: {text_key!r} is {row[text_key]!r:.40}, not text; {remedy}")
    return row[text_key]


def _read_parquet(path: Path, text_key: str, skip: int) -> Iterator[tuple[str, float]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                known = did_you_mean(text_key, file.schema_arrow.names)
                raise UserError(f"{path}: no column {text_key!r}; {known} (--text-key)")
            row, rows = 0, file.metadata.num_rows
            for group in range(file.num_row_groups):
                length = file.metadata.row_group(group).num_rows
                if row + length <= skip:
                    row += length
                    continue
                for column in file.iter_batches(batch_size=256, row_groups=[group], columns=[text_key]):
                    for text in column.column(0).to_pylist():
                        row += 1
                        if row <= skip:
                            continue
                        if not isinstance(text, str):
                            raise UserError(f"{path} row {row}: {text_key!r} is {text!r:.40}, not text; remove the row")
                        yield text, row / rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: corrupt, or not a parquet file: {first_line(error)}; fetch it again") from None


_READERS: dict[str, Reader] = {
    **dict.fromkeys((".txt", ".md", ".text"), _read_text),
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".ndjson"), _read_jsonl),
    ".parquet": _read_parquet,
}


# --- the hub ---------------------------------------------------------------------------------------------------------


def _hub_source(name: str, text_key: str, subset: str | None, split: str) -> Source:
    import datasets
    import huggingface_hub

    datasets.utils.logging.set_verbosity_error()
    try:
        # One commit for the whole preparation, even if the data set changes during an interruption.
        revision = huggingface_hub.HfApi().dataset_info(name, revision="main").sha
        stream = datasets.load_dataset(name, subset, split=split, streaming=True, revision=revision)
    except Exception as error:
        place = f"the Hugging Face hub (subset {subset!r}, split {split!r})"
        problem = f"neither a file or folder here, nor readable from {place}: {first_line(error)}"
        raise UserError(f"{name}: {problem}") from None

    def batches(cursor: Cursor | None) -> Iterator[DocumentBatch]:
        documents: list[str] = []
        characters = 0
        try:
            dataset = stream.select_columns([text_key])
            if cursor:
                dataset.load_state_dict(cursor)
            for row in dataset:
                text = row[text_key]
                if not isinstance(text, str):
                    raise UserError(f"{name}: {text_key!r} of a row is {text!r:.40}, not text; choose a --text-key")
                documents.append(text)
                characters += len(text)
                if characters >= _BATCH_CHARACTERS:
                    yield DocumentBatch(documents, dataset.state_dict(), None)
                    documents, characters = [], 0
            yield DocumentBatch(documents, dataset.state_dict(), 1.0)
        except UserError:
            raise
        except Exception as error:  # from the hub, its client, or a corrupt file
            raise UserError(f"{name}: reading {text_key!r} (--text-key) failed: {first_line(error)}") from None

    identity = {"hub": name, "subset": subset, "split": split, "text_key": text_key, "revision": revision}
    return Source(name, batches, identity)


# --- Python's standard library ---------------------------------------------------------------------------------------


def _stdlib_source() -> Source:
    """English text on every machine: the standard library's docstrings, and the language reference of `help()`. Code is
    left out: a third of its tokens would be single spaces of indentation, and losses would be falsely low."""

    def batches(cursor: Cursor | None) -> Iterator[DocumentBatch]:
        # Some texts are in several modules. Spaces of indentation would be a third of all tokens; tabs are few.
        indent = re.compile("^(?: {4})+", re.MULTILINE)
        texts = dict.fromkeys(_stdlib_documents())
        documents = [indent.sub(lambda spaces: "\t" * (len(spaces[0]) // 4), text) for text in texts]
        yield DocumentBatch(documents[cursor["row"] if cursor else 0 :], {"row": len(documents)}, 1.0)

    return Source("stdlib", batches, {"stdlib": sys.version})


def _stdlib_documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    root = Path(inspect.getsourcefile(ast) or ast.__file__).parent
    skipped = {"test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # deliberately broken examples
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        if any(texts):
            yield "\n\n".join(filter(None, texts))
