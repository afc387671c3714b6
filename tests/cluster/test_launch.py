"""The scripts of launch/, and the commands that launch/multinode.sh runs inside a job."""

from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.commands import launch
from megagpt.errors import UserError
from megagpt.incarnations import claim, list_incarnations
from tests.cluster.job import END, RETRY, TOKENS
from tests.cluster.launching import Capture, program, refusal
from tests.conftest import write_tiny
from tests.processes import REPOSITORY

pytestmark = pytest.mark.usefixtures("elsewhere")

# --- scripts ---


@pytest.mark.parametrize("name", ["multinode.sh", "train.py"])
def test_scripts_are_found_from_anywhere(name: str) -> None:
    assert launch.find_script(name) == REPOSITORY / "launch" / name


def test_scripts_are_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "megagpt"
    (package / "launch").mkdir(parents=True)
    (package / "launch" / "multinode.sh").touch()
    monkeypatch.setattr(launch, "__file__", str(package / "commands" / "launch.py"))
    assert launch.find_script("multinode.sh") == package / "launch" / "multinode.sh"


def test_a_missing_script_is_named() -> None:
    with pytest.raises(UserError, match=r"launch/absent\.sh is neither"):
        launch.find_script("absent.sh")


# --- check ---


def test_check_outside_of_a_job_is_refused_in_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKS_PER_NODE", "8")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert "not inside a Slurm job" in refusal(capsys, "check", "gpt3_xl.yaml")


def test_check_refuses_a_run_that_does_not_suit_the_nodes(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    program("scontrol", 'printf "n1\\nn2\\nn3\\n"')
    monkeypatch.setenv("MASTER_PORT", "20123")
    monkeypatch.setenv("RANKS_PER_NODE", "8")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    assert "24 rank(s)" in refusal(capsys, "check", "gpt3_xl.yaml")
    monkeypatch.setenv("RANKS_PER_NODE", "2")
    program("scontrol", 'printf "n1\\nn2\\n"')
    groups = ["engine.name=fsdp", "engine.tensor_ranks=4", "train.micro_batch=1"]
    assert "ranks 0 to 3 are on n1 and n2" in refusal(capsys, "check", "gpt3_xl.yaml", *groups)
    assert not Path("runs").exists()


@pytest.fixture
def slurm_job(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of job 7 after a requeue."""
    program("scontrol", 'printf "n1\\nn2\\n"')
    variables = {"SLURM_JOB_ID": 7, "SLURM_RESTART_COUNT": 1, "RANKS_PER_NODE": 1, "MASTER_PORT": 20123}
    for name, value in {**variables, "SLURM_JOB_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("slurm_job")
def test_check_of_a_finished_run_prints_no_folder(tmp_path: Path, capsys: Capture) -> None:
    config = str(write_tiny(tmp_path, tmp_path / "corpus", train={"micro_batch": 2}))
    claim(tmp_path / "runs" / "tiny", {"job": "6.0"}).end("finished", "the last token", TOKENS)
    assert main(["launch", "check", config]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("== ")
    assert "finished already" in printed.err
    program("srun", "exit 1")
    assert main(["launch", "check", config, "--at", "640"]) == RETRY
    assert "finished already" not in capsys.readouterr().err, "it is to go back"


@pytest.mark.usefixtures("slurm_job")
def test_unfit_nodes_after_a_requeue_are_retried_once(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("srun", "exit 1")
    config = str(write_tiny(tmp_path, tmp_path / "corpus", train={"micro_batch": 2}))
    codes = []
    for restart in ("1", "2"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        codes.append(main(["launch", "check", config]))
    assert codes == [RETRY, END]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "== first to fail: " in printed.err
    assert "2 of 2 node(s) are not fit" in printed.err
    starts = list_incarnations(tmp_path / "runs" / "tiny")
    assert [start.start()["job"] for start in starts] == ["7.1", "7.2"]
    assert [(start.ended()["outcome"], start.ended()["retry"]) for start in starts] == [("failed", True)] * 2


@pytest.mark.usefixtures("slurm_job")
def test_unfit_nodes_at_the_first_start_end_the_job(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    program("srun", "exit 1")
    assert main(["launch", "check", str(write_tiny(tmp_path, tmp_path / "corpus", train={"micro_batch": 2}))]) == 2
    assert capsys.readouterr().err.startswith("megagpt: error: 2 of 2 node(s) are not fit")


def test_a_verdict_outside_a_job_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["launch", "verdict", "gpt2_124m.yaml", "--logs", "logs"]) == 2
    assert "not inside a Slurm job" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "logs").exists()
