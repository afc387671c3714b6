"""Text never ends a command: characters that a console cannot show, readers that leave, closed and full streams."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt import cli, console
from megagpt.cli import main
from tests.conftest import metrics, write_tiny
from tests.processes import REPOSITORY, environment

PROMPT = "Zürich \N{HUGGING FACE} \u2019"
NAME = "zürich"


def stand_in(monkeypatch: pytest.MonkeyPatch, encoding: str) -> tuple[io.BytesIO, io.BytesIO]:
    """Streams of a console with that encoding, as Python makes them."""
    raw = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw[0], encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw[1], encoding=encoding, errors="backslashreplace"))
    return raw


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose name and samples are beyond ASCII, trained with an ASCII console."""
    folder = tmp_path_factory.mktemp("runs")
    sections = {"run": {"name": NAME}, "sampling": {"prompt": PROMPT}, "train": {"tokens": 256}}
    config = write_tiny(folder, corpus, **sections)
    with pytest.MonkeyPatch.context() as patch:
        stdout, _ = stand_in(patch, "ascii")
        assert main(["train", str(config)]) == 0
        text = stdout.getvalue().decode("ascii")
    run = folder / "runs" / NAME
    assert r"> Z\xfcrich \U0001f917 \u2019" in text
    assert metrics(run, "samples")[0]["samples"][0].startswith(PROMPT)
    return run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    "words",
    [
        ["sample", "RUN", "--prompt", PROMPT, "--max-tokens", "8"],
        ["sample", "RUN", "--prompt", PROMPT, "--max-tokens", "8", "--stream"],
        ["status", "RUN"], ["status", "RUN", "--json"], ["status", "FOLDER"],
        ["checkpoint", "verify", "RUN"], ["checkpoint", "show", "RUN"],
        ["config", "RUN/config.yaml"], ["export", "RUN", "--to", "RUN/export"],
    ],
    ids=lambda words: " ".join(words[:3:2] if "checkpoint" not in words else words[:2]),
)  # fmt: skip
def test_each_command_shows_what_the_console_can(
    words: list[str], encoding: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout, stderr = stand_in(monkeypatch, encoding)
    named = {"RUN": str(run), "FOLDER": str(run.parent), "RUN/config.yaml": str(run / "config.yaml")}
    arguments = [named.get(word, word).replace("RUN/export", str(tmp_path / "ü")) for word in words]
    assert main(arguments) == 0, stderr.getvalue()
    shown = "ü" if encoding == "latin-1" else r"\xfc"
    text = stdout.getvalue().decode(encoding)
    assert any(f"{z}{u}rich" in text for z in "zZ" for u in (shown, r"\u00fc")), "JSON has an escape of its own"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_error_shows_what_the_console_can(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stderr = stand_in(monkeypatch, encoding)
    assert main(["train", "absent_é_’.yaml"]) == 2
    assert stderr.getvalue().count(b"\n") == 1
    assert rb"\u2019.yaml" in stderr.getvalue()


@pytest.mark.parametrize("words", [["models"], ["--help"], ["config", "--keys"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(words: list[str]) -> None:
    """The whole process: Python writes what is left when it exits, and complains if it cannot."""
    shell = f'set -o pipefail; "{sys.executable}" -m megagpt {" ".join(words)} | true'
    variables = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", "-c", shell], env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_pipe_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the one to a process that reads files: whether stdout is read decides nothing about it."""

    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "parse", broken)
    with pytest.raises(BrokenPipeError):
        main(["models"])
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError):
            main(["models"])
        os.close(reader)
        assert main(["models"]) == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    shell = f'"{sys.executable}" -m megagpt models {closed}'
    variables = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", "-c", shell], env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_is_an_error_of_a_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["models"]) == 2
        assert sys.stdout is not full
        with pytest.raises(OSError, match="No space"):
            full.close()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("gone", ["full disk", "pipe without a reader"])
def test_a_run_outlives_the_stream_of_its_lines(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if gone == "full disk":
        stream = Path("/dev/full").open("w")  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(3):
        console.say("step 1")
    assert sys.stdout is not stream
