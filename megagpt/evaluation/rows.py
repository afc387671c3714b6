"""Rows of exams: their files, and the checked values of one row.

The files of a task have the names that its `Source` lists, with one of several endings; they lie in the folder that the
user names, or come from the Hugging Face hub at one commit. All ranks read the same bytes."""

import codecs
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megagpt.console import warn
from megagpt.data.compression import COMPRESSIONS, opened
from megagpt.data.hub_files import asked, hub_file, hub_names
from megagpt.data.readers import endings_of
from megagpt.errors import NoNetwork, TransientError, UserError, first_line
from megagpt.files import is_lfs_pointer, named_path

if TYPE_CHECKING:
    from megagpt.world import World

_KINDS = (".jsonl", ".json", ".ndjson", ".parquet", ".txt", ".raw", ".tokens")
_TEXTS = (".txt", ".raw", ".tokens")
_LISTED = 8  # keys that a message names


class Source(NamedTuple):
    """The files of a task's rows. In paths on the hub, `*` matches the numbers of a file's parts."""

    repository: str
    """Data set on the hub."""
    path: str
    """Its file of the exam's rows."""
    names: tuple[str, ...]
    """Names of such a file elsewhere, without ending."""
    train: str = ""
    """The data set's file of rows to draw examples from; empty: there is none."""
    train_names: tuple[str, ...] = ()
    commit: str = ""
    """Commit of the data set; empty: the newest of `branch`."""
    branch: str = "main"

    def training(self) -> "Source | None":
        """The source of rows to draw examples from."""
        if not self.train:
            return None
        return Source(self.repository, self.train, self.train_names, commit=self.commit, branch=self.branch)


class Files(NamedTuple):
    """Files of rows that are here, the same on every rank."""

    paths: list[Path]
    sha256: str
    """Over the bytes of all of them."""
    commit: str = ""
    """Of the data set on the hub; empty: they are the user's own."""


class Row(NamedTuple):
    """One row of a file."""

    values: dict[str, Any]
    place: str
    """For messages: file and line, or file and row."""

    def text(self, key: str) -> str:
        return self._checked(key, self.values.get(key), str, "text")

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        found = list(self._checked(key, self.values.get(key), list, "a list of texts"))
        if not found or not all(isinstance(text, str) for text in found):
            raise self.problem(f"{key!r} is {found!r:.60}, not a list of texts")
        return found

    def choices(self) -> tuple[list[str], list[str]]:
        """Texts and labels of `choices`, which is a struct of lists, or a list of structs."""
        value = self.values.get("choices")
        if isinstance(value, list):
            value = {key: [c.get(key) if isinstance(c, dict) else c for c in value] for key in ("text", "label")}
        inner = Row(self._checked("choices", value, dict, "options with text and label"), self.place)
        texts, labels = inner.texts("text"), inner.texts("label")
        if len(texts) != len(labels):
            raise self.problem(f"'choices' has {len(texts)} texts and {len(labels)} labels")
        return texts, labels

    def label(self, key: str, count: int, first: int = 0) -> int:
        """Which of `count` options the label names, from 0; a whole number or its digits, counted from `first`."""
        value = self.values.get(key)
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if isinstance(number, int) and not isinstance(number, bool) and first <= number < first + count:
            return number - first
        hidden = "; labels of a test split are hidden: take the validation split" if value in ("", -1, None) else ""
        raise self.problem(f"{key!r} is {value!r:.40}, not one of {first} to {first + count - 1}{hidden}")

    def number(self, key: str) -> int:
        return self._checked(key, self.values.get(key), int, "a whole number")

    def _checked(self, key: str, value: Any, kind: type, words: str) -> Any:
        if key not in self.values:
            raise self.problem(f"no key {key!r}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.problem(f"{key!r} is {value!r:.60}, not {words}")
        return value

    def problem(self, text: str) -> UserError:
        return UserError(f"{self.place}: {text}; fix or remove the row, or fetch the file again")


def find_files(source: Source, data: str, world: "World") -> Files:
    """The files of a source, in order: in the folder `data`, or from the hub if that is empty. Every rank calls it.
    Raises UserError with the names that were looked for and what to do, and as `same_files` does."""
    names = ", ".join(f"{name}.jsonl" for name in source.names)
    if not data:
        try:
            commit = source.commit or world.from_main(lambda: newest_commit(source))
            paths = world.once_per_host(lambda: hub_files(source, commit), f"fetches {source.repository}")
        except NoNetwork:  # it says how to bring the very files
            raise
        except UserError as error:
            own = f"bring the rows yourself: one of {names} in a folder, which --data (or evaluation.data) names"
            raise UserError(f"{error}; or {own}") from None
        return same_files(paths, world, commit)
    if found := _local(source, _folder(data)):
        return same_files(found, world)
    tried = f"{names}, {source.repository}/{source.path}"
    raise UserError(f"{data}: looked for {tried}; found none; .json, .parquet, .gz and .zst will do, too")


def same_files(paths: list[Path], world: "World", commit: str = "") -> Files:
    """The files, if they hold the same bytes on every rank: with other rows, ranks would wait for each other for ever.
    Every rank calls it. Raises UserError, on every rank, with the hosts whose files differ from the main rank's."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    sha256 = digest.hexdigest()
    main, _, others = world.differing(sha256)
    if differing := list(others):
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        problem = f"exam rows on {', '.join(differing[:_LISTED])}{more} differ from those on {main}"
        raise UserError(f"{paths[0]}: {problem}; copy the files of {main} to every host")
    return Files(paths, sha256, commit)


def is_there(source: Source, data: str, fits: Callable[[Row], bool] = lambda row: True) -> bool:
    """Whether the folder `data` has the source's files. `fits`: whether a row is one of the task; asked if neither a
    file's nor a folder's name tells, as in a copy of a data set's folder."""
    folder = _folder(data)
    if _named(source, folder):
        return True
    first = next((row for path in _parts(source, folder) for row in _read(path)), None)
    return first is not None and fits(first)


def newest_commit(source: Source) -> str:
    """The commit of the data set's branch. If the hub cannot be reached: that of the source's files that came into
    the hub's cache last. Raises UserError, and TransientError if the hub is down and the cache has none."""
    from huggingface_hub import HfApi

    repository = source.repository
    try:
        return asked(
            repository, source.path, source.branch, "dataset", _bring(source),
            lambda: HfApi().dataset_info(repository, revision=source.branch).sha or source.branch,
        )  # fmt: skip
    except (NoNetwork, TransientError) as error:
        commits = sorted(_cache(source).glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
        found = next((path.name for path in reversed(commits) if _cached(source, path.name)), None)
        if found is None:
            raise
        why = "the hub is down" if isinstance(error, TransientError) else "the hub cannot be asked"
        warn(f"{repository}: {why}: its commit is {found}, the one that came into the cache last")
        return found


def hub_files(source: Source, commit: str) -> list[Path]:
    """The files of a source at a commit, in the hub's cache, fetched if they are not there, and proved by the hub's
    checksums. Raises UserError, and TransientError if the hub is down."""
    repository, bring = source.repository, _bring(source)
    wanted = _cached(source, commit)
    if not wanted:
        names = hub_names(repository, commit, "dataset", bring)
        wanted = [name for name in names if fnmatch.fnmatchcase(name, source.path)]
        if not wanted:
            there = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "") or "nothing"
            raise UserError(f"{repository}: looked for {source.path} at {commit}; found: {there}")
    return [hub_file(repository, name, commit, "dataset", bring) for name in wanted]


def _bring(source: Source) -> tuple[str, ...]:
    return (f"--include '{source.path}'",)


def _cache(source: Source) -> Path:
    """The data set's folder in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"datasets--{source.repository.replace('/', '--')}"


def _cached(source: Source, commit: str) -> list[str]:
    """The names of the source's files in the cache, in order; none if a part is missing."""
    folder = _cache(source) / "snapshots" / commit
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob(source.path))
    if "*" not in source.path:
        return names
    numbers = [re.search(r"-of-(\d+)[-.]", name) for name in names]
    return names if all(number and int(number[1]) == len(names) for number in numbers) else []


def _folder(data: str) -> Path:
    folder = named_path(data)
    if not folder.is_dir():
        raise UserError(f"{data}: {'no folder, but a file' if folder.exists() else 'no such folder'} (of exam rows)")
    return folder


def _local(source: Source, folder: Path) -> list[Path]:
    return _named(source, folder) or _parts(source, folder)


def _named(source: Source, folder: Path) -> list[Path]:
    for name in source.names:
        for kind in _KINDS:
            for compression in ("", *COMPRESSIONS):
                path = folder / f"{name}{kind}{compression}"
                if path.is_file() and not (compression and kind == ".parquet"):
                    return [path]
    # A copy of the data set's own folder.
    copies = (folder / source.repository, folder / source.repository.rpartition("/")[2])
    return next((found for copy in copies if (found := _parts(source, copy))), [])


def _parts(source: Source, folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(source.path) if path.is_file())


def read_rows(paths: list[Path]) -> list[Row]:
    """The rows of files, in order. Raises UserError for one that is damaged, with its place, and if there is none."""
    rows = [row for path in paths for row in _read(path)]
    if not rows:
        raise UserError(f"{paths[0]}: holds no row; fetch it again")
    return rows


def read_text(path: Path) -> str:
    """The whole text of a file. Raises UserError if it is not UTF-8."""
    with opened(path) as (data, _):
        try:
            return data.read().decode()
        except UnicodeDecodeError as error:
            problem = f"byte {error.start} is not UTF-8"
            raise UserError(f"{path}: {problem}; convert the file to UTF-8") from None


def is_rows(path: Path) -> bool:
    """Whether the ending is that of rows, not of one text."""
    return endings_of(path)[0] in _KINDS and not _is_text(path)


def _is_text(path: Path) -> bool:
    return endings_of(path)[0] in _TEXTS


def _read(path: Path) -> Iterator[Row]:
    if is_lfs_pointer(path):
        raise UserError(f"{path}: Git LFS's pointer to the file, not the file; fetch it with `git lfs pull`")
    kind, _ = endings_of(path)
    if kind == ".parquet":
        yield from _parquet(path)
    elif _is_text(path):
        yield Row({"text": read_text(path)}, str(path))
    elif kind == ".json":
        text = read_text(path)
        yield from _array(path, text) if text.lstrip("\ufeff \t\r\n").startswith("[") else _lines(path)
    elif kind in _KINDS:
        yield from _lines(path)
    else:
        kinds = f"{' '.join(_KINDS)}, all but .parquet also with {' '.join(COMPRESSIONS)}"
        raise UserError(f"{path}: unknown kind of file; exam rows come as {kinds}")


def _lines(path: Path) -> Iterator[Row]:
    with opened(path) as (data, _):
        for number, line in enumerate(data, start=1):
            if line.strip():
                yield _row(line.removeprefix(codecs.BOM_UTF8), f"{path} line {number}")


def _row(line: bytes, place: str) -> Row:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({first_line(error)}); fix the line, or fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: {value!r:.40} is not an object with keys; fix the line, or fetch the file again")
    return Row(value, place)


def _array(path: Path, text: str) -> Iterator[Row]:
    try:
        values = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({first_line(error)}); fix it, or fetch the file again") from None
    for number, value in enumerate(values, start=1):
        place = f"{path} row {number}"
        if not isinstance(value, dict):
            raise UserError(f"{place}: {value!r:.40} is not an object with keys; fix the row, or fetch the file again")
        yield Row(value, place)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's
        raise UserError(f"{path}: corrupt, or not a parquet file: {first_line(error)}; fetch it again") from None
    for number, value in enumerate(values, start=1):
        yield Row(value, f"{path} row {number}")


def unknown_schema(row: Row, known: list[tuple[str, ...]]) -> UserError:
    """The error for a row that has none of the sets of keys that a task reads."""
    found = ", ".join(list(row.values)[:_LISTED]) or "none"
    wanted = ", or ".join(" + ".join(keys) for keys in known)
    return UserError(f"{row.place}: unknown schema: found the keys {found}; looked for {wanted}")
