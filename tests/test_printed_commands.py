"""Commands that are printed can be typed: whatever the names of folders hold, a shell hands over what was meant."""

import re
import shlex
from pathlib import Path

import pytest

from megagpt.cli import main, make_parser
from megagpt.commands.options import parse
from megagpt.config_file import load_config
from tests.conftest import Refusal, write_tiny

# What a shell, a YAML list or a glob would take apart.
AWKWARD = "it's [a, b] {c: d} # $HOME *"


def resumed(command: str) -> Path:
    """The folder that a printed command resumes."""
    name, *arguments = shlex.split(command)
    assert name == "megagpt"
    return Path(parse(make_parser(), arguments).resume)


@pytest.mark.slow
def test_a_run_with_an_awkward_name_is_resumed_as_printed(
    corpus: Path, tmp_path: Path, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / AWKWARD
    folder.mkdir()
    config = write_tiny(folder, corpus, run={"folder": str(folder), "name": AWKWARD}, sampling={"samples": 0})
    assert main(["train", str(config), "train.time_limit=1e-3", "validation.tokens=0"]) == 75
    (stopped,) = re.findall(r"resume with: (.*)", capsys.readouterr().out)
    assert resumed(stopped) == folder / AWKWARD
    again = refusal(["train", str(config)], "already holds a run")
    assert resumed(again.split("`")[1]) == folder / AWKWARD
    assert main(["status", str(folder / AWKWARD)]) == 0
    (shown,) = re.findall(r"^resume with  (.*)", capsys.readouterr().out, re.MULTILINE)
    assert resumed(shown) == folder / AWKWARD
    assert main([*shlex.split(shown)[1:], "train.time_limit=0"]) == 0
    (seen,) = re.findall(r"see it with: (.*)", capsys.readouterr().out)
    assert shlex.split(seen) == ["tensorboard", "--logdir", str(folder)]


def test_prepared_shards_are_trained_on_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    shards = tmp_path / AWKWARD
    assert main(["data", "prepare", str(tmp_path / "text.jsonl"), "--out", str(shards), "--val-fraction", "0"]) == 0
    (hint,) = re.findall(r"train with (.*)", capsys.readouterr().out)
    (word,) = shlex.split(hint)
    assert [source.path for source in load_config("gpt3_xl", [word]).data.sources] == [str(shards)]


def test_missing_shards_are_prepared_as_printed(tmp_path: Path, corpus: Path, refusal: Refusal) -> None:
    missing = tmp_path / AWKWARD
    config = write_tiny(tmp_path, corpus, data={"sources": [{"path": str(missing)}]})
    line = refusal(["train", str(config)], "no such folder")
    name, *arguments = shlex.split(line.split("`")[1])
    assert (name, parse(make_parser(), arguments).out) == ("megagpt", str(missing))
