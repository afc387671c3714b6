"""A run that fails once. Torchrun's ranks import little more than the run does: imports are most of their time."""

import contextlib
import os
from unittest import mock

from megagpt.cli import main
from megagpt.run_log import Event, Line, RunLog


def train_with_a_fault(config: str) -> int:
    """`megagpt train` on one of torchrun's ranks; in its first attempt, rank 0 fails as it logs step 8."""
    append = RunLog.append

    def broken(log: RunLog, event: Event, step: int, tokens: int, values: Line) -> None:
        if step == 8:
            raise ValueError("broken on purpose")
        append(log, event, step, tokens, values)

    patch = mock.patch.object(RunLog, "append", broken)
    with patch if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else contextlib.nullcontext():
        return main(["train", config, "checkpoint.every_tokens=640", "--auto-resume"])
