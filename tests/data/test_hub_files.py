"""Single files of a data set on the Hugging Face hub, by the real client against a small hub on this machine."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.data import hub_files
from megagpt.data.hub_files import hub_file, hub_names
from megagpt.errors import UserError
from tests.data.hub import Hub, etag
from tests.processes import run_ranks
from tests.runs import PATIENCE

PATH = "data/deep/validation.bin"
ROWS = {PATH: b"rows" * 100, "data/other.jsonl": b"{}\n"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(ROWS).running() as server:
        yield server


def answers(variables: dict[str, str], calls: list[tuple[str, str, str]]) -> list[str]:
    """The answer of `hub_file` for each (repository, path, revision): the path in the cache, or the error."""
    os.environ.update(variables)  # before the client is first imported
    found = []
    for repo, path, revision in calls:
        try:
            found.append(str(hub_file(repo, path, revision, "dataset")))
        except UserError as error:
            found.append(str(error))
    return found


def listed(variables: dict[str, str], repo: str, commit: str) -> list[str]:
    os.environ.update(variables)
    return hub_names(repo, commit, "dataset")


def asked(variables: dict[str, str], *calls: tuple[str, str, str]) -> list[str]:
    (found,) = run_ranks(1, answers, variables, list(calls))
    return found


def test_a_file_is_fetched_once_and_proved(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A later commit does not change what an earlier one gives. A branch is taken from the cache only if the hub does
    not answer, with a line about it."""
    variables, first = hub.environment(tmp_path), hub.commit
    call = (hub.repository, PATH, first)
    (path, again, branch) = asked(variables, call, call, (hub.repository, PATH, "main"))
    assert path == again == branch
    assert f"/{first}/" in path
    assert Path(path).read_bytes() == ROWS[PATH]
    assert Path(path).resolve().name == etag(PATH, ROWS[PATH])
    assert len([request for request in hub.requests if request.startswith("GET")]) == 1
    hub.revise({PATH: b"new rows"})
    (old, new) = asked(variables, call, (hub.repository, PATH, "main"))
    assert (Path(old).read_bytes(), Path(new).read_bytes()) == (ROWS[PATH], b"new rows")
    assert run_ranks(1, listed, variables, hub.repository, first) == [sorted(ROWS)]
    hub.gated = "Ask the owner."
    (refused,) = asked(variables, (hub.repository, PATH, "main"))
    assert "gated: accept its terms" in refused
    capsys.readouterr()
    assert asked(variables | {"HF_HUB_OFFLINE": "1"}, (hub.repository, PATH, "main")) == [new]
    said = capsys.readouterr().out
    assert f"the hub cannot be asked: main is commit {hub.commit} in the cache, and may be another by now" in said


def test_a_missing_file_is_named(hub: Hub, tmp_path: Path) -> None:
    file, repo, revision, name = asked(
        hub.environment(tmp_path),
        (hub.repository, "data/no.parquet", hub.commit),
        ("some/nothing", PATH, "main"),
        (hub.repository, PATH, "v7"),
        ("a/b/c", PATH, "main"),
    )
    assert file == f"{hub.repository}: data/no.parquet is not among its files at {hub.commit}"
    assert "some/nothing: the Hugging Face hub has no data set of that name that you may see" in repo
    assert "has no revision 'v7'" in revision
    assert "a/b/c: no name of a repository" in name
    hub.gated = "Ask the owner."
    (gated,) = asked(hub.environment(tmp_path), (hub.repository, PATH, "main"))
    assert f"accept its terms at {hub.url}/datasets/{hub.repository}, then log in" in gated
    assert "Ask the owner." in gated


@pytest.mark.slow
def test_the_advice_without_a_network_brings_a_file(hub: Hub, tmp_path: Path) -> None:
    offline = hub.environment(tmp_path / "here") | {"HF_HUB_OFFLINE": "1"}
    call = (hub.repository, PATH, hub.commit)
    advice, branch, short = asked(offline, call, (hub.repository, PATH, "a b"), (hub.repository, PATH, hub.commit[:7]))
    assert f"--revision 'a b' {PATH}`" in branch
    assert f"--revision {hub.commit[:7]} {PATH}`" in short
    assert "by all its 40 digits only" in short
    assert advice.startswith(f"{hub.repository}: {PATH} is not in the cache here, and HF_HUB_OFFLINE is set")
    words = shlex.split(advice.split("`")[1])
    words[0] = str(Path(sys.executable).parent / words[0])
    there = os.environ | hub.environment(tmp_path / "there")
    subprocess.run(words, env=there, capture_output=True, check=True, timeout=PATIENCE)
    brought, cache = advice.partition("copy the folder ")[2].split()[0], Path(advice.rpartition(") into ")[2])
    shutil.copytree(tmp_path / "there" / "hub" / brought, cache / brought, symlinks=True)
    (path,) = asked(offline, call)
    assert Path(path).read_bytes() == ROWS[PATH]


def test_a_log_gets_lines_about_large_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub_files, "_PLAIN_SECONDS", 0)
    for total in (4_000_000, 800):
        with hub_files._Progress(total=total, desc="https://a.host/folder/rows.bin", unit="B", unit_scale=True) as bar:
            bar.update(total // 4)
            bar.update(total - total // 4)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("rows.bin:  25%")
    assert "1.00M/4.00M" in err


def test_the_check_of_a_very_large_file_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = b"weights" * 1_000_000
    (tmp_path / hashlib.sha256(data).hexdigest()).write_bytes(data)
    (tmp_path / "model.safetensors").symlink_to(hashlib.sha256(data).hexdigest())
    assert hub_files._difference(tmp_path / "model.safetensors") is None
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(hub_files, "_SLOW", len(data))
    assert hub_files._difference(tmp_path / "model.safetensors") is None
    assert capsys.readouterr().err == "checking model.safetensors, 7 MB, against the hub's checksum\n"
