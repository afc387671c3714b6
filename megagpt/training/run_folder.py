"""The files of a run beside its log and checkpoints: its config, and for each incarnation who ran it, where and how."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

import megagpt
from megagpt.config import Config
from megagpt.config_file import to_yaml
from megagpt.engines.engine import Engine
from megagpt.errors import UserError
from megagpt.files import write_atomic
from megagpt.hardware import device_name
from megagpt.incarnations import Incarnation, claim
from megagpt.launchers import slurm_job
from megagpt.run_log import log_path


def run_folder(config: Config) -> Path:
    """The folder of a config's run."""
    return Path(config.run.folder).expanduser() / config.run.name


def resume_command(run: Path) -> str:
    """The command that resumes a run, as a shell takes it."""
    return shlex.join(["megagpt", "train", "--resume", str(run)])


def holds_run(run: Path) -> bool:
    """Whether something of a run is there already."""
    return any(path.exists() for path in (run / "config.yaml", log_path(run), run / "checkpoints"))


def check_free(run: Path) -> None:
    """Raises UserError if a run is there already."""
    if holds_run(run):
        way = f"resume it with `{resume_command(run)}` or --auto-resume, or choose another run.name"
        raise UserError(f"{run}: already holds a run; {way}")


def claim_run(run: Path, engine: Engine, from_tokens: int) -> Incarnation:
    """Begin the run's next incarnation: the main rank leaves the resolved config and the facts of this process group.
    Every rank calls it. Raises OSError."""

    def leave() -> int:
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(run / "config.yaml", to_yaml(engine.config).encode())
        if settings := engine.settings():
            write_atomic(run / "deepspeed.json", json.dumps(settings, indent=2).encode())
        facts = {
            "command": shlex.join(sys.argv), "host": platform.node(), "job": slurm_job(os.environ),
            "platform": platform.platform(), "python": platform.python_version(), "megagpt": megagpt.__version__,
            "torch": torch.__version__, "engine": engine.describe(), "device": device_name(engine.world.device),
            "world_size": engine.world.size, "from_tokens": from_tokens,
        }  # fmt: skip
        return claim(run, facts).number

    return Incarnation(run, engine.world.from_main(leave))


def start_as_markdown(incarnation: Incarnation) -> str:
    """The facts of an incarnation, for TensorBoard."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in incarnation.start().items() if value is not None)
    return f"Resume with `{resume_command(incarnation.run)}`\n\n| | |\n|---|---|\n{rows}"
