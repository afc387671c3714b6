"""A real Slurm cluster of this one machine: munged, slurmctld and slurmd in a temporary folder, on loopback."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.ranks import free_port

_PROGRAMS = ("slurmctld", "slurmd", "srun", "munged")
_CONFIG = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes=n1 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    absent = [name for name in _PROGRAMS if _program(name) is None]
    if absent:
        return f"no {', '.join(absent)}: install the Debian packages slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "slurmd of the Debian packages slurmctld slurmd slurm-client munge runs as root only"
    return ""


@contextlib.contextmanager
def slurm_cluster() -> Iterator[dict[str, str]]:
    """Start a cluster with one node of two cores; gives the environment in which `srun` finds it.

    At the end, and where the start fails, every process of it is ended and its folder is removed.
    """
    # Not pytest's folder: munged wants a socket that every user can reach, and the socket's path has to be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        folder.chmod(0o755)
        _write(folder)
        munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        munge += [f"--key-file={folder}/munge.key", f"--seed-file={folder}/munge.seed", "--num-threads=2"]
        daemons.append(_start(["munged", "--foreground", *munge], folder, environment))
        _wait(lambda: (folder / "munge.socket").exists(), daemons, folder)
        daemons.append(_start(["slurmctld", "-D"], folder, environment))
        daemons.append(_start(["slurmd", "-D", "-N", "n1"], folder, environment))
        _wait(lambda: _tool(["sinfo", "--noheader", "--format=%T"], environment) == "idle", daemons, folder)
        yield environment
    finally:
        end_processes("SLURM_CONF", environment["SLURM_CONF"])  # daemons, steps and their tasks; nothing is kept
        for daemon in daemons:
            daemon.wait()
        shutil.rmtree(folder)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _write(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    text = _CONFIG.format(host=host, folder=folder, controller_port=free_port(), node_port=free_port())
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()
    (folder / "spool" / "n1").mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))


def _start(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    program = _program(command[0])
    assert program is not None
    with (folder / f"{command[0]}.output").open("wb") as output:
        return subprocess.Popen(
            [program, *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _tool(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip()


def _wait(ready: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
            logs = [*sorted(folder.glob("*.output")), *sorted(folder.glob("*.log"))]
            raise RuntimeError("Slurm did not start:\n" + "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in logs))
        time.sleep(0.1)


def end_processes(variable: str, value: str) -> None:
    """End every process with this variable in its environment: whatever a launcher has started, in any session."""
    deadline = time.monotonic() + 30
    while pids := _pids(f"{variable}={value}"):  # again, because a process may start another meanwhile
        assert time.monotonic() < deadline, f"processes {pids} do not end"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _pids(setting: str) -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        # A process that has just ended, or a zombie, has no environment any more.
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and setting.encode() in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
    return pids
