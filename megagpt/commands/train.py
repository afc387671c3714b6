"""train, status: start or resume a run, and show its progress."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt import launchers
from megagpt.commands.options import Add, add_config, config_of, position, split_words
from megagpt.console import say
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.config import Config


def register(add: Add) -> None:
    sub = add("train", _train, "Train a config, or resume a run. Works under torchrun, deepspeed and srun too.")
    add_config(sub)
    sub.add_argument("--resume", metavar="RUN", help="folder of the run to resume, or of one of its checkpoints")
    text = "with --resume or --auto-resume: the checkpoint of that position; newer ones are renamed, not deleted"
    sub.add_argument("--at", metavar="TOKENS", type=position, help=text)
    sub.add_argument("--auto-resume", action="store_true", help="resume the config's run if it exists; else begin it")
    text = "resume on other data than the run was trained on"
    sub.add_argument("--allow-data-change", action="store_true", help=text)
    text = "resume with another learning rate, schedule, batch, seed, dropout, residual or float8"
    sub.add_argument("--allow-recipe-change", action="store_true", help=text)
    # The deepspeed launcher and old PyTorch launchers pass it beside LOCAL_RANK, which is used instead.
    sub.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)

    sub = add("status", _status, "Show a run's progress, checkpoint, incarnations and next step, or list all runs.")
    text = "a run's folder, or one that holds runs (runs)"
    sub.add_argument("run", metavar="RUN_OR_FOLDER", nargs="?", default="runs", help=text)
    sub.add_argument("--json", action="store_true", help="print it as JSON: an object of a run, a list of all runs")


def _train(arguments: argparse.Namespace) -> int:
    from megagpt.training.safety import StopRequest

    with StopRequest() as stop:  # first of all: a scheduler may send its signal during the imports
        if launchers.speaks(os.environ):
            say("starting: loading PyTorch")
        from megagpt.world import fail_together, join

        try:
            run, resume_at = _run_and_position(arguments)
            config = _resumed_config(run, arguments) if run else config_of(arguments)
        except UserError as error:
            fail_together(error, stop.signal)
        stop.time_limit = config.train.time_limit
        with join(config.train.device, hang_timeout=config.train.hang_timeout, asked=stop.signal) as world:
            from megagpt.checkpoints.compatibility import Allowed
            from megagpt.training.loop import train
            from megagpt.training.run_folder import holds_run, run_folder

            allowed = Allowed(data=arguments.allow_data_change, recipe=arguments.allow_recipe_change)
            resume = run is not None
            if arguments.auto_resume:
                resume = world.from_main(lambda: holds_run(run_folder(config)))
                if resume_at is not None and not resume:
                    raise UserError(f"--at {resume_at}: {run_folder(config)} holds no run yet; leave --at out")
            return train(config, world, resume, allowed, stop, resume_at)


def _run_and_position(arguments: argparse.Namespace) -> tuple[Path | None, int | None]:
    """Folder of the run to resume, and tokens of the checkpoint to resume from, if they were given."""
    from megagpt.checkpoints.folder import is_checkpoint

    if not arguments.resume:
        if arguments.at is not None and not arguments.auto_resume:
            raise UserError("--at names a checkpoint of a run: give --resume RUN or --auto-resume, too")
        return None, arguments.at
    path = Path(arguments.resume)
    if not is_checkpoint(path):
        return path, arguments.at
    path = path.resolve()
    if arguments.at not in (None, int(path.name)):
        raise UserError(f"--resume {arguments.resume} and --at {arguments.at} name two checkpoints: leave one out")
    return path.parent.parent, int(path.name)


def _resumed_config(run: Path, arguments: argparse.Namespace) -> "Config":
    from megagpt.config_file import load_run

    names, overrides = split_words(arguments)
    if names:
        raise UserError(f"--resume takes the run's own config: leave {names[0]!r} out")
    return load_run(run, overrides)


def _status(arguments: argparse.Namespace) -> int:
    from megagpt.config_file import load_run
    from megagpt.files import named_path
    from megagpt.training.status import list_runs, read_status, status_lines, table

    run = named_path(arguments.run)
    values: object
    if (run / "config.yaml").is_file():
        status = read_status(run, load_run(run))
        lines, values = status_lines(status), status.as_json()
    else:
        found = list_runs(run)
        lines, values = table(found), [status.as_json() for status in found]
    print(json.dumps(values, indent=1) if arguments.json else "\n".join(lines))
    return 0
