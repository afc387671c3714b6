"""launch hosts: the hostfile, the launcher's command, and the variables that it passes on."""

import shlex
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from megagpt.cli import main
from megagpt.cluster.hosts import passed_on, read_hostfile
from tests.cluster.launching import Capture, refusal
from tests.processes import REPOSITORY

pytestmark = pytest.mark.usefixtures("elsewhere")


def hostfile(text: str) -> Path:
    path = Path("hosts")
    path.write_text(text)
    return path


def test_a_hostfile_is_read_as_deepspeed_reads_it() -> None:
    path = hostfile(
        "# all of rack 3\n\nn2 slots=8\n  n1\tslots=4  # two are broken\n\t# n3 slots=8\n10.0.0.7 slots=2\n"
    )
    assert read_hostfile(path) == dict(fetch_hostfile(str(path))) == {"n2": 8, "n1": 4, "10.0.0.7": 2}
    assert next(iter(read_hostfile(path))) == "n2", "the order is the ranks'"


@pytest.mark.parametrize(
    "line",
    ["n1", "n1 8", "n1 slots=", "n1 slots=-1", "n1 slots=0", "n1 slots=8 max_slots=8", "n1 slots = 8", "slots=8"],
)
def test_a_malformed_line_is_named(line: str, capsys: Capture) -> None:
    hostfile(f"# hosts\nn0 slots=8\n\n{line}\n")
    text = refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts")
    assert text.startswith(f"megagpt: error: hosts line 4: {line!r} ")
    assert "HOST slots=RANKS" in text


def test_a_host_named_twice_is_refused(capsys: Capture) -> None:
    hostfile("n1 slots=8\nn2 slots=8\nn1 slots=4\n")
    assert "hosts line 3: n1 is named twice" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts")


@pytest.mark.parametrize("text", ["", "\n\n", "# n1 slots=8\n"])
def test_a_hostfile_without_hosts_is_refused(text: str, capsys: Capture) -> None:
    hostfile(text)
    assert "hosts: names no host" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts")


def test_a_missing_hostfile_is_named(capsys: Capture) -> None:
    assert "absent: cannot be read" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "absent")


def test_a_batch_that_the_ranks_do_not_divide_is_refused(capsys: Capture) -> None:
    hostfile("n1 slots=8\nn2 slots=3\n")
    assert "11 rank(s)" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts", "--print")


def test_groups_of_tensor_ranks_stay_on_a_host(capsys: Capture) -> None:
    hostfile("n1 slots=4\nn2 slots=2\nn3 slots=2\n")
    job = ["hosts", "gpt3_xl.yaml", "--hostfile", "hosts", "--print", "engine.name=fsdp", "train.micro_batch=1"]
    line = refusal(capsys, *job, "engine.tensor_ranks=4")
    assert "ranks 4 to 7 are on n2 and n3" in line
    assert "set engine.tensor_ranks=2, or start a multiple of 4 ranks on each machine" in line
    assert main(["launch", *job, "engine.tensor_ranks=2"]) == 0


def test_the_launchers_command_is_printed(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    hostfile("n1 slots=8\nn2 slots=8\n")
    sources = "data.sources=[{path: a b}]"
    assert main(["launch", "hosts", "gpt3_xl.yaml", "--hostfile", "hosts", "--at", "0", "--print", sources]) == 0
    first, *variables, command = capsys.readouterr().out.splitlines()
    assert first == "# on all hosts:"
    assert "NCCL_SOCKET_IFNAME=eth0" in variables
    assert not [line for line in variables if line.startswith("SLURM_")]
    launcher, *arguments = shlex.split(command)
    assert Path(launcher).name == "deepspeed"
    assert arguments == [
        f"--hostfile={tmp_path / 'hosts'}", "--force_multi", "--master_addr=n1", "--master_port=29500",
        str(REPOSITORY / "launch" / "train.py"), "gpt3_xl.yaml", sources, "--at=0", "--auto-resume",
    ]  # fmt: skip


def test_address_and_port_of_the_first_host_can_be_set(capsys: Capture) -> None:
    hostfile("n1 slots=8\nn2 slots=8\n")
    command = ["launch", "hosts", "gpt3_xl.yaml", "--hostfile", "hosts", "--print"]
    assert main([*command, "--master", "10.0.0.1", "--port", "4711"]) == 0
    printed = capsys.readouterr().out
    assert " --master_addr=10.0.0.1 --master_port=4711 " in printed


def test_without_pdsh_nothing_starts(capsys: Capture) -> None:
    hostfile("n1 slots=8\nn2 slots=8\n")
    assert "no pdsh here" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts")
    assert not Path("runs").exists()


def test_variables_of_network_and_computation_are_passed_on() -> None:
    variables = {
        "NCCL_IB_HCA": "mlx5", "GLOO_SOCKET_IFNAME": "eth0", "UCX_TLS": "rc", "FI_PROVIDER": "efa",
        "OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "8", "LD_LIBRARY_PATH": "/opt/lib", "TORCH_NCCL_TIMEOUT": "1",
        "TRITON_CACHE_DIR": "/tmp/a b", "HF_HOME": "/shared", "DS_ACCELERATOR": "cpu", "XDG_CACHE_HOME": "/c",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }  # fmt: skip
    assert passed_on(variables) == variables


@pytest.mark.parametrize(
    "name",
    [
        "HOME", "PATH", "USER", "PWD", "TMPDIR", "SSH_AUTH_SOCK", "SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "WORLD_SIZE",
        "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "AWS_SECRET_ACCESS_KEY", "MY_NCCL_DEBUG",
    ],
)  # fmt: skip
def test_variables_of_one_host_or_process_are_not_passed_on(name: str) -> None:
    assert passed_on({name: "x"}) == {}


def test_secrets_are_not_written_into_the_shared_folder() -> None:
    assert passed_on({"HF_TOKEN": "hf_x", "HF_HOME": "/shared"}) == {"HF_HOME": "/shared"}


def test_values_of_several_lines_are_left_out() -> None:
    assert passed_on({"NCCL_A": "1\n2", "NCCL_B": "3"}) == {"NCCL_B": "3"}


def test_the_users_own_environment_file_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "hosts").write_text("n1 slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("WANTED=by the user")
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "hosts", "gpt2_124m.yaml", "--hostfile", "hosts", "--print"]) == 0
    assert "WANTED=by the user\n" in capsys.readouterr().out
