"""Slurm on the hosts: its settings, its daemons, and its jobs."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.minicluster.hosts import NETWORK, Hosts
from tests.minicluster.processes import end_processes, last_lines, wait_until
from tests.minicluster.ssh import SSHD, write_keys

_FOLDER = "minicluster-"

_SLURM = """\
ClusterName=mini
SlurmctldHost=ctl({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: by default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait={kill_wait}
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=10
# With the default of 10 a dead host is noticed after up to 38 s instead of 15 s.
MessageTimeout=5
SlurmdParameters=config_overrides
{settings}
"""
_NODE = "NodeName={host} NodeAddr={address} CPUs=96 RealMemory=1000000 {gres} State=UNKNOWN\n"
_PARTITIONS = """\
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10
"""

_CONTROLLER = f"""\
ip link add br0 type bridge
ip address add {NETWORK}.254/24 dev br0
ip link set br0 up
munged --socket="$2/munge.socket" --pid-file="$2/munge.pid" --log-file="$2/munge.log" --key-file="$2/munge.key" \
    --seed-file="$2/munge.seed" --num-threads=2
slurmctld
"""
_NODE_BOOT = f"""\
ip address add {NETWORK}."${{1#n}}"/24 dev eth0
ip link set eth0 up
slurmd -N "$1"
"""

# States that a job never leaves.
_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY"}


@contextlib.contextmanager
def mini_cluster(nodes: int = 2, gpus: int = 8, kill_wait: int = 10, settings: str = "") -> Iterator["MiniCluster"]:
    """Start a controller and `nodes` idle hosts with `gpus` pretended GPUs each; `settings` are more slurm.conf lines.

    At the end, and if the start fails, all its processes are killed and its folder is removed.
    """
    _remove_leftovers()
    # Not in pytest's folder: the path of munged's socket must be short.
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
    cluster = MiniCluster(folder, [f"n{i}" for i in range(1, nodes + 1)])
    try:
        cluster.start(gpus, kill_wait, settings)
        yield cluster
    finally:
        cluster.stop()


class MiniCluster(Hosts):
    """A controller on `ctl` and nodes on `n1`, `n2`, ...: starts them, and runs jobs on them."""

    def __init__(self, folder: Path, hosts: list[str]) -> None:
        super().__init__(folder, hosts, {"SLURM_CONF": str(folder / "slurm.conf")})
        self._ssh = False

    # Machines

    def start(self, gpus: int, kill_wait: int, settings: str) -> None:
        """Start the controller and the nodes."""
        self._write(gpus, kill_wait, settings)
        self.boot("ctl", _CONTROLLER)
        for host in self.hosts:
            self.power_on(host)
        self.wait_idle()

    def stop(self) -> None:
        """End every process, and remove the folder."""
        for host in list(self._machines):
            self.kill(host)
        _remove(self.folder)

    def power_on(self, host: str) -> None:
        """Boot the host with its cable plugged in; Slurm finds it idle about a second later.

        Wait for its job to be requeued first: Slurm does not notice a host that was away for less than
        SlurmdTimeout, and its job would stay without the processes there.
        """
        self.boot(host, _NODE_BOOT)
        if self._ssh:
            self.run_script(host, SSHD)

    def start_sshd(self) -> dict[str, str]:
        """Let the nodes reach one another by ssh and pdsh without questions. Returns the variables that pdsh needs."""
        if not self._ssh:
            write_keys(self.folder)
            for host in self.hosts:
                if host in self._machines:
                    self.run_script(host, SSHD)
            self._ssh = True
        return {"PDSH_RCMD_TYPE": "ssh"}

    def _write(self, gpus: int, kill_wait: int, settings: str) -> None:
        text = _SLURM.format(network=NETWORK, folder=self.folder, kill_wait=kill_wait, settings=settings)
        names = f"127.0.0.1 localhost\n{NETWORK}.254 ctl\n"
        for number, host in enumerate(self.hosts, 1):
            address = f"{NETWORK}.{number}"
            text += _NODE.format(host=host, address=address, gres=f"Gres=gpu:{gpus}" if gpus else "")
            names += f"{address} {host}\n"
            (self.folder / "spool" / host).mkdir(parents=True)
        text += _PARTITIONS
        if gpus:
            text = "GresTypes=gpu\n" + text
            (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{gpus - 1}]\n")
            for number in range(gpus):
                os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))  # as /dev/null
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "hosts").write_text(names)
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        (self.folder / "state").mkdir()
        self.folder.chmod(0o755)  # munged wants a socket that every user can reach
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    # Jobs

    def control(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's tools on the controller."""
        return self.on("ctl", *command, cwd=cwd, env=env, check=check)

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> int:
        """Submit a job with `sbatch`; returns its id."""
        return int(self.control("sbatch", "--parsable", *arguments, cwd=cwd, env=env).stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, Reason, NodeList, StdOut, ..."""
        text = self.control("scontrol", "show", "job", str(job)).stdout
        fields = re.split(r"(?:^|\s)([A-Z][\w:/]*)=", text)[1:]
        return {name: value.strip() for name, value in zip(fields[::2], fields[1::2], strict=True)}

    def wait(self, job: int, *states: str, timeout: float = 120.0, restarts: int | None = None) -> dict[str, str]:
        """The job's fields, when it is in one of these states after at least `restarts` restarts.

        Fails with a report after `timeout` seconds, and if the job ends in another state.
        """
        deadline = time.monotonic() + timeout
        while True:
            fields = self.job(job)
            state = fields["JobState"]
            if state in states and int(fields["Restarts"]) >= (restarts or 0):
                return fields
            wanted = f"job {job}: wanted {'|'.join(states)}, restarts {restarts}"
            assert state not in _FINAL, f"{wanted}, has ended\n{self.report(job)}"
            assert time.monotonic() < deadline, f"{wanted}, not in {timeout} s\n{self.report(job)}"
            time.sleep(0.25)

    def wait_idle(self, timeout: float = 60.0) -> None:
        """Wait until all nodes are idle."""
        wait_until(self._idle, "the nodes are not idle", timeout, self.report)

    def cancel_all(self, timeout: float = 60.0) -> None:
        """End all jobs, restore power and cables, and wait until all nodes are idle."""
        for host in self.hosts:
            if host not in self._machines:
                self.power_on(host)
            elif host in self._unplugged:
                self.link(host, True)
        self.control("scancel", "--user=root", "--state=PENDING", check=False)  # none starts when another ends
        self.control("scancel", "--user=root", "--signal=KILL", "--full", check=False)  # no wait for KillWait
        wait_until(self._cancelled, "jobs do not end", timeout, self.report)
        for host in self.hosts:  # a node that a test has drained or set down stays so
            if re.search("drain|down", self._node_states().get(host, "")):
                self.control("scontrol", "update", f"nodename={host}", "state=resume", check=False)
        self.wait_idle(timeout)

    def report(self, job: int | None = None) -> str:
        """The state of jobs, nodes and daemons, for the message of a failed test."""
        parts = [self.control(*command, check=False).stdout for command in (("squeue",), ("sinfo", "-N", "-l"))]
        if job is not None:
            fields = self.job(job)
            parts.insert(0, "\n".join(f"{name}={value}" for name, value in fields.items()))
            parts.append(last_lines(Path(fields.get("StdOut", ""))))
        parts += [last_lines(path) for path in sorted(self.folder.glob("slurm*.log"))]
        return "\n".join(parts)

    def _node_states(self) -> dict[str, str]:
        done = self.control("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %T", check=False)
        return dict(line.split() for line in done.stdout.splitlines())

    def _idle(self) -> bool:
        return self._node_states() == dict.fromkeys(self.hosts, "idle")

    def _cancelled(self) -> bool:
        self.control("scancel", "--user=root", check=False)  # repeated, because a job may have been requeued meanwhile
        return not self.control("squeue", "--noheader", check=False).stdout


def _remove(folder: Path) -> None:
    end_processes("SLURM_CONF", str(folder / "slurm.conf"))
    shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove the clusters of test processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        pid = folder.name.removeprefix(_FOLDER).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove(folder)
