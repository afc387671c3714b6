"""`megagpt prepare` of a data set of a small hub, in processes of their own."""

from collections.abc import Sequence
from pathlib import Path

from megagpt.data import documents, prepare
from tests.data.hub import REPOSITORY, Hub
from tests.exchange.hub_runs import Done, run_commands, run_each
from tests.processes import Process


def arguments(out: Path, *options: str, name: str = REPOSITORY) -> list[str]:
    command = ["prepare", name, "--out", str(out), "--val-fraction", "0.05", "--shard-tokens", "3000"]
    return [*command, "--workers", "1", *options]


def prepared(hub: Hub, home: Path, *commands: list[str]) -> list[Done]:
    """The commands, one after the other, with the client's cache in `home`."""
    home.mkdir(exist_ok=True)
    return run_each(hub.environment(home), home, commands, in_small_batches)


def start(hub: Hub, home: Path, command: list[str]) -> Process:
    home.mkdir(exist_ok=True)
    files = {"stdout": home / "stdout", "stderr": home / "stderr"}
    return Process(in_small_batches, [command], cwd=home, **files, variables=hub.environment(home))


def in_small_batches(commands: Sequence[Sequence[str]]) -> int:
    """Run the commands with batches and a journal for a small corpus."""
    prepare._JOURNAL_SECONDS = -1  # type: ignore[assignment]
    documents._BATCH_CHARACTERS = 2000
    return run_commands(commands)
