"""Commands and ranks that use a hub, in processes of their own: the hub's client reads its variables when it is first
imported. So this module imports neither the client nor a library that does."""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megagpt import world as joining
from megagpt.console import overheard
from megagpt.errors import UserError
from megagpt.evaluation.rows import Files, find_files
from megagpt.evaluation.tasks import find_tasks
from megagpt.exchange.named import open_model
from tests.processes import Process, command
from tests.runs import PATIENCE

_END = "\f"
Done = tuple[int, str, str]
"""Exit code, stdout and stderr of a command."""


def run(variables: dict[str, str], cwd: Path, *arguments: str) -> Done:
    """One command in a process of its own."""
    (done,) = run_each(variables, cwd, [arguments])
    return done


def run_each(
    variables: dict[str, str],
    cwd: Path,
    commands: Sequence[Sequence[str]],
    runner: Callable[[Sequence[Sequence[str]]], int] | None = None,
) -> list[Done]:
    """Several commands in one process, one after the other. `runner`: prepares that process and calls
    `run_commands`."""
    files = [cwd / "stdout", cwd / "stderr"]
    process = Process(runner or run_commands, commands, cwd=cwd, stdout=files[0], stderr=files[1], variables=variables)
    assert process.wait(PATIENCE) == 0, files[1].read_text()
    out, err = (path.read_text().split(_END)[:-1] for path in files)
    return [(int(text[-1]), text[:-1], error) for text, error in zip(out, err, strict=True)]


def run_commands(commands: Sequence[Sequence[str]]) -> int:
    from huggingface_hub import constants

    # Downloads are resumed behind the last whole chunk: the client's are of 10 MB.
    constants.DOWNLOAD_CHUNK_SIZE = 50_000
    for arguments in commands:
        code = command(arguments)
        print(int(code), end=_END)
        print(end=_END, file=sys.stderr)
    return 0


def rows_found(task: str, hosts: list[str], variables: dict[str, dict[str, str]], data: dict[str, str]) -> Files:
    """On each rank: the files of a task, from each host's own folder, or from the hub if that is empty."""
    platform.node = lambda: hosts[int(os.environ.get("RANK", 0))]  # type: ignore[assignment]
    os.environ.update(variables[platform.node()])
    with joining.join("cpu") as world:
        return find_files(find_tasks([task])[0].source, data[platform.node()], world)


def opened(names: list[str], variables: dict[str, dict[str, str]], hosts: list[str], waiting: Path) -> list[Any]:
    """On each rank: the label and the sum of the embedding of each model. The main rank notes a line about others for
    which it waits."""
    platform.node = lambda: hosts[int(os.environ["RANK"])]  # type: ignore[assignment]
    os.environ.update(variables[platform.node()])
    joining._SILENT_SECONDS = 0.5

    def note(line: str) -> None:
        if line.startswith("waiting for"):
            waiting.write_text(line)

    with overheard(note), joining.join("cpu") as world:
        models = [open_model(name, world) for name in names]
        return [(model.label, model.load().token_embedding.weight.sum().item()) for model in models]


def refusals(names: list[str], hosts: list[str], folders: dict[str, Path]) -> list[str]:
    """On each rank, in its host's folder: the error of each name that is no model."""
    platform.node = lambda: hosts[int(os.environ["RANK"])]  # type: ignore[assignment]
    os.chdir(folders[platform.node()])
    found = []
    with joining.join("cpu") as world:
        for name in names:
            try:
                found.append(open_model(name, world).label)
            except UserError as error:
                found.append(str(error))
    return found
