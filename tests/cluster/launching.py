"""Calls of `megagpt launch`, for the tests of its actions."""

from pathlib import Path

import pytest

from megagpt.cli import main

Capture = pytest.CaptureFixture[str]


def program(name: str, script: str) -> None:
    """Put a shell script on the path, in `bin` of the current folder."""
    path = Path("bin") / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def refusal(capsys: Capture, *arguments: str) -> str:
    """The one line with which `launch` refuses."""
    assert main(["launch", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megagpt: error: ")
    return line
