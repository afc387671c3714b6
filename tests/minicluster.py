"""A real Slurm cluster of several hosts on this one machine, for tests that need a network, or a host that dies.

Each host is a process with network, PID, mount and UTS namespaces of its own, so it has its own name, addresses,
processes, /run and /dev/shm, and dies at once where that process is killed. The files are shared, as in a cluster.
The namespaces have no names outside: they end with their processes, and nothing of them is left in the system.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
_SSH_PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
_UNSHARE = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
_NETWORK = "10.77.0"  # seen inside the namespaces only, so that two clusters at a time do not meet
_FOLDER = "minicluster-"

_SLURM = """\
ClusterName=mini
SlurmctldHost=ctl({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued waits until its credential has expired: two minutes, were it not for this.
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
# With the default of 10 it takes up to 38 s, not 15, until a dead host is noticed.
MessageTimeout=5
SlurmdParameters=config_overrides
{settings}
"""
_NODE = "NodeName={host} NodeAddr={address} CPUs=96 RealMemory=1000000 {gres} State=UNKNOWN\n"
_PARTITIONS = """\
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10
"""

# What a host has to itself. The arguments are its name and the cluster's folder.
_BOOT = """\
hostname "$1"
mount -t sysfs sysfs /sys  # its own network devices
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
"""
_CONTROLLER = f"""\
ip link add br0 type bridge
ip address add {_NETWORK}.254/24 dev br0
ip link set br0 up
munged --socket="$2/munge.socket" --pid-file="$2/munge.pid" --log-file="$2/munge.log" --key-file="$2/munge.key" \
    --seed-file="$2/munge.seed" --num-threads=2
slurmctld
"""
_NODE_BOOT = f"""\
ip address add {_NETWORK}."${{1#n}}"/24 dev eth0
ip link set eth0 up
slurmd -N "$1"
"""

# sshd without PAM refuses root where the machine locks root's password, and root's shell may read files that start
# anything: hence account files of its own.
_SSHD = """\
[ ! -d ~root/.ssh ] || mount -t tmpfs tmpfs ~root/.ssh
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/ssh/shadow" /etc/shadow
sed '/^root:/s,[^:]*$,/bin/sh,' /etc/passwd > /run/passwd
mount --bind /run/passwd /etc/passwd
mkdir /run/sshd
"$(command -v sshd)"
"""
_SSHD_FILES = {
    "sshd_config": "HostKey /etc/ssh/host\nAuthorizedKeysFile /etc/ssh/user.pub\nUsePAM no\nPidFile none\n",
    "ssh_config": "IdentityFile /etc/ssh/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\nLogLevel ERROR\n"
    "UserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\n",
    "shadow": "root:*:20000:0:99999:7:::\n",
}

# States that a job does not leave by itself.
_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY"}


@functools.cache
def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    if sys.platform != "linux":
        return "Slurm and namespaces need Linux"
    if absent := _absent(_PACKAGES):
        return absent
    if os.geteuid() != 0:
        return "namespaces and slurmd need root"
    trial = "mount -t tmpfs tmpfs /run; ip link add br0 type bridge; ip link add v1 type veth peer name eth0"
    done = subprocess.run([*_UNSHARE, "sh", "-ec", trial], env=_environment(), capture_output=True, text=True)
    return f"namespaces are not permitted: {done.stderr.strip()}" if done.returncode else ""


def missing_ssh() -> str:
    """Why the hosts of a cluster cannot have sshd here; empty where they can."""
    return missing() or _absent(_SSH_PACKAGES)


@contextlib.contextmanager
def mini_cluster(nodes: int = 2, gpus: int = 8, kill_wait: int = 10, settings: str = "") -> Iterator["MiniCluster"]:
    """Start a controller and `nodes` idle hosts with `gpus` pretended GPUs each; `settings` are more slurm.conf lines.

    At the end, and where the start fails, every process of it is ended and its folder is removed.
    """
    _remove_leftovers()
    # Not pytest's folder: the path of munged's socket has to be short.
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
    cluster = MiniCluster(folder, [f"n{i}" for i in range(1, nodes + 1)])
    try:
        cluster.start(gpus, kill_wait, settings)
        yield cluster
    finally:
        cluster.stop()


class MiniCluster:
    """The hosts `ctl`, `n1`, `n2`, ...: runs programs on them, cuts their power and their cables."""

    def __init__(self, folder: Path, hosts: list[str]) -> None:
        self.folder = folder
        self.hosts = hosts
        self._machines: dict[str, subprocess.Popen[bytes]] = {}  # those with power
        self._inits: dict[str, int] = {}
        self._unplugged: set[str] = set()
        self._ssh = False

    # Programs

    def control(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's tools on the controller."""
        return self.on("ctl", *command, cwd=cwd, env=env, check=check)

    def on(
        self,
        host: str,
        *command: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host. Past the time, it and all that it has started are ended, and the test fails."""
        mark = str(uuid.uuid4())
        process = self._popen(host, command, cwd, {**(env or {}), "MINICLUSTER_CALL": mark})
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException as error:
            end_processes("MINICLUSTER_CALL", mark)  # ending the process alone leaves those that hold its pipes
            output, errors = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise AssertionError(f"{host}: {command} did not end in {timeout} s:\n{output}{errors}") from None
        code = process.returncode
        assert code == 0 or not check, f"{host}: {command} ended with {code}:\n{output}{errors}"
        return subprocess.CompletedProcess(command, code, output, errors)

    def start_on(
        self, host: str, *command: str, stdout: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a program on a host; what it prints goes to the file `stdout`.

        Its exit code is this process's. Any signal to this process kills the program on the host; to send another
        signal, use `kill` or `pkill` there.
        """
        with stdout.open("w") as output:
            return self._popen(host, command, cwd, env, output.fileno(), subprocess.STDOUT)

    def _popen(
        self,
        host: str,
        command: tuple[str, ...],
        cwd: Path | None,
        env: Mapping[str, str] | None,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        assert host in self._machines, f"{host} has no power"
        enter = ["nsenter", f"--target={self._inits[host]}", "--net", "--pid", "--mount", "--uts"]
        # The program is a child of nsenter, and would not notice that nsenter is ended.
        enter += ["setpriv", "--pdeathsig=KILL", "env", f"--chdir={(cwd or Path.cwd()).absolute()}", *command]
        return subprocess.Popen(
            enter,
            env=self._variables(env),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def _variables(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**_environment(), "SLURM_CONF": str(self.folder / "slurm.conf"), **(env or {})}

    # Machines

    def start(self, gpus: int, kill_wait: int, settings: str) -> None:
        """Start the controller and the nodes."""
        self._write(gpus, kill_wait, settings)
        self._boot("ctl", _CONTROLLER)
        for host in self.hosts:
            self.power_on(host)
        self.wait_idle()

    def stop(self) -> None:
        """End every process, and remove the folder."""
        for host in list(self._machines):
            self._kill(host)
        _remove(self.folder)

    def power_on(self, host: str) -> None:
        """Boot the host with its cable plugged in; Slurm finds it idle about a second later.

        Wait for its job to be requeued first: Slurm does not notice a host that was away for less than
        SlurmdTimeout, and its job would stay without the processes there.
        """
        self._boot(host, _NODE_BOOT)
        if self._ssh:
            self._script(host, _SSHD)

    def power_off(self, host: str) -> None:
        """Kill everything on the host at once.

        Its connections are closed, as the kernel of a crashing program would; cut the cable first for a host that
        falls silent.
        """
        self._kill(host)
        self._ip("link", "delete", f"v{host}", check=False)  # gone with its other end, or about to go
        self._unplugged.discard(host)

    def link(self, host: str, up: bool) -> None:
        """Plug the host's cable in or out: without it, packets are lost and nobody is told."""
        self._ip("link", "set", f"v{host}", "up" if up else "down")
        (self._unplugged.discard if up else self._unplugged.add)(host)

    def start_sshd(self) -> dict[str, str]:
        """Let the nodes reach one another by ssh and pdsh without questions; gives variables that pdsh needs."""
        if not self._ssh:
            keys = self.folder / "ssh"
            keys.mkdir()
            for name in ("host", "user"):
                command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            for name, text in _SSHD_FILES.items():
                (keys / name).write_text(text)
            (keys / "shadow").chmod(0o600)
            for host in self.hosts:
                if host in self._machines:
                    self._script(host, _SSHD)
            self._ssh = True
        return {"PDSH_RCMD_TYPE": "ssh"}

    def _boot(self, host: str, script: str) -> None:
        assert host not in self._machines, f"{host} has power"
        # The first process of the host reaps those that lose their parent, as bash does while it waits.
        machine = subprocess.Popen(
            [*_UNSHARE, "bash", "-c", "while :; do sleep 60; done"],
            env=self._variables(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._machines[host] = machine
        self._inits[host] = _wait(lambda: _child(machine), f"{host} does not start")
        if host != "ctl":
            # The same hardware address at each boot, or the others would send to the old one for half a minute.
            peer = ["name", "eth0", "address", f"02:00:00:00:00:{int(host[1:]):02x}", "netns", str(self._inits[host])]
            self._ip("link", "add", f"v{host}", "type", "veth", "peer", *peer)
            self._ip("link", "set", f"v{host}", "master", "br0", "up")
        self._script(host, _BOOT + script)

    def _script(self, host: str, script: str) -> None:
        self.on(host, "bash", "-ec", script, "bash", host, str(self.folder), cwd=Path("/"))

    def _kill(self, host: str) -> None:
        machine = self._machines.pop(host)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._inits.pop(host, machine.pid), signal.SIGKILL)
        machine.wait(30)  # the first process of a host ends after all others

    def _ip(self, *arguments: str, check: bool = True) -> None:
        # In the controller's network only, so that `netns` finds a process by its number on this machine.
        command = ["nsenter", f"--target={self._inits['ctl']}", "--net", "ip", *arguments]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"ip {arguments}: {done.stderr}"

    def _write(self, gpus: int, kill_wait: int, settings: str) -> None:
        text = _SLURM.format(network=_NETWORK, folder=self.folder, kill_wait=kill_wait, settings=settings)
        names = f"127.0.0.1 localhost\n{_NETWORK}.254 ctl\n"
        for number, host in enumerate(self.hosts, 1):
            address = f"{_NETWORK}.{number}"
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

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> int:
        """Submit a job with `sbatch`; gives its id."""
        return int(self.control("sbatch", "--parsable", *arguments, cwd=cwd, env=env).stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, Reason, NodeList, StdOut, ..."""
        text = self.control("scontrol", "show", "job", str(job)).stdout
        fields = re.split(r"(?:^|\s)([A-Z][\w:/]*)=", text)[1:]
        return {name: value.strip() for name, value in zip(fields[::2], fields[1::2], strict=True)}

    def wait(self, job: int, *states: str, timeout: float = 120.0, restarts: int | None = None) -> dict[str, str]:
        """Wait until the job is in one of these states, having been restarted `restarts` times or more; its fields.

        Fails with what is known where the time is over, or where the job has ended otherwise.
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
        _wait(self._idle, "the nodes are not idle", timeout, self.report)

    def cancel_all(self, timeout: float = 60.0) -> None:
        """End all jobs, plug in and power on what was not, and wait until all nodes are idle."""
        for host in self.hosts:
            if host not in self._machines:
                self.power_on(host)
            elif host in self._unplugged:
                self.link(host, True)
        self.control("scancel", "--user=root", "--state=PENDING", check=False)  # none starts when another ends
        self.control("scancel", "--user=root", "--signal=KILL", "--full", check=False)  # no wait for KillWait
        _wait(self._cancelled, "jobs do not end", timeout, self.report)
        for host in self.hosts:  # one that a test has drained, or set down, does not come back by itself
            if re.search("drain|down", self._node_states().get(host, "")):
                self.control("scontrol", "update", f"nodename={host}", "state=resume", check=False)
        self.wait_idle(timeout)

    def report(self, job: int | None = None) -> str:
        """The state of all, for the message of a failed test."""
        parts = [self.control(*command, check=False).stdout for command in (("squeue",), ("sinfo", "-N", "-l"))]
        if job is not None:
            fields = self.job(job)
            parts.insert(0, "\n".join(f"{name}={value}" for name, value in fields.items()))
            parts.append(_tail(Path(fields.get("StdOut", ""))))
        parts += [_tail(path) for path in sorted(self.folder.glob("slurm*.log"))]
        return "\n".join(parts)

    def _node_states(self) -> dict[str, str]:
        done = self.control("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %T", check=False)
        return dict(line.split() for line in done.stdout.splitlines())

    def _idle(self) -> bool:
        return self._node_states() == dict.fromkeys(self.hosts, "idle")

    def _cancelled(self) -> bool:
        self.control("scancel", "--user=root", check=False)  # again, because a job may have been requeued meanwhile
        return not self.control("squeue", "--noheader", check=False).stdout


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


def _environment() -> dict[str, str]:
    """This process's environment without an outer Slurm job's variables, and with the daemons' folder in the path."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    return {**variables, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def _absent(packages: Mapping[str, str]) -> str:
    path = _environment()["PATH"]
    absent = [name for name in packages if shutil.which(name, path=path) is None]
    needed = " ".join(dict.fromkeys(packages[name] for name in absent))
    return f"no {', '.join(absent)}: install the Debian packages {needed}" if absent else ""


def _remove(folder: Path) -> None:
    end_processes("SLURM_CONF", str(folder / "slurm.conf"))
    shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove the clusters of test processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        pid = folder.name.removeprefix(_FOLDER).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove(folder)


def _child(machine: subprocess.Popen[bytes]) -> int:
    """The first process of a machine, 0 before it has its namespaces and mounts."""
    with contextlib.suppress(OSError, IndexError):
        child = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()[0]
        return int(child) if Path(f"/proc/{child}/comm").read_text().strip() == "bash" else 0
    return 0


def _wait(ready: Callable[[], T], message: str, timeout: float = 30.0, report: Callable[[], str] = str) -> T:
    deadline = time.monotonic() + timeout
    while not (result := ready()):
        assert time.monotonic() < deadline, f"{message} in {timeout} s\n{report()}"
        time.sleep(0.05)
    return result


def _tail(path: Path) -> str:
    if not path.is_file():
        return ""
    return f"--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-30:])
