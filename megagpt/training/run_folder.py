"""A run's folder: its path, its config, and the facts that each incarnation leaves there."""

import collections
import contextlib
import datetime
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import megagpt
from megagpt.config import Config
from megagpt.config_file import to_yaml
from megagpt.data.provenance import text_of
from megagpt.errors import UserError
from megagpt.files import write_atomic
from megagpt.incarnations import Incarnation, claim, list_incarnations
from megagpt.launchers import job_number, slurm_job, torchrun_name
from megagpt.planning.forecast import Forecast
from megagpt.run_log import Event, log_path, read
from megagpt.training.markdown import table, verbatim

if TYPE_CHECKING:
    from megagpt.data.token_stream import TokenStream
    from megagpt.engines.engine import Engine

# Bytes at the end of the log in which its last lines are: a few hundred steps.
TAIL_BYTES = 2**18
# Largest difference between two readings of the time at which one process began (s): the clock may have been set.
_CLOCK_STEP_SECONDS = 60.0


def run_folder(config: Config) -> Path:
    """The folder of a config's run."""
    return Path(config.run.folder).expanduser() / config.run.name


def resume_command(run: Path, *more: str) -> str:
    """The command that resumes a run, with more arguments, as a shell takes it."""
    return shlex.join(["megagpt", "train", "--resume", str(run), *more])


def holds_run(run: Path) -> bool:
    """Whether the folder holds files of a run."""
    return any(path.exists() for path in (run / "config.yaml", log_path(run), run / "checkpoints"))


def check_free(run: Path) -> None:
    """Raises UserError if the folder holds files of a run."""
    if holds_run(run):
        way = f"resume it with `{resume_command(run)}` or --auto-resume, or choose another run.name"
        raise UserError(f"{run}: already holds a run; {way}")


def restarted_command() -> str | None:
    """The command behind this process, if its launcher may run it again by itself: a Slurm job that may be requeued, or
    the workers of a torchrun. None: someone has typed it."""
    if job := slurm_job(os.environ):
        return f"job {job_number(job)}"
    return f"torchrun {name}" if (name := torchrun_name(os.environ, platform.node(), os.getppid())) else None


def went_back(run: Path, tokens: int) -> bool:
    """Whether this same command has already taken the run back to the checkpoint at `tokens`. Then it was run again by
    its launcher, and the run continues from its newest checkpoint."""
    command = restarted_command()
    back = (line for line in read(run) if line["event"] == Event.WENT_BACK and line["tokens_seen"] == tokens)
    return command is not None and any(line.get("command") == command for line in back)


def claim_run(
    run: Path,
    config: Config,
    engine: "Engine",
    streams: Sequence["TokenStream"],
    from_tokens: int,
    planned: Forecast | None = None,
) -> Incarnation:
    """Begin the run's next incarnation: the main rank leaves the resolved config and the facts of this process group.
    `config`: the run's, whose micro-batch may be auto; the engine's has the number. `streams`: the sources' training
    text, in the config's order. `planned`: None on a CPU. Every rank calls it. Raises OSError."""
    import torch  # status and launch need this file without it

    from megagpt.hardware import device_name

    hosts = collections.Counter(engine.world.hosts())
    weights = (source.weight for source in engine.config.data.sources)

    def leave() -> int:
        seen = last_written(run)
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(run / "config.yaml", to_yaml(config).encode())
        if settings := engine.settings():
            write_atomic(run / "deepspeed.json", json.dumps(settings, indent=2).encode())
        facts = {
            "command": shlex.join(sys.argv), "directory": str(Path.cwd()), "host": platform.node(),
            "job": slurm_job(os.environ), "platform": platform.platform(),
            "python": platform.python_version(), "megagpt": megagpt.__version__,
            "torch": torch.__version__, "engine": engine.describe(), "device": device_name(engine.world.device),
            "world_size": engine.world.size, "micro_batch": engine.config.micro_batch, "from_tokens": from_tokens,
            "data": dict(zip((stream.fingerprint for stream in streams), weights, strict=True)),
            "texts": [{"folder": s.name, "text": text_of(Path(s.name)), "tokens": s.tokens} for s in streams],
            "hosts": hosts, "previous_seen": iso(seen) if seen else None,
            "process": this_process(), "plan": planned.as_json() if planned else None,
        }  # fmt: skip
        return claim(run, facts).number

    return Incarnation(run, engine.world.from_main(leave))


def last_start(run: Path) -> dict[str, Any] | None:
    """The facts of the run's last incarnation, and as `ended` those of its end; None if there is none."""
    found = list_incarnations(run)
    return {**found[-1].start(), "ended": found[-1].ended()} if found else None


def last_sign_of_life(run: Path) -> float | None:
    """The time at which the newest incarnation last wrote (s since 1970); None if nothing was ever written."""
    paths = [log_path(run), *(run / "incarnations").glob("*"), *(run / "incarnations").glob(".fence-*")]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=None)


def last_written(run: Path) -> float | None:
    """The time of the log's last line (s since 1970); None if no line has one: those of version 0.1 have none, and that
    of the file is the day of a copy."""
    times = [line["time"] for line in read(run, TAIL_BYTES) if isinstance(line.get("time"), int)]
    return float(max(times)) if times else None


def iso(seconds: float) -> str:
    """A time in seconds since 1970 as files store it: ISO 8601, UTC, whole seconds."""
    return datetime.datetime.fromtimestamp(math.floor(seconds), datetime.UTC).isoformat()


def this_process() -> dict[str, Any]:
    """This process among all that a machine ever runs, as far as another process there can see it: a number counts
    within a PID namespace, such as a container's, until the machine starts again."""
    process = psutil.Process()
    return {"pid": process.pid, "created": process.create_time(), **_where_numbers_count()}


def _where_numbers_count() -> dict[str, str]:
    found = {"boot": "", "namespace": ""}
    with contextlib.suppress(OSError):  # Linux only
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    return found


def has_ended(start: dict[str, Any]) -> bool | None:
    """Whether the main rank of an incarnation with these facts has ended; None if that cannot be seen from here."""
    process = start.get("process")
    if not isinstance(process, dict) or start.get("host") != platform.node():
        return None
    if any(process.get(key) != value for key, value in _where_numbers_count().items()):
        return None
    try:
        found = psutil.Process(process["pid"])
        other = abs(found.create_time() - process["created"]) > _CLOCK_STEP_SECONDS
        return other or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return None


def start_folders(run: Path) -> list[Path]:
    """Folders in which a run was started, newest first, without the current one. The last is the one that holds `runs`:
    version 0.1 recorded none, and a run may have been moved together with its data."""
    recorded = [incarnation.start().get("directory") for incarnation in reversed(list_incarnations(run))]
    folders = [*map(Path, filter(None, recorded)), run.resolve().parent.parent]
    return list(dict.fromkeys(folder for folder in folders if folder != Path.cwd()))


def start_as_markdown(incarnation: Incarnation) -> str:
    """The facts of an incarnation, for TensorBoard."""
    facts = {key: value for key, value in incarnation.start().items() if value is not None}
    return verbatim(f"Resume with: {resume_command(incarnation.run)}") + "\n\n" + table(facts)
