"""status: the progress of a run."""

import argparse
from pathlib import Path

from megagpt.commands.options import Add


def register(add: Add) -> None:
    sub = add("status", _status, "Show a run's progress, speed, time to go, last checkpoint and restarts.")
    sub.add_argument("run", metavar="RUN")


def _status(arguments: argparse.Namespace) -> int:
    from megagpt.config_file import load_config
    from megagpt.training.run_folder import run_config
    from megagpt.training.status import status_lines

    run = Path(arguments.run)
    print("\n".join(status_lines(run, load_config(run_config(run)))))
    return 0
