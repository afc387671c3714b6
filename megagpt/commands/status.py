"""status: where a run is."""

import argparse
from pathlib import Path

from megagpt.commands.options import Add


def register(add: Add) -> None:
    sub = add("status", _status, "Where a run is: progress, speed, time to go, last checkpoint, restarts.")
    sub.add_argument("run", metavar="RUN")


def _status(arguments: argparse.Namespace) -> int:
    from megagpt.commands.train import run_config
    from megagpt.config_file import load_config
    from megagpt.training.status import status_lines

    run = Path(arguments.run)
    for line in status_lines(run, load_config(run_config(run), [])):
        print(line)
    return 0
