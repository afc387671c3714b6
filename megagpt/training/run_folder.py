"""What a run leaves beside its metrics and checkpoints: its config, and for each start who ran it, where and how."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

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


def run_folder(config: Config) -> Path:
    """Where a config's run lives."""
    return Path(config.run.folder) / config.run.name


def run_config(run: str | Path) -> str:
    """The path of the config in a run's folder. Raises UserError if it is not a run's folder."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run's folder (no config.yaml in it)")
    return str(path)


def holds_run(run: Path) -> bool:
    """Whether something of a run is there already."""
    return any((run / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints"))


def check_free(run: Path) -> None:
    """Raises UserError where a run is there already."""
    if holds_run(run):
        raise UserError(
            f"{run}: already holds a run; go on with `megagpt train --resume {run}`, with --auto-resume, "
            "or choose another run.name"
        )


def begin(run: Path, engine: Engine, tokens_seen: int) -> Incarnation:
    """Take the run over, on the main rank: leave the resolved config and who runs it now. Raises OSError."""
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / "config.yaml", to_yaml(engine.config).encode())
    settings = engine.settings()
    if settings:
        write_atomic(run / "deepspeed.json", json.dumps(settings, indent=2).encode())
    return claim(run, _environment(engine, tokens_seen))


def _environment(engine: Engine, tokens_seen: int) -> dict[str, Any]:
    return {
        "command": shlex.join(sys.argv),
        "host": platform.node(),
        "job": slurm_job(os.environ),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "megagpt": megagpt.__version__,
        "torch": torch.__version__,
        "engine": engine.describe(),
        "device": device_name(engine.world.device),
        "world_size": engine.world.size,
        "from_tokens": tokens_seen,
    }


def describe_start(run: Path, incarnation: Incarnation) -> str:
    """A start as Markdown, for TensorBoard."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in incarnation.start().items() if value is not None)
    return f"Go on with `megagpt train --resume {run}`\n\n| | |\n|---|---|\n{rows}"
