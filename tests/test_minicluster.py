"""The cluster of the tests itself: it runs jobs, survives a host's death, and leaves nothing behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.minicluster import MiniCluster, mini_cluster, missing, missing_ssh

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.xdist_group("cluster"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

_JOB = """\
#!/bin/bash
#SBATCH --nodes=2 --gpus-per-node=8 --cpus-per-task=96 --mem=0 --exclusive --account=foo --output=job.out
echo "$SLURM_GPUS_ON_NODE GPUs $CUDA_VISIBLE_DEVICES"
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[MiniCluster]:
    with mini_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: MiniCluster) -> Iterator[MiniCluster]:
    yield shared
    shared.cancel_all()


def test_each_node_is_a_host_of_its_own(cluster: MiniCluster) -> None:
    assert sorted(cluster.control("srun", "--nodes=2", "hostname").stdout.split()) == ["n1", "n2"]


def test_a_job_gets_the_pretended_gpus(cluster: MiniCluster, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(_JOB)
    cluster.wait(cluster.submit("job.sh", cwd=tmp_path), "COMPLETED")
    assert (tmp_path / "job.out").read_text() == "8 GPUs 0,1,2,3,4,5,6,7\n"


def test_urgent_jobs_preempt_others(cluster: MiniCluster, tmp_path: Path) -> None:
    job = cluster.submit("--nodes=2", "--exclusive", "--wrap=sleep 300", cwd=tmp_path)
    cluster.wait(job, "RUNNING")
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
    cluster.wait(urgent, "COMPLETED")
    cluster.wait(job, "PENDING", "RUNNING", restarts=1)


def test_a_host_without_cable_is_not_reached(cluster: MiniCluster) -> None:
    ask = "timeout 5 bash -c 'until (exec 3<>/dev/tcp/n2/6818); do sleep 0.1; done'"
    assert cluster.on("n1", "bash", "-c", ask, check=False).returncode == 0
    cluster.link("n2", False)
    assert cluster.on("n1", "bash", "-c", ask.replace("timeout 5", "timeout 1"), check=False).returncode != 0
    cluster.link("n2", True)
    assert cluster.on("n1", "bash", "-c", ask, check=False).returncode == 0


def test_an_endless_program_is_killed_with_its_children(cluster: MiniCluster) -> None:
    with pytest.raises(AssertionError, match=r"did not end in 0\.5 s:\nstarted"):
        cluster.on("n1", "bash", "-c", "echo started; setsid sleep 301 & sleep 301", timeout=0.5)
    assert cluster.on("n1", "pgrep", "--full", "sleep 301", check=False).returncode == 1


def test_a_started_program_dies_with_its_host(cluster: MiniCluster, tmp_path: Path) -> None:
    program = cluster.start_on("n2", "sh", "-c", "pwd; exec sleep 302", stdout=tmp_path / "output", cwd=tmp_path)
    while (tmp_path / "output").read_text() != f"{tmp_path}\n":
        assert program.poll() is None
    cluster.power_off("n2")
    assert program.wait(10) != 0


@pytest.mark.skipif(bool(missing_ssh()), reason=missing_ssh())
def test_the_hosts_reach_one_another_by_ssh(cluster: MiniCluster) -> None:
    variables = cluster.start_sshd()
    assert cluster.on("n1", "ssh", "n2", "hostname").stdout == "n2\n"
    assert sorted(cluster.on("n1", "pdsh", "-w", "n1,n2", "hostname", env=variables).stdout.splitlines()) == [
        "n1: n1",
        "n2: n2",
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left(fails: bool, tmp_path: Path) -> None:
    folder, spaces = tmp_path, {""}
    try:
        with mini_cluster(nodes=1, gpus=0) as cluster:
            folder = cluster.folder
            spaces = {cluster.on(host, "readlink", "/proc/self/ns/net").stdout.strip() for host in ("ctl", "n1")}
            cluster.submit("--wrap=setsid sleep 300", cwd=tmp_path)
            cluster.start_on("n1", "sleep", "300", stdout=tmp_path / "output")
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert not folder.exists()
    assert len(spaces) == 2
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert (process / "ns" / "net").readlink().name not in spaces
            assert str(folder).encode() not in (process / "environ").read_bytes()
        except OSError:
            pass  # has ended meanwhile
