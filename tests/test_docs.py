"""Commands, configs, keys and paths in the documents are ones that exist."""

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import main
from megagpt.config import Config
from megagpt.config_file import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md"))),
]
STAND_INS = {"CONFIG": "gpt2_124m.yaml", "N": "8"}
SECTIONS: dict[str, Any] = {field.name: field.type for field in fields(Config)}
OVERRIDE = re.compile(rf"(?:{'|'.join(SECTIONS)})(?:\.\w+)+=.+")
KEY = re.compile(rf"({'|'.join(SECTIONS)})\.([a-z]\w+)")
PATH = re.compile(r"(?:megagpt|tests|launch|configs|docs|\.ci)/[\w./]+")
MODULE = re.compile(r"[\w/]+\.py")
# PyTorch's and Slurm's own words in the table of troubles.
NOT_OURS = ("Too many open files", "Gloo connectFullMesh failed ... remote=[127.0.1.1]", "Dependency")


def read(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)


def spans(document: str) -> list[str]:
    """The inline code, with line breaks inside it as spaces."""
    text = re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def command_lines(document: str) -> Iterator[list[str]]:
    """Each command as its words; of a fenced block, and of inline code in prose and tables."""
    scripts = blocks(document, "sh") + [span for span in spans(document) if " " in span]
    for line in "\n".join(scripts).replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            try:
                yield [STAND_INS.get(word, word) for word in shlex.split(command, comments=True)]
            except ValueError:  # a part of a quoted program of several lines
                continue


def megagpt_arguments(words: list[str]) -> list[str] | None:
    """The arguments that a command hands to megagpt's parser; None if it starts something else."""
    if words and words[0] in ("megagpt", ".venv/bin/megagpt"):
        return words[1:]
    for start, command in (("launch/train.py", ["train"]), ("launch/multinode.sh", ["train"]), ("megagpt", [])):
        if words and words[0] in ("torchrun", "deepspeed", "srun", "sbatch", "python") and start in words:
            return command + words[words.index(start) + 1 :]
    return None


def commands(document: str) -> list[list[str]]:
    return [found for words in command_lines(document) if (found := megagpt_arguments(words)) is not None]


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` parses its arguments with the real parser and then does nothing."""
    set_defaults = argparse.ArgumentParser.set_defaults

    def without_work(self: argparse.ArgumentParser, **values: Any) -> None:
        set_defaults(self, **{**values, "command": lambda arguments: 0} if "command" in values else values)

    monkeypatch.setattr(argparse.ArgumentParser, "set_defaults", without_work)


ALL_COMMANDS = sorted({(document, *command) for document in DOCUMENTS for command in commands(document)})


def test_commands_are_found_in_the_documents() -> None:
    assert len([command for command in ALL_COMMANDS if command[0] == "README.md"]) > 20
    assert {command[0] for command in ALL_COMMANDS} > {"docs/clusters.md", "docs/checkpoints.md", "docs/benchmarks.md"}


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
def test_the_command_is_understood(command: tuple[str, ...], parse_only: None) -> None:
    _, *arguments = command
    only_named = all(re.fullmatch(r"[a-z]+", word) for word in arguments)  # such as `megagpt checkpoint verify`
    code: Any
    try:
        code = main([*arguments, "--help"] if only_named else arguments)
    except SystemExit as end:
        code = end.code
    assert code == 0
    (config,) = [word for word in arguments if word.endswith(".yaml")] or ["gpt2_124m.yaml"]
    load_config(config, [word for word in arguments if OVERRIDE.fullmatch(word)])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_overrides_are_accepted(document: str) -> None:
    for span in spans(document):
        words = [STAND_INS.get(word, word) for word in span.split(" ")]
        if all(OVERRIDE.fullmatch(word) for word in words):
            load_config("gpt3_xl.yaml", words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_keys_exist(document: str) -> None:
    for span in spans(document):
        if (key := KEY.fullmatch(span)) and not MODULE.fullmatch(span):
            assert key[2] in [field.name for field in fields(SECTIONS[key[1]])], span


@pytest.mark.parametrize("document", DOCUMENTS)
def test_config_examples_load(document: str, tmp_path: Path) -> None:
    for text in blocks(document, "yaml"):
        (tmp_path / "example.yaml").write_text(text)
        load_config(str(tmp_path / "example.yaml"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_links_lead_somewhere(document: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", read(document)) if "://" not in link]
    wanted = [(REPOSITORY / document).parent / link for link in links]
    wanted += [REPOSITORY / path for span in spans(document) for path in PATH.findall(span)]
    missing = [str(path.relative_to(REPOSITORY)) for path in wanted if not path.resolve().exists()]
    modules = [f"/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.glob("[a-z]*/**/*.py")]
    for span in filter(MODULE.fullmatch, spans(document)):
        missing += [] if any(module.endswith(f"/{span}") for module in modules) else [span]
    assert not missing


def test_messages_in_the_troubleshooting_table_are_printed() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "megagpt").rglob("*.py"))
    table = read("docs/clusters.md").partition("## Troubleshooting")[2]
    first_cells = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)
    messages = [span for cell in first_cells for span in re.findall(r"`(.+?)`", cell) if " " in span]
    # What stands for a value of the message: dots, and the name of a signal.
    parts = [part for text in messages if text not in NOT_OURS for part in re.split(r" ?\.\.\. ?| SIG\w+", text)]
    assert len(parts) > 5
    assert [part for part in parts if part not in sources] == []


def test_the_test_command_has_every_test_about_time() -> None:
    """It names their folder, because imports of all tests take longer than a test."""
    (folder,) = re.findall(r"-m timing (\S+)$", read("README.md"), re.MULTILINE)
    tests = (REPOSITORY / "tests").rglob("test_*.py")
    marked = [path for path in tests if re.search(r"pytest\.mark\.timing", path.read_text(encoding="utf-8"))]
    assert marked
    assert [path for path in marked if not path.is_relative_to(REPOSITORY / folder)] == []
