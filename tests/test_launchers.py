"""One training script under every launcher: plain python, torchrun, deepspeed and srun, each of them the real one."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megagpt.launchers import first_host
from tests.conftest import metrics
from tests.minicluster import MiniCluster, end_processes, mini_cluster, missing
from tests.processes import REPOSITORY, environment, free_port

pytestmark = pytest.mark.slow

SCRIPT = str(REPOSITORY / "launch" / "train.py")
ZERO3 = ["engine.name=zero", "engine.stage=3"]
Done = subprocess.CompletedProcess[str]
SLURM_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def shrunk(corpus: Path, folder: Path, name: str, micro_batch: int = 4) -> list[str]:
    """Arguments that make GPT-3 XL a run of three steps of four sequences."""
    return [
        "--config", "gpt3_xl.yaml", "model.layers=2", "model.width=32", "model.heads=2", "model.context=16",
        "train.tokens=192", "train.batch_tokens=64", f"train.micro_batch={micro_batch}", "train.batch_ramp_start=0",
        "train.batch_ramp_tokens=0", f"data.sources=[{{path: {corpus}}}]", f"run.folder={folder}", f"run.name={name}",
        "validation.tokens=64", "sampling.samples=1", "sampling.max_tokens=2", "train.device=cpu",
        "train.precision=fp32", "schedule.warmup_tokens=64", "optimizer.lr=1e-2",
    ]  # fmt: skip


def run(command: list[str], cwd: Path) -> Done:
    """Run a launcher; ranks that outlive it are ended."""
    variables = {**environment(), "TEST_FOLDER": str(cwd)}
    try:
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=300)
    finally:
        end_processes("TEST_FOLDER", str(cwd))


def python(arguments: list[str], cwd: Path) -> Done:
    return run([sys.executable, SCRIPT, *arguments], cwd)


def torchrun(arguments: list[str], cwd: Path) -> Done:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    return run([*launcher, SCRIPT, *arguments], cwd)


def deepspeed(arguments: list[str], cwd: Path) -> Done:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    return run([*launcher, f"--master_port={free_port()}", SCRIPT, *arguments], cwd)


def srun(arguments: list[str], cwd: Path, cluster: MiniCluster) -> Done:
    command = ["srun", "-n", "2", sys.executable, SCRIPT, *arguments]
    return cluster.control(*command, cwd=cwd, env={**SLURM_ENVIRONMENT, "TEST_FOLDER": str(cwd)}, check=False)


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses under plain python."""
    folder = tmp_path_factory.mktemp("plain")
    done = python(shrunk(corpus, folder, "plain"), folder)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(folder / "plain")]
    assert len(losses) == 3
    assert len({round(loss, 3) for loss in losses}) == 3, "steps that change nothing would hide a difference"
    return losses


@pytest.fixture(scope="module")
def cluster() -> Iterator[MiniCluster]:
    if reason := missing():
        pytest.skip(reason)
    with mini_cluster(nodes=1) as machines:
        yield machines


def assert_same_run(done: Done, folder: Path, expected: list[float]) -> None:
    assert done.returncode == 0, done.stderr
    assert [line["loss"] for line in metrics(folder)] == pytest.approx(expected, abs=5e-6)
    # Three lines written by one rank: two worlds of one would have written six, or refused each other's folder.
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]


def assert_one_error(done: Done, *parts: str) -> None:
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "megagpt: error:" in line]
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


def test_torchrun(corpus: Path, tmp_path: Path, expected: list[float]) -> None:
    assert_same_run(torchrun(shrunk(corpus, tmp_path, "run", 2), tmp_path), tmp_path / "run", expected)


def test_deepspeed(corpus: Path, tmp_path: Path, expected: list[float]) -> None:
    done = deepspeed([*shrunk(corpus, tmp_path, "run", 2), *ZERO3], tmp_path)
    assert "--local_rank=1" in done.stdout + done.stderr, "the launcher has not passed the option that is tested here"
    assert_same_run(done, tmp_path / "run", expected)


@pytest.mark.parametrize("engine", [[], ZERO3], ids=["config's engine", "zero3"])
def test_srun(engine: list[str], corpus: Path, tmp_path: Path, expected: list[float], cluster: MiniCluster) -> None:
    done = srun([*shrunk(corpus, tmp_path, "run", 2), *engine], tmp_path, cluster)
    assert_same_run(done, tmp_path / "run", expected)


def test_python_in_a_batch_script_is_a_world_of_one(
    corpus: Path, tmp_path: Path, expected: list[float], cluster: MiniCluster
) -> None:
    """There SLURM_NTASKS is 2 and nobody else comes."""
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/sh\nexec "$@"\n')
    command = ["sbatch", "--wait", "-n", "2", f"--output={tmp_path / 'output'}", str(script), sys.executable, SCRIPT]
    done = cluster.control(*command, *shrunk(corpus, tmp_path, "run"), cwd=tmp_path, env=SLURM_ENVIRONMENT, check=False)
    assert done.returncode == 0, (tmp_path / "output").read_text()
    assert_same_run(done, tmp_path / "run", expected)


@pytest.mark.parametrize("option", ["--local-rank=0", "--local_rank=0"])
def test_the_local_rank_of_older_launchers_is_accepted(
    option: str, corpus: Path, tmp_path: Path, expected: list[float]
) -> None:
    """It comes before the script's own arguments."""
    assert_same_run(python([option, *shrunk(corpus, tmp_path, "run")], tmp_path), tmp_path / "run", expected)


class TestImpossibleConfigIsOneLine:
    # Found before the ranks meet, after, and while they do.
    @pytest.mark.parametrize(
        ("overrides", "parts"),
        [
            (["train.tokns=1"], ["train.tokns", "did you mean"]),
            (["train.micro_batch=3"], ["micro_batch"]),
            pytest.param(
                ["train.device=cuda"],
                ["train.device", "train.device=cpu"],
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
            ),
        ],
        ids=["unknown key", "batch that does not divide", "absent device"],
    )
    def test_torchrun(self, overrides: list[str], parts: list[str], corpus: Path, tmp_path: Path) -> None:
        assert_one_error(torchrun([*shrunk(corpus, tmp_path, "run"), *overrides], tmp_path), "of 2] ", *parts)

    def test_deepspeed(self, corpus: Path, tmp_path: Path) -> None:
        arguments = [*shrunk(corpus, tmp_path, "run"), *ZERO3, "train.tokns=1"]
        assert_one_error(deepspeed(arguments, tmp_path), "of 2] ", "train.tokns", "did you mean")

    def test_srun(self, corpus: Path, tmp_path: Path, cluster: MiniCluster) -> None:
        arguments = [*shrunk(corpus, tmp_path, "run"), "train.micro_batch=3"]
        assert_one_error(srun(arguments, tmp_path, cluster), "of 2] ", "micro_batch")


@pytest.mark.parametrize(
    "nodes",
    ["n1", "n1,n2", "n[3-5,9]", "n[007-012,020],login", "login,n[007-012]", "rack[2-3]node[08-10]", "a-b[1]"],
)
def test_the_first_host_is_the_one_that_slurm_names(nodes: str, cluster: MiniCluster) -> None:
    shown = cluster.control("scontrol", "show", "hostnames", nodes)
    assert first_host(nodes) == shown.stdout.split()[0]
