"""A run and the starts of its jobs, for the tests of the verdict."""

from pathlib import Path

import pytest

from megagpt.config_file import load_config
from tests.cluster.job import Job
from tests.conftest import write_tiny


@pytest.fixture
def job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(tmp_path, load_config(str(write_tiny(tmp_path, tmp_path / "corpus"))), capsys)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the repository, and with no tool of a cluster on the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
