"""The one grammar of the command line: a config and overrides, in any order with the options."""

import argparse
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.cli import main, make_parser
from megagpt.commands.options import config_of, parse, split_words
from megagpt.errors import UserError
from tests.conftest import Refusal
from tests.processes import REPOSITORY, environment

Capture = pytest.CaptureFixture[str]
OLD_RUN = REPOSITORY / "tests" / "data" / "old_run"
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
def test_unknown_arguments_are_refused(argv: list[str], refusal: Refusal) -> None:
    command = " ".join(argv[: 1 + (argv[0] == "data")])
    line = refusal(argv, "unrecognized arguments: ", f"; see megagpt {command} --help")
    assert "train.tokens" not in line, "it is a valid word"


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["train", "gpt3_xl", "--rseume", "x"], "--rseume: did you mean --resume"),
        (["train", "gpt3_xl", "--train.tokens=1e9"], "an override has no dashes: train.tokens=1e9"),
        (["train", "gpt3_xl", "--auto-resum3"], "did you mean --auto-resume"),
        (["launch", "slurm", "gpt3_xl", "--ndes", "2"], "--ndes: did you mean --nodes"),
        (["--verson"], "--verson: did you mean --version"),
        (["trian"], "'trian' does not exist: did you mean train?"),
        (["launch", "hots"], "'hots' does not exist: did you mean hosts?"),
        (["launch", "verdit"], "'verdit' does not exist: valid: slurm, hosts"),
        (["prepar"], "'prepar' does not exist: "),
        (["sample", "run", "--device", "gpu"], "'gpu'"),
        (["bench", "gpt2-124m", "--engine", "zer0"], "--engine"),
    ],
    ids=str,
)
def test_a_slip_is_answered_with_the_nearest(argv: list[str], hint: str, refusal: Refusal) -> None:
    assert "prepare" not in refusal(argv, hint).replace("'prepar'", "")


def parsers(parser: argparse.ArgumentParser, name: str = "megagpt") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser below one, with its command."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from parsers(inner, f"{name} {command}")


PARSERS = dict(parsers(make_parser()))


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_has_a_help_text(name: str) -> None:
    for action in PARSERS[name]._actions:
        if isinstance(action, argparse._SubParsersAction) or "--local_rank" in action.option_strings:
            continue
        assert action.help, f"{name}: {action.option_strings or action.dest} needs a help text"
        assert action.help != argparse.SUPPRESS, f"{name}: {action.option_strings}"


@pytest.mark.parametrize("name", PARSERS)
def test_every_refusal_is_one_line_and_its_advice_works(name: str, refusal: Refusal, capsys: Capture) -> None:
    """Every option of every command without its value, and with one that it does not take; words of several lines."""
    _, *command = name.split()
    advice = f"; see {name} --help"
    refusal([*command, "--x\ny"], "unrecognized arguments: --x y: ", advice)
    for action in PARSERS[name]._actions:
        if action.nargs == 0 or not action.option_strings:
            continue
        option = action.option_strings[0]
        if action.nargs is None:
            refusal([*command, option], f"argument {'/'.join(action.option_strings)}: expected one argument", advice)
        if action.choices or action.type not in (None, str, Path):
            refusal([*command, f"{option}=?\n"], f"argument {'/'.join(action.option_strings)}: ", "'?\\n'", advice)
    with pytest.raises(SystemExit) as end:
        main([*advice.split()[3:]])
    assert end.value.code == 0
    assert f"usage: {name} " in capsys.readouterr().out


@pytest.mark.parametrize("start", [["-m", "megagpt", "train"], ["launch/train.py"]], ids=" ".join)
def test_scripts_refuse_in_one_line_too(start: list[str]) -> None:
    repository = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, *start, "--rseume", "x"], cwd=repository, capture_output=True, text=True)
    line = "megagpt: error: unrecognized arguments: --rseume: did you mean --resume"
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert found.stderr.startswith(line)
    assert found.stderr.endswith("; see megagpt train --help\n")


@pytest.mark.parametrize("argv", [["sample", "run"], ["bench", "gpt2-124m"], ["parity"]], ids=" ".join)
def test_a_missing_gpu_names_the_option_that_was_typed(
    argv: list[str], refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = refusal([*argv, "--device", "cuda"], "--device is cuda, but PyTorch sees no GPU here")
    assert "train.device" not in line


def test_bench_says_that_it_takes_no_config_file(refusal: Refusal) -> None:
    refusal(["bench", "gpt2_124m.yaml"], "bench takes a preset, such as gpt2-124m, and no config file: gpt2_124m.yaml")
    refusal(["bench", "gpt2_124m"], "unknown preset 'gpt2_124m': did you mean gpt2-124m")


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


# Runs commands, and ends with what they end with; PyTorch is missing.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from megagpt.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("argv", "code", "printed"),
    [
        (["status", "old_run"], 0, "stopped (SIGTERM)"),
        (["launch", "check", "gpt2_124m", "train.device=cpu"], 2, "2 of 2 node(s) are not fit"),
        (["launch", "verdict", "gpt2_124m", "--logs", "logs"], 75, "the job resumes from its last checkpoint"),
    ],
    ids=["status", "check", "verdict"],
)
def test_commands_that_compute_nothing_need_no_torch(argv: list[str], code: int, printed: str, tmp_path: Path) -> None:
    """Its import takes seconds, of each start of a job: the script of a job calls check and verdict."""
    shutil.copytree(OLD_RUN, tmp_path / "old_run")
    for name, script in (("scontrol", "echo n1; echo n2"), ("srun", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = {**environment(), "PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_JOB_NODELIST": "n[1-2]", "RANKS_PER_NODE": "1", "MASTER_PORT": "20123"}
    command = [sys.executable, "-c", WITHOUT_TORCH, *argv]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert printed in done.stdout + done.stderr
