"""Runs that fail or wait as they are told. Torchrun's ranks import little more than the run does, because imports are
most of their time."""

import contextlib
import os
from pathlib import Path
from unittest import mock

from megagpt.cli import main
from megagpt.run_log import Event, Line, RunLog


def train_with_a_fault(config: str) -> int:
    """`megagpt train` on one of torchrun's ranks; in its first attempt, rank 0 fails as it logs step 8, when step 5 is
    saved."""
    append = RunLog.append

    def broken(log: RunLog, event: Event, step: int, tokens: int, values: Line) -> None:
        if step == 8:
            raise ValueError("broken on purpose")
        append(log, event, step, tokens, values)

    patch = mock.patch.object(RunLog, "append", broken)
    with patch if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else contextlib.nullcontext():
        return main(["train", config, "checkpoint.every_tokens=640", "checkpoint.asynchronous=false", "--auto-resume"])


def before_steps(folder: Path, condition: str, expression: str) -> str:
    """A PYTHONPATH with which each process that meets the condition evaluates an expression of `tokens`, the position,
    whenever it asks for a step's learning rate."""
    (folder / "faults").mkdir()
    (folder / "faults" / "sitecustomize.py").write_text(
        "import os, time\n"
        f"if {condition}:\n"
        "    import megagpt.schedule as schedule\n"
        "    usual = schedule.learning_rate\n"
        "    def learning_rate(config, tokens):\n"
        f"        {expression}\n"
        "        return usual(config, tokens)\n"
        "    schedule.learning_rate = learning_rate\n"
    )
    return f"{folder / 'faults'}:{Path(__file__).resolve().parent.parent}"
