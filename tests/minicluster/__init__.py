"""A real Slurm cluster of several hosts on this machine, for tests that need a network, or a host that dies.

Each host is a process with network, PID, mount and UTS namespaces of its own: it has its own name, addresses,
processes, /run and /dev/shm, and dies at once when that process is killed. The files are shared, as in a cluster.
The namespaces have no names outside: they end with their processes, and leave nothing in the system.
"""

from tests.minicluster.hosts import missing
from tests.minicluster.processes import end_processes
from tests.minicluster.slurm import MiniCluster, mini_cluster
from tests.minicluster.ssh import missing_ssh

__all__ = ["MiniCluster", "end_processes", "mini_cluster", "missing", "missing_ssh"]
