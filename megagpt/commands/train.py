"""train: a config's run, or the rest of a run."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.commands.options import Add
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.config import Config


def register(add: Add) -> None:
    sub = add("train", _train, "Train a config, or go on with a run. Works under torchrun, deepspeed and srun too.")
    sub.add_argument("arguments", nargs="*", metavar="CONFIG | section.key=value", help="a config's path or bare name")
    sub.add_argument("--config", help="the config, as an option")
    sub.add_argument("--resume", metavar="RUN", help="folder of the run to go on with")
    sub.add_argument(
        "--auto-resume", action="store_true", help="go on with the config's run where it was begun; else begin it"
    )
    sub.add_argument(
        "--allow-data-change", action="store_true", help="resume on other data than the run was trained on"
    )
    sub.add_argument(
        "--allow-recipe-change",
        action="store_true",
        help="resume with another learning rate, schedule, batch, seed or dropout",
    )
    # The deepspeed launcher and older ones of PyTorch pass it beside LOCAL_RANK, which is what is read.
    sub.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _train(arguments: argparse.Namespace) -> int:
    from megagpt.training.safety import StopRequest

    with StopRequest() as stop:  # first of all: a scheduler may send its signal while we still import
        from megagpt.world import fail_together, join

        try:
            config = _train_config(arguments)
        except UserError as error:
            fail_together(error)
        stop.time_limit = config.train.time_limit
        with join(config.train.device, hang_timeout=config.train.hang_timeout) as world:
            from megagpt.checkpoints.compatibility import Allowed
            from megagpt.training.loop import train
            from megagpt.training.run_folder import holds_run, run_folder

            allowed = Allowed(data=arguments.allow_data_change, recipe=arguments.allow_recipe_change)
            resume = bool(arguments.resume)
            if arguments.auto_resume:
                resume = world.from_main(lambda: holds_run(run_folder(config)))
            return train(config, world, resume, allowed, stop)


def _train_config(arguments: argparse.Namespace) -> "Config":
    from megagpt.config_file import load_config

    overrides = [a for a in arguments.arguments if "=" in a]
    names = [a for a in arguments.arguments if "=" not in a] + ([arguments.config] if arguments.config else [])
    if arguments.resume:
        if names:
            raise UserError(f"--resume takes the run's own config; leave {names[0]!r} out")
        names = [run_config(arguments.resume)]
    if len(names) != 1:
        raise UserError(
            "name one config, such as: megagpt train quickstart.yaml" + (f" (got {names})" if names else "")
        )
    config = load_config(names[0], overrides)
    if arguments.resume:
        # The folder may have been moved or be named from elsewhere: it is where it is.
        run = Path(arguments.resume).resolve()
        config = dataclasses.replace(
            config, run=dataclasses.replace(config.run, name=run.name, folder=_relative(run.parent))
        )
    return config


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def run_config(run: str | Path) -> str:
    """The config of a run's folder."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run's folder (no config.yaml in it)")
    return str(path)
