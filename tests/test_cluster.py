"""launch/multinode.sh on a real Slurm with two nodes: every kind of interruption, and the curve after it.

Each test trains the same tiny model with another engine; the curve across a fault is compared with that of one process
that never stopped.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.incarnations import list_incarnations
from tests.conftest import metrics, write_tiny
from tests.faulty_run import before_steps
from tests.minicluster import MiniCluster, mini_cluster, missing, missing_ssh
from tests.processes import REPOSITORY, free_port, megagpt
from tests.runs import LOSS, PATIENCE, STEP_TOKENS, assert_one_error, losses, wait_for_steps

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

SCRIPT = str(REPOSITORY / "launch" / "multinode.sh")
STEPS = 200
ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp": ["engine.name=fsdp"],
    "zero": ["engine.name=zero", "engine.stage=3"],
}
# One rank on each node of pretend GPUs. The package may not be installed where the tests' interpreter finds it.
ENVIRONMENT = {
    "PYTHON": sys.executable,
    "RANKS_PER_NODE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
}


@pytest.fixture(scope="module")
def machines() -> Iterator[MiniCluster]:
    if reason := missing():
        pytest.skip(reason)
    with mini_cluster(2) as cluster:
        yield cluster


@pytest.fixture
def cluster(machines: MiniCluster) -> Iterator[MiniCluster]:
    yield machines
    machines.cancel_all()


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("plain")
    done = megagpt("train", str(config(folder, corpus)), cwd=folder)
    assert done.returncode == 0, done.stderr
    return losses(folder / "runs" / "tiny")


def config(folder: Path, corpus: Path) -> Path:
    return write_tiny(
        folder, corpus,
        train={"tokens": STEPS * STEP_TOKENS, "micro_batch": 2},
        schedule={"decay_end_tokens": STEPS * STEP_TOKENS},
        checkpoint={"every_tokens": 10 * STEP_TOKENS, "keep_last": 3},
        optimizer={"lr": 3e-4},
    )  # fmt: skip


class Job:
    """A run of `config` in a folder, as a job or otherwise."""

    def __init__(self, cluster: MiniCluster, folder: Path, corpus: Path, *overrides: str) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "runs" / "tiny"
        self.arguments = [str(config(folder, corpus)), *overrides]
        self.id = 0

    def submit(self, *options: str, **env: str) -> int:
        self.id = self.cluster.submit(*options, SCRIPT, *self.arguments, cwd=self.folder, env={**ENVIRONMENT, **env})
        return self.id

    @property
    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("slurm-*.out")))

    def wait(self, *states: str, **options: Any) -> dict[str, str]:
        try:
            return self.cluster.wait(self.id, *states, **{"timeout": PATIENCE, **options})
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None

    def wait_for_steps(self, count: int, start: int = 1) -> None:
        wait_for_steps(self.run, count, incarnation=start)

    def assert_complete_curve(self, expected: list[float]) -> None:
        """Every step once, with the loss of one process that never stopped."""
        steps = metrics(self.run)
        assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in steps] == pytest.approx(expected, abs=LOSS)
        assert list_incarnations(self.run)[-1].ended()["outcome"] == "finished"

    def ends(self) -> list[tuple[str | None, str | None]]:
        return [(e.get("outcome"), e.get("reason")) for e in (i.ended() for i in list_incarnations(self.run))]


def test_a_time_limit_saves_requeues_and_resumes(
    cluster: MiniCluster, corpus: Path, tmp_path: Path, expected: list[float]
) -> None:
    # The first start sleeps before its steps. Once it trains, the limit is cut so that Slurm's signal is due: at least
    # one minute of the job's time is left then, and at most two.
    job = Job(cluster, tmp_path, corpus)
    first = "os.environ.get('RANK') == '0' and os.environ.get('SLURM_RESTART_COUNT', '0') == '0'"
    job.submit(
        "--nodes=2", "--time=60", "--signal=USR1@120", PYTHONPATH=before_steps(tmp_path, first, "time.sleep(0.5)")
    )
    job.wait_for_steps(2)
    hours, minutes, _ = map(int, cluster.job(job.id)["RunTime"].split(":"))
    cluster.control("scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * hours + minutes + 2}")
    job.wait("PENDING", "RUNNING", restarts=1)
    assert job.ends()[0] == ("stopped", "SIGUSR1")
    cluster.control("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    assert job.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.output
    job.assert_complete_curve(expected)
    assert "2 node(s) are fit: n1, n2; an all-reduce" in job.output

    events = EventAccumulator(str(job.run))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/loss")] == list(range(1, STEPS + 1)), "not one continuous run"
    assert [e.value for e in events.Scalars("totals/incarnation")] == [2.0]
    (*_, start) = events.Tensors("start/text_summary")
    assert f"megagpt train --resume {job.run}" in start.tensor_proto.string_val[0].decode()

    # A finished run is never restarted.
    before = (job.run / "metrics.jsonl").read_text()
    job.submit("--nodes=2")
    assert job.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.output
    assert "finished already" in job.output
    assert (job.run / "metrics.jsonl").read_text() == before
    assert len(job.ends()) == 2

    status = megagpt("status", str(job.run), cwd=tmp_path).stdout
    progress = f"100.0% of {STEPS * STEP_TOKENS:,} tokens, step {STEPS}"
    for part in ("finished", progress, "incarnations 2", "SIGUSR1"):
        assert part in status


def test_scancel_saves_and_ends_and_a_requeue_resumes(
    cluster: MiniCluster, corpus: Path, tmp_path: Path, expected: list[float]
) -> None:
    job = Job(cluster, tmp_path, corpus, *ENGINES["zero"])
    job.submit("--nodes=2")
    job.wait_for_steps(15)
    cluster.control("scancel", str(job.id))
    job.wait("CANCELLED")
    assert job.ends() == [("stopped", "SIGTERM")]
    newest = list_checkpoints(job.run)[-1]
    newest.open()  # raises if it is not complete
    assert newest.tokens == list_incarnations(job.run)[-1].ended()["tokens_seen"] == metrics(job.run)[-1]["tokens_seen"]
    cluster.wait_idle()  # its script has ended, too
    assert cluster.job(job.id)["JobState"] == "CANCELLED"
    assert len(job.ends()) == 1

    job.submit("--nodes=2")
    job.wait_for_steps(15, start=2)
    cluster.control("scontrol", "requeue", str(job.id))
    assert job.wait("COMPLETED", "FAILED", restarts=1)["JobState"] == "COMPLETED", job.output
    assert job.ends() == [("stopped", "SIGTERM"), ("stopped", "SIGTERM"), ("finished", "the last token")]
    job.assert_complete_curve(expected)


def test_a_job_resumes_without_a_node_that_lost_power(
    cluster: MiniCluster, corpus: Path, tmp_path: Path, expected: list[float]
) -> None:
    job = Job(cluster, tmp_path, corpus, *ENGINES["fsdp"])
    job.submit("--nodes=1-2")
    job.wait_for_steps(15)
    assert cluster.job(job.id)["NodeList"] == "n[1-2]"
    cluster.power_off("n2")
    assert job.wait("COMPLETED", "FAILED", restarts=1)["JobState"] == "COMPLETED", job.output
    assert cluster.job(job.id)["NodeList"] == "n1"
    job.assert_complete_curve(expected)


def test_a_stale_incarnation_behind_a_partition_writes_nothing(
    cluster: MiniCluster, corpus: Path, tmp_path: Path, expected: list[float]
) -> None:
    """The main rank's node is cut off, while it still sees the folder. The job resumes on the other node."""
    job = Job(cluster, tmp_path, corpus, *ENGINES["ddp"])
    job.submit("--nodes=1-2")
    job.wait_for_steps(15)
    cluster.link("n1", up=False)
    job.wait("RUNNING", restarts=1)
    job.wait_for_steps(5, start=2)
    stale = cluster.on("n1", "pgrep", "-fc", "megagpt train", check=False).stdout.strip()
    assert int(stale) > 0, "the stale rank is gone: nothing is tested"
    cluster.link("n1", up=True)
    assert job.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.output
    # Slurm's own left-over srun may stop this incarnation, and its job resumes once more.
    assert list_incarnations(job.run)[1].start()["host"] == "n2"
    job.assert_complete_curve(expected)
    assert not [problem for c in list_checkpoints(job.run) for problem in c.verify()]


def test_a_repeated_failure_ends_the_job(cluster: MiniCluster, corpus: Path, tmp_path: Path) -> None:
    """Rank 1 dies as the kernel would kill it, each time at the sixth step."""
    death = f"tokens == {6 * STEP_TOKENS} and os.kill(os.getpid(), 9)"
    job = Job(cluster, tmp_path, corpus)
    job.submit("--nodes=2", PYTHONPATH=before_steps(tmp_path, "os.environ.get('RANK') == '1'", death))
    found = job.wait("COMPLETED", "FAILED", restarts=1)
    assert found["JobState"] == "FAILED", job.output
    # Once is enough; Slurm's left-over srun may end a start before its ranks have met, and such a start is retried.
    last = int(found["Restarts"])
    assert last >= 1
    assert f"in the same way at the same step before, at {5 * STEP_TOKENS} tokens" in job.output
    assert {outcome for outcome, _ in job.ends()} == {"failed"}
    for start in (f"{job.id}.0", f"{job.id}.{last}"):
        first = (job.run / "logs" / start / "first_error.txt").read_text().splitlines()[0]
        assert first == "first to fail: rank 1 on n2: died of SIGKILL (out of memory, if nobody sent it)"


def test_an_unfit_node_is_named_before_anything_starts(cluster: MiniCluster, corpus: Path, tmp_path: Path) -> None:
    """The second node has a disk of its own in the place of the shared folder."""
    job = Job(cluster, tmp_path, corpus)
    job.run.mkdir(parents=True)
    cluster.on("n2", "mount", "-t", "tmpfs", "none", str(job.run.parent))
    try:
        cluster.on("n2", "mkdir", "-p", str(job.run / "logs"))
        job.submit("--nodes=2", SBATCH_ACCOUNT="lab", SBATCH_TIMELIMIT="7")
        found = job.wait("COMPLETED", "FAILED")
    finally:
        cluster.on("n2", "umount", str(job.run.parent))
    assert found["JobState"] == "FAILED"
    assert found["Restarts"] == "0"
    assert "1 of 2 node(s) are not fit" in job.output
    assert "n2: cannot use the run's folder (FileNotFoundError" in job.output
    assert not list_incarnations(job.run)
    assert (found["Account"], found["TimeLimit"]) == ("lab", "00:07:00"), "the environment does not override the header"
    assert "Traceback" not in job.output


def test_srun_without_the_script_trains_the_same_curve(
    cluster: MiniCluster, corpus: Path, tmp_path: Path, expected: list[float]
) -> None:
    job = Job(cluster, tmp_path, corpus)
    script = str(REPOSITORY / "launch" / "train.py")
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, script, *job.arguments]
    cluster.control(*command, cwd=tmp_path, env=ENVIRONMENT)
    job.assert_complete_curve(expected)


def test_srun_puts_a_groups_tensor_ranks_on_one_node(cluster: MiniCluster, corpus: Path, tmp_path: Path) -> None:
    """With the distribution that the refusal of the other one names."""
    groups = ["engine.name=fsdp", "engine.tensor_ranks=2", f"train.tokens={5 * STEP_TOKENS}"]
    job = Job(cluster, tmp_path, corpus, *groups)
    script = str(REPOSITORY / "launch" / "train.py")
    srun, run = ["srun", "--nodes=2", "--ntasks-per-node=2"], [sys.executable, script, *job.arguments]
    refused = cluster.control(*srun, "--distribution=cyclic", *run, cwd=tmp_path, env=ENVIRONMENT, check=False)
    assert refused.returncode != 0
    assert_one_error(refused.stderr, "engine.tensor_ranks 2: ranks 0 to 1 are on n1 and n2", "--distribution=block")
    assert not job.run.exists()
    cluster.control(*srun, "--distribution=block", *run, cwd=tmp_path, env=ENVIRONMENT)
    assert [line["step"] for line in metrics(job.run)] == [1, 2, 3, 4, 5]
    assert list_incarnations(job.run)[-1].start()["hosts"] == {"n1": 2, "n2": 2}


def test_deepspeed_over_ssh_stops_and_resumes(
    cluster: MiniCluster, corpus: Path, tmp_path: Path, expected: list[float]
) -> None:
    """ZeRO on two hosts of a hostfile. The second rank sees variables that are set on the first host alone."""
    if reason := missing_ssh():
        pytest.skip(reason)
    ssh = cluster.start_sshd()
    hostfile = tmp_path / "hosts"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    job = Job(cluster, tmp_path, corpus, *ENGINES["zero"])
    environment = {**ENVIRONMENT, **ssh, "TORCH_FR_DUMP_TEMP_FILE": "a b"}
    command = [sys.executable, "-m", "megagpt", "launch", "hosts", *job.arguments, "--hostfile", str(hostfile)]
    launcher = cluster.start_on("n1", *command, stdout=tmp_path / "output", cwd=tmp_path, env=environment)
    job.wait_for_steps(15)
    cluster.on("n1", "pkill", "-TERM", "-f", "bin/deepspeed --hostfile")
    launcher.wait(timeout=60)
    deadline = time.monotonic() + 30
    while not job.ends()[0][0] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert job.ends() == [("stopped", "SIGTERM")], (tmp_path / "output").read_text()
    cluster.on("n1", *command, cwd=tmp_path, env=environment)
    job.assert_complete_curve(expected)
    assert list_incarnations(job.run)[-1].start()["world_size"] == 2
    assert "TORCH_FR_DUMP_TEMP_FILE=a b\n" in (job.run / "logs" / "deepspeed_env").read_text()


def test_an_elastic_job_survives_a_worker_and_a_node(
    cluster: MiniCluster, corpus: Path, tmp_path: Path, expected: list[float]
) -> None:
    job = Job(cluster, tmp_path, corpus, "train.tokens=51200", "schedule.decay_end_tokens=25600")
    port = free_port()

    def start(host: str) -> Any:
        return cluster.start_on(
            host, sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=n1:{port}", "--rdzv-id=elastic", "--max-restarts=9",
            "--rdzv-conf=last_call_timeout=3", str(REPOSITORY / "launch" / "train.py"), *job.arguments, "--auto-resume",
            stdout=tmp_path / f"{host}.out", cwd=tmp_path,
            env={**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )  # fmt: skip

    def world_sizes() -> list[int]:
        return [i.start()["world_size"] for i in list_incarnations(job.run)]

    def wait_for(sizes: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not sizes():
            assert time.monotonic() < deadline, "".join(p.read_text()[-3000:] for p in tmp_path.glob("*.out"))
            time.sleep(0.1)

    first = start("n1")
    start("n2")
    wait_for(lambda: world_sizes()[-1:] == [2])
    job.wait_for_steps(12)
    cluster.on("n2", "pkill", "-9", "-f", "python3? -u .*launch/train.py")
    count = len(world_sizes())
    wait_for(lambda: len(world_sizes()) > count and world_sizes()[-1] == 2)
    job.wait_for_steps(12, start=2)
    cluster.power_off("n2")
    wait_for(lambda: world_sizes()[-1] == 1)
    job.wait_for_steps(5, start=3)
    cluster.power_on("n2")
    start("n2")
    wait_for(lambda: world_sizes()[-1] == 2)
    assert first.wait(timeout=120) == 0, (tmp_path / "n1.out").read_text()
    losses = [line["loss"] for line in metrics(job.run)]
    assert losses[:STEPS] == pytest.approx(expected, abs=LOSS)
    assert len(losses) == 400
