"""The files of a folder or a glob: those left out are named, and one that cannot be read is an error."""

import os
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.data.file_list import files_of, matches_of
from megagpt.data.sources import open_source
from megagpt.errors import UserError
from tests.data.writers import error_of, read

ROW = '{"text": "%s"}\n'


def write(folder: Path, *names: str) -> Path:
    """Files that each hold one row, their name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW % name)
    return folder


def test_a_clone_is_read_without_its_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    papers = ["README_zh.md", "LICENSE.txt", "requirements-dev.txt", "dataset_infos.json", "data/state.json"]
    hidden = [".git/a.jsonl", "data/.ipynb_checkpoints/a-checkpoint.jsonl", "data/._a.jsonl"]
    folder = write(tmp_path / "clone", "data/a.jsonl", "data/license_plates.jsonl", *papers, *hidden, "b.lz4")
    (folder / "data" / "none.jsonl").touch()
    arguments = [
        "data",
        "prepare",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--val-fraction",
        "0",
        "--workers",
        "1",
    ]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "reading 2 files: 2 .jsonl\n" in output
    assert "\n2 documents" in output.replace(f"{tmp_path}/out: ", "")
    lines = {line.partition(" (")[0]: line for line in output.splitlines()}
    for reason, names in {
        "left out, hidden": [".git/", "data/.ipynb_checkpoints/", "data/._a.jsonl"],
        "left out, files about the corpus": papers,
        "left out, other kinds": ["b.lz4"],
        "left out, empty": ["data/none.jsonl"],
    }.items():
        for name in names:
            assert f"{folder}/{name}" in lines[reason]


def test_shards_may_be_below_their_corpus(tmp_path: Path) -> None:
    folder = write(tmp_path / "corpus", "a.jsonl", "b.jsonl")
    command = ["data", "prepare", str(folder), "--out", f"{folder}/shards", "--val-fraction", "0", "--workers", "1"]
    assert main(command) == 0
    assert main(command) == 0
    (folder / "shards" / "manifest.json").rename(folder / "shards" / "journal.json")
    assert [path.name for path in files_of(folder).files] == ["a.jsonl", "b.jsonl"]


def test_a_folder_of_nothing_else_says_how_to_read_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "readmes", "a/README.md", "b/README.md")
    message = error_of(folder)
    assert f"{folder}/a/README.md" in message
    assert "glob" in message
    asked = open_source(f"{folder}/**/README.md")
    assert len(read(asked)) == 2
    assert f"among them, files about the corpus (2): {folder}/a/README.md" in asked.notes[1]
    assert len(read(open_source(f"{folder}/a/README.md"))) == 1


@pytest.mark.parametrize("name", ["A.JSONL", "a.Txt", "a.JSON", "a.NDJSON"])
def test_endings_ignore_case(tmp_path: Path, name: str) -> None:
    assert len(read(open_source(str(write(tmp_path / "folder", name))))) == 1


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "b.jsonl", "sub/c.jsonl")
    folder = write(tmp_path / "folder", "a.jsonl")
    (folder / "part2").symlink_to("../elsewhere")
    (folder / "d.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")
    (tmp_path / "whole").symlink_to(folder)
    expected = ["a.jsonl", "b.jsonl", "b.jsonl", "sub/c.jsonl"]
    for name in (folder, tmp_path / "whole", folder / "**" / "*.jsonl", f"{folder}/**"):
        source = open_source(str(name))
        assert sorted(read(source)) == expected, name
        (note,) = (note for note in source.notes if "more than once" in note)
        assert "part2/b.jsonl" in note


@pytest.mark.parametrize("target", ["..", "../folder", "self", "other"])
def test_links_in_a_circle_are_refused(tmp_path: Path, target: str) -> None:
    folder = write(tmp_path / "folder", "a.jsonl", "sub/b.jsonl")
    name = {"self": "self"}.get(target, "loop")
    (folder / "sub" / name).symlink_to(target)
    (folder / "sub" / "other").symlink_to("loop")
    for name_of_source in (folder, f"{folder}/**/*.jsonl"):
        message = error_of(name_of_source)
        assert str(folder / "sub") in message
        assert "link" in message


def test_a_link_to_a_folder_above_the_source_is_named(tmp_path: Path) -> None:
    """It is refused before the folders beside the source are read."""
    folder = write(tmp_path / "parent" / "z" / "corpus", "sub/b.jsonl")
    (tmp_path / "parent" / "a").symlink_to("missing")
    (folder / "sub" / "up").symlink_to(tmp_path / "parent")
    for source in (folder, f"{folder}/**/*.jsonl"):
        assert f"{folder}/sub/up: a link back to {tmp_path}/parent, which it is in" in error_of(source)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone", "gone.xyz"])
def test_links_that_lead_nowhere_are_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "folder", "a.jsonl")
    (folder / name).symlink_to("missing")
    for source in (folder, f"{folder}/*", folder / name):
        message = error_of(source)
        assert str(folder / name) in message
        assert "a link to missing" in message


def test_folders_that_may_not_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "folder", "a.jsonl", "locked/b.jsonl")
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    for source in (folder, f"{folder}/**/*.jsonl", f"{folder}/*/*.jsonl"):
        assert f"{folder}/locked: cannot be read: Permission denied" in error_of(source)


def test_files_that_may_not_be_read_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "folder", "a.jsonl", "locked.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    for source in (str(folder), f"{folder}/*", f"{folder}/locked.jsonl"):
        with pytest.raises(UserError, match=r"locked\.jsonl: may not be read"):
            open_source(source)


def test_pipes_are_never_waited_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", "a.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    assert read(open_source(str(folder))) == ["a.jsonl"]
    for source in (f"{folder}/*", f"{folder}/pipe.jsonl"):
        assert "pipe.jsonl: not a regular file" in error_of(source)


def test_a_failed_download_is_an_error(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.arrow", "a.txt.xz", "a.csv.bz2"):
        folder = write(tmp_path / name, "good.jsonl")
        (folder / name).touch()
        assert str(folder / name) in error_of(folder)


def test_globs_take_what_they_match_as_a_shell_does(tmp_path: Path) -> None:
    names = ["a.jsonl", "b.txt", ".c.jsonl", "sub/d.jsonl", ".hidden/e.jsonl", "[x].jsonl"]
    folder = write(tmp_path / "folder", *names)
    for pattern, expected in {
        "*.jsonl": ["[x].jsonl", "a.jsonl"],
        "?.jsonl": ["a.jsonl"],
        "[ab].*": ["a.jsonl", "b.txt"],
        ".*.jsonl": [".c.jsonl"],
        ".hidden/*.jsonl": [".hidden/e.jsonl"],
        "**/*.jsonl": ["[x].jsonl", "a.jsonl", "sub/d.jsonl"],
        "**": ["[x].jsonl", "a.jsonl", "b.txt", "sub/d.jsonl"],
        "*/d.jsonl": ["sub/d.jsonl"],
    }.items():
        assert [str(p.relative_to(folder)) for p in matches_of(f"{folder}/{pattern}").files] == expected, pattern
    assert [p.name for p in files_of(folder).files] == ["[x].jsonl", "a.jsonl", "b.txt", "d.jsonl"]
    assert read(open_source(f"{folder}/[x].jsonl")) == ["[x].jsonl"], "a name, not a pattern"
    assert "folders (1): " in " ".join(open_source(f"{folder}/*").notes)


@pytest.mark.parametrize("name", ["mlfoundations/dclm-baseline-1.0", "someone/data.v2", "a/b"])
def test_names_with_dots_are_asked_from_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []
    monkeypatch.setattr("megagpt.data.sources.hub_source", lambda name, *rest: asked.append(name))
    open_source(name)
    assert asked == [name]
    for missing in ("corpora/missing.jsonl", "corpora/missing.TXT.gz", "./a", "/a/b", "a/b/c-1.0", "a-1.0"):
        assert f"{missing}: no such file" in error_of(missing)
    assert asked == [name]
