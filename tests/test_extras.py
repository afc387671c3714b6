"""The commands that install optional libraries."""

import importlib.metadata
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megagpt import extras
from tests.processes import REPOSITORY

EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.slow
def test_the_printed_command_installs_from_the_checkout() -> None:
    """Except that nothing is fetched: pip says what it would do."""
    command = shlex.split(extras.install_extra("report"))
    assert command[0] == sys.executable
    options = ["--dry-run", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([*command, *options], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Would install megagpt" in done.stdout
    assert "does not provide the extra" not in done.stderr


def test_an_installed_copy_names_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "_ABOVE", tmp_path)
    listed = ["torch<3,>=2.11", *(f'{name}; extra == "{extra}"' for extra, names in EXTRAS.items() for name in names)]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: listed if name == "megagpt" else None)
    for extra in ("report", "harness", "float8"):
        assert shlex.split(extras.install_extra(extra)) == [sys.executable, "-m", "pip", "install", *EXTRAS[extra]]


def test_each_printed_extra_exists() -> None:
    for path in (REPOSITORY / "megagpt").rglob("*.py"):
        text = path.read_text()
        for part in text.split("install_extra('")[1:]:
            assert part.partition("'")[0] in EXTRAS, path
        assert "pip install" not in text or path.name == "extras.py", f"{path}: use megagpt/extras.py"
