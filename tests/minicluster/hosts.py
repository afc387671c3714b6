"""Hosts as Linux namespaces: booting them, running programs on them, cutting their power and their cables."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

from tests.minicluster.processes import absent_programs, end_processes, outer_environment, wait_until

_PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
_UNSHARE = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
# Visible inside the namespaces only, so that two clusters at a time do not collide.
NETWORK = "10.77.0"

# Makes a host's own name, devices and folders. Arguments: the host's name, the cluster's folder.
_BOOT = """\
hostname "$1"
mount -t sysfs sysfs /sys  # its own network devices
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
"""


@functools.cache
def missing() -> str:
    """The reason why no cluster can be started here; empty if one can."""
    if sys.platform != "linux":
        return "Slurm and namespaces need Linux"
    if absent := absent_programs(_PACKAGES):
        return absent
    if os.geteuid() != 0:
        return "namespaces and slurmd need root"
    trial = "mount -t tmpfs tmpfs /run; ip link add br0 type bridge; ip link add v1 type veth peer name eth0"
    done = subprocess.run([*_UNSHARE, "sh", "-ec", trial], env=outer_environment(), capture_output=True, text=True)
    return f"namespaces are not permitted: {done.stderr.strip()}" if done.returncode else ""


class Hosts:
    """The hosts `ctl`, `n1`, `n2`, ...: runs programs on them, cuts their power and their cables."""

    def __init__(self, folder: Path, hosts: list[str], variables: Mapping[str, str]) -> None:
        self.folder = folder
        self.hosts = hosts
        """All but `ctl`."""
        self._variables = variables  # of every process
        self._machines: dict[str, subprocess.Popen[bytes]] = {}  # those with power
        self._inits: dict[str, int] = {}
        self._unplugged: set[str] = set()

    # Programs

    def on(
        self,
        host: str,
        *command: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host. After `timeout` s it is killed with all that it started, and the test fails."""
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
        """Start a program on a host; its output goes to the file `stdout`.

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
        # The program is a child of nsenter, and would outlive it otherwise.
        enter += ["setpriv", "--pdeathsig=KILL", "env", f"--chdir={(cwd or Path.cwd()).absolute()}", *command]
        return subprocess.Popen(
            enter,
            env={**outer_environment(), **self._variables, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    # Machines

    def power_off(self, host: str) -> None:
        """Kill everything on the host at once.

        Its connections are closed, as after a program's crash; to make it fall silent instead, cut the cable first.
        """
        self.kill(host)
        self._ip("link", "delete", f"v{host}", check=False)  # gone with its other end, or about to go
        self._unplugged.discard(host)

    def link(self, host: str, up: bool) -> None:
        """Plug the host's cable in or out: without it, packets are lost silently."""
        self._ip("link", "set", f"v{host}", "up" if up else "down")
        (self._unplugged.discard if up else self._unplugged.add)(host)

    def boot(self, host: str, script: str) -> None:
        """Start a host, and then the script on it."""
        assert host not in self._machines, f"{host} has power"
        # The host's first process must reap orphans: bash does so while it waits.
        machine = subprocess.Popen(
            [*_UNSHARE, "bash", "-c", "while :; do sleep 60; done"],
            env={**outer_environment(), **self._variables},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._machines[host] = machine
        self._inits[host] = wait_until(lambda: _child(machine), f"{host} does not start")
        if host != "ctl":
            # The same hardware address at each boot, or other hosts would send to the old one for half a minute.
            peer = ["name", "eth0", "address", f"02:00:00:00:00:{int(host[1:]):02x}", "netns", str(self._inits[host])]
            self._ip("link", "add", f"v{host}", "type", "veth", "peer", *peer)
            self._ip("link", "set", f"v{host}", "master", "br0", "up")
        self.run_script(host, _BOOT + script)

    def run_script(self, host: str, script: str) -> None:
        self.on(host, "bash", "-ec", script, "bash", host, str(self.folder), cwd=Path("/"))

    def kill(self, host: str) -> None:
        """Kill every process of a host."""
        machine = self._machines.pop(host)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._inits.pop(host, machine.pid), signal.SIGKILL)
        machine.wait(30)  # the first process of a host ends after all others

    def _ip(self, *arguments: str, check: bool = True) -> None:
        # It enters the network only: `netns` needs the process number as this machine counts.
        command = ["nsenter", f"--target={self._inits['ctl']}", "--net", "ip", *arguments]
        done = subprocess.run(command, env=outer_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"ip {arguments}: {done.stderr}"


def _child(machine: subprocess.Popen[bytes]) -> int:
    """The first process of a machine, 0 before it has its namespaces and mounts."""
    with contextlib.suppress(OSError, IndexError):
        child = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()[0]
        return int(child) if Path(f"/proc/{child}/comm").read_text().strip() == "bash" else 0
    return 0
