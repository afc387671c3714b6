"""sshd on the hosts of a cluster, and the keys with which they reach one another."""

import subprocess
from pathlib import Path

from tests.minicluster.hosts import missing
from tests.minicluster.processes import absent_programs

_PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}

# Own account files: sshd without PAM refuses root if the machine locks root's password, and root's usual shell may read
# files that start other programs.
SSHD = """\
[ ! -d ~root/.ssh ] || mount -t tmpfs tmpfs ~root/.ssh
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/ssh/shadow" /etc/shadow
sed '/^root:/s,[^:]*$,/bin/sh,' /etc/passwd > /run/passwd
mount --bind /run/passwd /etc/passwd
mkdir /run/sshd
"$(command -v sshd)"
"""
_FILES = {
    "sshd_config": "HostKey /etc/ssh/host\nAuthorizedKeysFile /etc/ssh/user.pub\nUsePAM no\nPidFile none\n",
    "ssh_config": "IdentityFile /etc/ssh/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\nLogLevel ERROR\n"
    "UserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\n",
    "shadow": "root:*:20000:0:99999:7:::\n",
}


def missing_ssh() -> str:
    """The reason why the hosts cannot have sshd here; empty if they can."""
    return missing() or absent_programs(_PACKAGES)


def write_keys(folder: Path) -> None:
    """Make the keys and settings that the script `SSHD` mounts: `ssh` in the cluster's folder."""
    keys = folder / "ssh"
    keys.mkdir()
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    for name, text in _FILES.items():
        (keys / name).write_text(text)
    (keys / "shadow").chmod(0o600)
