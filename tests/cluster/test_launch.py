"""The commands that start runs on many machines: what they say, what they refuse, and what they carry over."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from megagpt.cli import main
from megagpt.cluster import scripts
from megagpt.cluster.hosts import carried, read_hostfile
from megagpt.cluster.scripts import find_script
from megagpt.errors import UserError
from tests.processes import REPOSITORY

Capture = pytest.CaptureFixture[str]
SCRIPT = str(REPOSITORY / "launch" / "multinode.sh")
PRESETS = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the repository, and with nothing of a cluster on the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def program(name: str, script: str) -> None:
    """Put a shell script on the path."""
    path = Path("bin") / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def slurm(capsys: Capture, *arguments: str) -> list[str]:
    """The command that `launch slurm` prints, as a shell takes it apart."""
    assert main(["launch", "slurm", *arguments]) == 0
    comment, command = capsys.readouterr().out.splitlines()
    assert comment.startswith("# ")
    return shlex.split(command)


def refusal(capsys: Capture, *arguments: str) -> str:
    """The one line by which `launch` refuses."""
    assert main(["launch", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megagpt: error: ")
    return line


# --- slurm ---


def test_the_command_has_the_runs_name_and_its_nodes(capsys: Capture) -> None:
    command = slurm(capsys, "gpt3_xl.yaml", "--nodes", "4", "--gpus-per-node", "4", "run.name=a b")
    assert command[0] == "sbatch"
    assert {"--job-name=a b", "--nodes=4", "--gpus-per-node=4", "--dependency=singleton"} <= set(command)
    assert command[-3:] == [SCRIPT, "gpt3_xl.yaml", "run.name=a b"]


def test_a_run_without_a_name_is_called_as_its_config(capsys: Capture) -> None:
    assert "--job-name=gpt3_xl" in slurm(capsys, "gpt3_xl.yaml", "--nodes", "1")


def test_options_of_sbatch_come_last_so_that_they_win(capsys: Capture) -> None:
    command = slurm(
        capsys, "gpt3_xl.yaml", "--nodes", "2", "--time", "2-00:00:00", "--account", "me", "--partition", "gpu",
        "--sbatch=--signal=USR1@900", "--sbatch=--exclude=n[3-5]",
    )  # fmt: skip
    script = command.index(SCRIPT)
    theirs = [
        "--time=2-00:00:00", "--account=me", "--partition=gpu", "--signal=USR1@900", "--exclude=n[3-5]",
    ]  # fmt: skip
    assert command[script - 5 : script] == theirs
    assert not [option for option in command[script:] if option.startswith("--")]


def test_what_is_not_said_is_left_to_the_scripts_header(capsys: Capture) -> None:
    command = slurm(capsys, "gpt3_xl.yaml", "--nodes", "2")
    assert not [option for option in command if re.match("--(time|account|partition|gpu-memory)", option)]


def test_an_argument_with_blanks_and_brackets_survives_the_shell(capsys: Capture) -> None:
    sources = "data.sources=[{path: a b}]"
    command = slurm(capsys, "gpt3_xl.yaml", sources, "--nodes", "2", "run.folder=/runs/it's mine")
    assert command[command.index(SCRIPT) + 1 :] == ["gpt3_xl.yaml", sources, "run.folder=/runs/it's mine"]


def test_a_checkpoint_that_takes_long_to_write_is_begun_earlier(capsys: Capture) -> None:
    def ahead(config: str, nodes: int) -> int:
        (option,) = [o for o in slurm(capsys, config, "--nodes", str(nodes)) if o.startswith("--signal=USR1@")]
        return int(option.partition("@")[2])

    assert ahead("gpt3_125m.yaml", 1) == 300, "as in the script's header"
    # 12 bytes of each of 12.9e9 parameters, at 250 MB/s.
    assert ahead("gpt3_13b.yaml", 1) > 12 * 12.8e9 / 250e6
    assert ahead("gpt3_13b.yaml", 4) == 300


def test_micro_batches_and_memory_are_said(capsys: Capture) -> None:
    """A batch of 2^20 tokens is 512 samples of 2,048; fp32 weights, gradients and both moments are 16 bytes each."""
    command = ["train.batch_tokens=1048576", "train.micro_batch=4", "train.batch_ramp_start=0"]
    command += ["train.batch_ramp_tokens=0", "engine.name=fsdp"]
    assert main(["launch", "slurm", "gpt3_13b.yaml", "--nodes", "4", *command]) == 0
    comment = capsys.readouterr().out.splitlines()[0]
    assert comment.startswith("# 32 ranks, 4 micro-batch(es) of 4 a step and rank; ")
    (gigabytes,) = re.findall(r"([\d.]+) GB of each GPU", comment)
    assert float(gigabytes) == pytest.approx(16 * 12.85 / 32, rel=0.02)


def test_a_batch_that_does_not_divide_is_refused(capsys: Capture) -> None:
    line = refusal(capsys, "slurm", "gpt3_xl.yaml", "--nodes", "3", "--gpus-per-node", "8")
    assert "24 rank(s)" in line
    assert re.search(r"use train\.batch_tokens \d+", line)


def test_a_model_that_does_not_fit_is_refused_with_a_way_out_that_works(capsys: Capture) -> None:
    job = ["slurm", "gpt3_175b.yaml", "--nodes", "64", "--gpu-memory", "80"]
    line = refusal(capsys, *job, "engine.name=ddp")
    assert "gpt3_175b does not fit on 512 GPU(s)" in line
    (gigabytes,) = re.findall(r"take ([\d.]+) GB of each GPU", line)
    assert float(gigabytes) == pytest.approx(16 * 175, rel=0.01)
    assert "of 80 GB; shard it: engine.name=fsdp" in line
    assert main(["launch", *job, "engine.name=fsdp"]) == 0


def test_a_model_that_is_sharded_over_too_few_is_refused_with_a_way_out_that_works(capsys: Capture) -> None:
    """16 bytes of 12.85e9 parameters over one node's 8 GPUs are 26 GB, over 32 GPUs 6 GB."""
    job = ["slurm", "gpt3_13b.yaml", "--nodes", "4", "--gpu-memory", "24", "engine.name=fsdp"]
    assert "engine.shard_ranks" in refusal(capsys, *job, "engine.shard_ranks=8")
    assert main(["launch", *job, "engine.shard_ranks=0"]) == 0


def test_a_zero_stage_that_leaves_too_much_is_refused_with_a_way_out_that_works(capsys: Capture) -> None:
    job = ["slurm", "gpt3_13b.yaml", "--nodes", "4", "--gpu-memory", "24", "engine.name=zero"]
    assert "engine.stage=3" in refusal(capsys, *job, "engine.stage=1")
    assert main(["launch", *job, "engine.stage=3"]) == 0


def test_what_is_offloaded_takes_no_gpu_memory(capsys: Capture) -> None:
    job = ["slurm", "gpt3_13b.yaml", "--nodes", "1", "--gpu-memory", "24", "engine.name=fsdp"]
    assert "engine.offload" in refusal(capsys, *job)
    assert main(["launch", *job, "engine.offload=all"]) == 0


def test_where_the_gpus_memory_is_not_known_what_no_gpu_holds_is_refused(capsys: Capture) -> None:
    assert "the largest known one" in refusal(capsys, "slurm", "gpt3_13b.yaml", "--nodes", "1", "engine.name=ddp")
    assert main(["launch", "slurm", "gpt3_6.7b.yaml", "--nodes", "1", "engine.name=ddp"]) == 0


@pytest.mark.parametrize("gpus", [8, 64, 512])
@pytest.mark.parametrize("config", PRESETS)
def test_each_config_starts_on_each_size_or_says_why_not(config: str, gpus: int, capsys: Capture) -> None:
    code = main(["launch", "slurm", config, "--nodes", str(gpus // 8)])
    printed = capsys.readouterr()
    if code == 0:
        command = shlex.split(printed.out.splitlines()[-1])
        assert command[0] == "sbatch"
        assert f"--nodes={gpus // 8}" in command
        assert f"# {gpus} ranks" in printed.out
    else:
        assert code == 2
        (line,) = printed.err.splitlines()
        assert re.search(rf"train\.batch_tokens .* {gpus} rank\(s\)|does not fit on {gpus} GPU\(s\).* GB of each", line)


def test_two_configs_are_refused(capsys: Capture) -> None:
    assert "name one config" in refusal(capsys, "slurm", "gpt3_xl.yaml", "gpt3_13b.yaml", "--nodes", "1")


def test_submit_without_sbatch_is_one_line(capsys: Capture) -> None:
    assert "no sbatch here" in refusal(capsys, "slurm", "gpt3_xl.yaml", "--nodes", "2", "--submit")


def test_submit_calls_sbatch_with_what_is_printed(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON", raising=False)
    program("sbatch", 'printf "%s\\0" "$@" > arguments; printf "%s" "$PYTHON" > python')
    command = slurm(capsys, "gpt3_xl.yaml", "data.sources=[{path: a b}]", "--nodes", "2", "--submit")
    assert Path("arguments").read_text().split("\0")[:-1] == command[1:]
    assert Path("python").read_text() == sys.executable


def test_a_python_that_is_set_stays(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", "/shared/python")
    program("sbatch", 'printf "%s" "$PYTHON" > python')
    slurm(capsys, "gpt3_xl.yaml", "--nodes", "2", "--submit")
    assert Path("python").read_text() == "/shared/python"


def test_sbatchs_refusal_is_the_commands(capsys: Capture) -> None:
    program("sbatch", "exit 3")
    assert main(["launch", "slurm", "gpt3_xl.yaml", "--nodes", "2", "--submit"]) == 3


def test_nothing_is_submitted_that_was_refused(capsys: Capture) -> None:
    program("sbatch", "echo > submitted")
    refusal(capsys, "slurm", "gpt3_xl.yaml", "--nodes", "3", "--submit")
    assert not Path("submitted").exists()


# --- hosts ---


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
def test_a_line_that_names_no_host_and_ranks_is_named(line: str, capsys: Capture) -> None:
    hostfile(f"# hosts\nn0 slots=8\n\n{line}\n")
    text = refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts")
    assert text.startswith(f"megagpt: error: hosts line 4: {line!r} ")
    assert "HOST slots=RANKS" in text


def test_a_host_that_is_named_twice_is_refused(capsys: Capture) -> None:
    hostfile("n1 slots=8\nn2 slots=8\nn1 slots=4\n")
    assert "hosts line 3: n1 is named twice" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts")


@pytest.mark.parametrize("text", ["", "\n\n", "# n1 slots=8\n"])
def test_a_hostfile_without_hosts_is_refused(text: str, capsys: Capture) -> None:
    hostfile(text)
    assert "hosts: names no host" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts")


def test_a_hostfile_that_is_not_there_is_named(capsys: Capture) -> None:
    assert "absent: cannot be read" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "absent")


def test_a_batch_that_the_hosts_ranks_do_not_divide_is_refused(capsys: Capture) -> None:
    hostfile("n1 slots=8\nn2 slots=3\n")
    assert "11 rank(s)" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts", "--print")


def test_the_launchers_command_is_printed(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    hostfile("n1 slots=8\nn2 slots=8\n")
    sources = "data.sources=[{path: a b}]"
    assert main(["launch", "hosts", "gpt3_xl.yaml", "--hostfile", "hosts", "--print", sources]) == 0
    first, *variables, command = capsys.readouterr().out.splitlines()
    assert first == "# on all hosts:"
    assert "NCCL_SOCKET_IFNAME=eth0" in variables
    assert not [line for line in variables if line.startswith("SLURM_")]
    launcher, *arguments = shlex.split(command)
    assert Path(launcher).name == "deepspeed"
    assert arguments == [
        f"--hostfile={tmp_path / 'hosts'}", "--force_multi", "--master_addr=n1", "--master_port=29500",
        str(REPOSITORY / "launch" / "train.py"), "gpt3_xl.yaml", sources, "--auto-resume",
    ]  # fmt: skip


def test_address_and_port_of_the_first_host_may_be_said(capsys: Capture) -> None:
    hostfile("n1 slots=8\nn2 slots=8\n")
    command = ["launch", "hosts", "gpt3_xl.yaml", "--hostfile", "hosts", "--print"]
    assert main([*command, "--master", "10.0.0.1", "--port", "4711"]) == 0
    printed = capsys.readouterr().out
    assert " --master_addr=10.0.0.1 --master_port=4711 " in printed


def test_without_pdsh_nothing_starts(capsys: Capture) -> None:
    hostfile("n1 slots=8\nn2 slots=8\n")
    assert "no pdsh here" in refusal(capsys, "hosts", "gpt3_xl.yaml", "--hostfile", "hosts")
    assert not Path("runs").exists()


def test_what_decides_how_ranks_meet_and_compute_is_carried_over() -> None:
    variables = {
        "NCCL_IB_HCA": "mlx5", "GLOO_SOCKET_IFNAME": "eth0", "UCX_TLS": "rc", "FI_PROVIDER": "efa",
        "OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "8", "LD_LIBRARY_PATH": "/opt/lib", "TORCH_NCCL_TIMEOUT": "1",
        "TRITON_CACHE_DIR": "/tmp/a b", "HF_HOME": "/shared", "DS_ACCELERATOR": "cpu", "XDG_CACHE_HOME": "/c",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }  # fmt: skip
    assert carried(variables) == variables


@pytest.mark.parametrize(
    "name",
    [
        "HOME", "PATH", "USER", "PWD", "TMPDIR", "SSH_AUTH_SOCK", "SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "WORLD_SIZE",
        "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "AWS_SECRET_ACCESS_KEY", "MY_NCCL_DEBUG",
    ],
)  # fmt: skip
def test_what_belongs_to_one_host_or_process_stays_there(name: str) -> None:
    assert carried({name: "x"}) == {}


def test_a_secret_is_not_written_into_the_shared_folder() -> None:
    assert carried({"HF_TOKEN": "hf_x", "HF_HOME": "/shared"}) == {"HF_HOME": "/shared"}


def test_a_value_of_several_lines_is_left_out_of_a_file_of_lines() -> None:
    assert carried({"NCCL_A": "1\n2", "NCCL_B": "3"}) == {"NCCL_B": "3"}


# --- scripts ---


@pytest.mark.parametrize("name", ["multinode.sh", "train.py"])
def test_scripts_are_found_from_anywhere(name: str) -> None:
    assert find_script(name) == REPOSITORY / "launch" / name


def test_scripts_are_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "megagpt"
    (package / "launch").mkdir(parents=True)
    (package / "launch" / "multinode.sh").touch()
    monkeypatch.setattr(scripts, "__file__", str(package / "cluster" / "scripts.py"))
    assert find_script("multinode.sh") == package / "launch" / "multinode.sh"


def test_a_script_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"launch/absent\.sh is neither"):
        find_script("absent.sh")


# --- check ---


def test_check_outside_of_a_job_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKS_PER_NODE", "8")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert "not inside a Slurm job" in refusal(capsys, "check", "gpt3_xl.yaml")


def test_check_refuses_a_batch_that_the_jobs_nodes_do_not_divide(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("scontrol", 'printf "n1\\nn2\\nn3\\n"')
    monkeypatch.setenv("MASTER_PORT", "20123")
    monkeypatch.setenv("RANKS_PER_NODE", "8")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    assert "24 rank(s)" in refusal(capsys, "check", "gpt3_xl.yaml")
    assert not Path("runs").exists()


def test_options_of_train_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", "slurm", "gpt2_124m.yaml", "--nodes", "1", "--allow-recipe-change", "train.micro_batch=4"]
    assert main(arguments) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[-3:] == ["gpt2_124m.yaml", "train.micro_batch=4", "--allow-recipe-change"]


def test_what_the_users_own_environment_file_says_is_carried_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("n1 slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("WANTED=by the user")
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "hosts", "gpt2_124m.yaml", "--hostfile", "hosts", "--print"]) == 0
    assert "WANTED=by the user\n" in capsys.readouterr().out


def test_a_verdict_outside_a_job_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["launch", "verdict", "gpt2_124m.yaml", "--logs", "logs"]) == 2
    assert "not inside a Slurm job" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "logs").exists()
