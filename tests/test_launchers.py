"""One training script under every launcher: plain python, torchrun, deepspeed and srun, each of them the real one."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megagpt.cli import make_parser
from megagpt.commands.options import parse
from megagpt.launchers import first_host
from tests.conftest import metrics
from tests.minicluster import MiniCluster, end_processes, mini_cluster, missing
from tests.processes import REPOSITORY, environment, free_port, megagpt, start_ranks, torchrun_command
from tests.runs import PATIENCE, assert_one_error, logs, losses, shrunk

# One group: all of it is compared with one run.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launchers")]

SCRIPT = str(REPOSITORY / "launch" / "train.py")
ZERO3 = ["engine.name=zero", "engine.stage=3"]
Done = subprocess.CompletedProcess[str]
SLURM_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def arguments_of(corpus: Path, folder: Path, micro_batch: int = 2) -> list[str]:
    """GPT-3 XL as a run of three steps of four sequences, below `folder`/runs."""
    name = [f"run.folder={folder / 'runs'}", "run.name=run", f"train.micro_batch={micro_batch}"]
    return ["--config", "gpt3_xl.yaml", *shrunk(corpus), *name]


def run(command: list[str], cwd: Path) -> Done:
    """Run a launcher; ranks that outlive it are ended."""
    variables = {**environment(), "TEST_FOLDER": str(cwd)}
    try:
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=300)
    finally:
        end_processes("TEST_FOLDER", str(cwd))


def srun(arguments: list[str], cwd: Path, cluster: MiniCluster) -> Done:
    command = ["srun", "-n", "2", sys.executable, SCRIPT, *arguments]
    return cluster.control(*command, cwd=cwd, env={**SLURM_ENVIRONMENT, "TEST_FOLDER": str(cwd)}, check=False)


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("plain")
    done = megagpt("train", *arguments_of(corpus, folder, micro_batch=4), cwd=folder)
    assert done.returncode == 0, done.stderr
    found = losses(folder / "runs" / "run")
    assert len(found) == 3
    assert len({round(loss, 3) for loss in found}) == 3, "steps that change nothing would hide a difference"
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[MiniCluster]:
    if reason := missing():
        pytest.skip(reason)
    with mini_cluster(nodes=1) as machines:
        yield machines


def assert_same_run(done: Done, folder: Path, expected: list[float]) -> None:
    assert done.returncode == 0, done.stderr
    steps = metrics(folder / "runs" / "run")
    assert [line["loss"] for line in steps] == pytest.approx(expected, abs=5e-6)
    # Three lines written by one rank: two worlds of one would have written six, or refused each other's folder.
    assert [line["step"] for line in steps] == [1, 2, 3]


def test_python_and_torchrun_train_the_same_run(corpus: Path, tmp_path: Path, expected: list[float]) -> None:
    for name, launcher, micro_batch in (("python", [sys.executable], 4), ("torchrun", torchrun_command(2), 2)):
        done = run([*launcher, SCRIPT, *arguments_of(corpus, tmp_path / name, micro_batch)], tmp_path)
        assert_same_run(done, tmp_path / name, expected)


def test_deepspeed_trains_the_same_run(corpus: Path, tmp_path: Path, expected: list[float]) -> None:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    command = [*launcher, f"--master_port={free_port()}", SCRIPT, *arguments_of(corpus, tmp_path), *ZERO3]
    done = run(command, tmp_path)
    assert "--local_rank=1" in done.stdout + done.stderr, "the launcher has not passed the option that is tested here"
    assert_same_run(done, tmp_path, expected)


@pytest.mark.parametrize("option", ["--local-rank=0", "--local_rank=0"])
def test_the_local_rank_of_older_launchers_is_accepted(option: str) -> None:
    """It comes before the script's own arguments, and changes nothing."""
    words = ["--config", "gpt3_xl.yaml", "train.tokens=192"]
    found, usual = (vars(parse(make_parser(), ["train", *given, *words])) for given in ([option], []))
    assert found.pop("local_rank") == 0
    assert usual.pop("local_rank") is None
    assert found.pop("parser").prog == usual.pop("parser").prog
    assert found == usual


# --- an impossible config is one line of one rank ---

# Found before the ranks meet, after, and while they do.
IMPOSSIBLE = [
    pytest.param(["train.tokns=1"], ["train.tokns", "did you mean"], id="unknown key"),
    pytest.param(["train.micro_batch=3"], ["micro_batch"], id="batch that does not divide"),
    pytest.param(
        ["train.device=cuda"],
        ["train.device", "train.device=cpu"],
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        id="absent device",
    ),
]


@pytest.mark.parametrize(("overrides", "parts"), IMPOSSIBLE)
def test_an_impossible_config_is_one_line(overrides: list[str], parts: list[str], corpus: Path, tmp_path: Path) -> None:
    """Without a launcher, which would end ranks by itself."""
    ranks = start_ranks(2, [*arguments_of(corpus, tmp_path), *overrides], tmp_path)
    assert [rank.wait(PATIENCE) for rank in ranks] == [2, 2]
    assert_one_error(logs(tmp_path), "of 2] ", *parts)


def test_an_impossible_config_is_one_line_under_torchrun(corpus: Path, tmp_path: Path) -> None:
    """The launcher's own process holds the store, and prints a summary of its own."""
    done = run([*torchrun_command(2), SCRIPT, *arguments_of(corpus, tmp_path), "train.tokns=1"], tmp_path)
    assert done.returncode != 0
    assert_one_error(done.stdout + done.stderr, "of 2] ", "train.tokns", "did you mean")


# --- Slurm ---


@pytest.mark.cluster
@pytest.mark.parametrize("engine", [[], ZERO3], ids=["config's engine", "zero3"])
def test_srun_trains_the_same_run(
    engine: list[str], corpus: Path, tmp_path: Path, expected: list[float], cluster: MiniCluster
) -> None:
    assert_same_run(srun([*arguments_of(corpus, tmp_path), *engine], tmp_path, cluster), tmp_path, expected)


@pytest.mark.cluster
def test_python_in_a_batch_script_is_alone(
    corpus: Path, tmp_path: Path, expected: list[float], cluster: MiniCluster
) -> None:
    """There SLURM_NTASKS is 2 and nobody else comes."""
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/sh\nexec "$@"\n')
    command = ["sbatch", "--wait", "-n", "2", f"--output={tmp_path / 'output'}", str(script), sys.executable, SCRIPT]
    arguments = arguments_of(corpus, tmp_path, micro_batch=4)
    done = cluster.control(*command, *arguments, cwd=tmp_path, env=SLURM_ENVIRONMENT, check=False)
    assert done.returncode == 0, (tmp_path / "output").read_text()
    assert_same_run(done, tmp_path, expected)


@pytest.mark.cluster
def test_an_impossible_config_is_one_line_under_srun(corpus: Path, tmp_path: Path, cluster: MiniCluster) -> None:
    done = srun([*arguments_of(corpus, tmp_path), "train.micro_batch=3"], tmp_path, cluster)
    assert done.returncode != 0
    assert_one_error(done.stdout + done.stderr, "of 2] ", "micro_batch")


@pytest.mark.cluster
@pytest.mark.parametrize(
    "nodes",
    ["n1", "n1,n2", "n[3-5,9]", "n[007-012,020],login", "login,n[007-012]", "rack[2-3]node[08-10]", "a-b[1]"],
)
def test_the_first_host_is_the_one_that_slurm_names(nodes: str, cluster: MiniCluster) -> None:
    shown = cluster.control("scontrol", "show", "hostnames", nodes)
    assert first_host(nodes) == shown.stdout.split()[0]
