"""The one grammar of the command line: a config and overrides, in any order with the options."""

import argparse
import itertools
from pathlib import Path

import pytest

from megagpt.cli import main, make_parser
from megagpt.commands.options import config_of, parse, split_words
from megagpt.errors import UserError

Capture = pytest.CaptureFixture[str]
# The start of each command that takes a config, and an option of it.
COMMANDS = [
    (["train"], ["--auto-resume"]),
    (["config"], ["--ranks", "2"]),
    (["import", "folder"], []),
    (["checkpoint", "bench", "--in", "folder"], ["--rounds", "1"]),
    (["launch", "slurm", "--nodes", "2"], ["--account", "me"]),
    (["launch", "hosts", "--hostfile", "hosts"], ["--print"]),
    (["launch", "check"], ["--allow-recipe-change"]),
    (["launch", "verdict", "--logs", "logs"], []),
]


def parsed(*argv: str) -> argparse.Namespace:
    return parse(make_parser(), argv)


@pytest.mark.parametrize(("command", "option"), COMMANDS, ids=lambda part: " ".join(part[:2]))
def test_config_overrides_and_options_take_any_order(command: list[str], option: list[str]) -> None:
    words = [["gpt3_xl"], ["train.tokens=1e9", "run.name=a b"], option]
    for order in itertools.permutations(words):
        config = config_of(parsed(*command, *itertools.chain(*order)))
        assert (config.model.preset, config.train.tokens, config.run.name) == ("gpt3-xl", 1_000_000_000, "a b")


@pytest.mark.parametrize(("command", "option"), COMMANDS, ids=lambda part: " ".join(part[:2]))
def test_the_config_may_be_an_option(command: list[str], option: list[str]) -> None:
    config = config_of(parsed(*command, "train.tokens=1e9", "--config", "gpt3_xl", *option, "run.name=x"))
    assert (config.model.preset, config.train.tokens, config.run.name) == ("gpt3-xl", 1_000_000_000, "x")


@pytest.mark.parametrize("words", [["a", "b"], ["a", "--config", "b"], []], ids=str)
def test_exactly_one_config_is_taken(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"name one config, such as quickstart.yaml( \(got a, b\))?$") as caught:
        config_of(parsed("config", *words, "train.tokens=1e9"))
    assert ("(got a, b)" in str(caught.value)) == bool(words)


def test_exactly_one_preset_is_taken(capsys: Capture) -> None:
    assert main(["bench", "model.layers=2", "--steps", "1"]) == 2
    assert "name one preset, such as gpt2-124m" in capsys.readouterr().err


def test_bench_takes_a_preset_and_overrides() -> None:
    arguments = parsed("bench", "model.layers=2", "--steps", "1", "gpt2-124m", "engine.stage=3")
    assert split_words(arguments) == (["gpt2-124m"], ["model.layers=2", "engine.stage=3"])


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "gpt3_xl", "--rseume", "x"], ["config", "gpt3_xl", "train.tokens=1", "--rnaks", "2"],
        ["sample", "run", "more"], ["data", "verify", "folder", "key=value"], ["models", "x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_unknown_arguments_are_refused(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "unrecognized arguments: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [["data", "verify"], ["verify"]], ids=" ".join)
def test_data_commands_have_their_old_names_too(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main([*command, str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([*command[:-1], "prepare", "--help"])
    assert caught.value.code == 0
    assert "--val-fraction" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "shown", "hidden"),
    [
        ([], ["train", "data", "launch"], ["prepare", "verify"]),
        (["launch"], ["slurm", "hosts"], ["check", "node", "verdict"]),
        (["data"], ["prepare", "verify"], []),
    ],
    ids=["megagpt", "launch", "data"],
)
def test_help_lists_what_users_call(argv: list[str], shown: list[str], hidden: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main([*argv, "--help"])
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")}
    assert set(shown) <= listed
    assert not set(hidden) & listed
