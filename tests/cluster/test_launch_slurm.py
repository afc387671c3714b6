"""launch slurm: the sbatch command, and the runs that it refuses."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from megagpt.cli import main
from tests.cluster.launching import Capture, program, refusal
from tests.processes import REPOSITORY

SCRIPT = str(REPOSITORY / "launch" / "multinode.sh")
PRESETS = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml"))

pytestmark = pytest.mark.usefixtures("elsewhere")


def slurm(capsys: Capture, *arguments: str) -> list[str]:
    """The command that `launch slurm` prints, as a shell splits it."""
    assert main(["launch", "slurm", *arguments]) == 0
    comment, command = capsys.readouterr().out.splitlines()
    assert comment.startswith("# ")
    return shlex.split(command)


def test_the_command_has_the_runs_name_and_its_nodes(capsys: Capture) -> None:
    command = slurm(capsys, "gpt3_xl.yaml", "--nodes", "4", "--gpus-per-node", "4", "run.name=a b")
    assert command[0] == "sbatch"
    assert {"--job-name=a b", "--nodes=4", "--gpus-per-node=4", "--dependency=singleton"} <= set(command)
    assert command[-3:] == [SCRIPT, "gpt3_xl.yaml", "run.name=a b"]


def test_a_run_without_a_name_has_its_configs_name(capsys: Capture) -> None:
    assert "--job-name=gpt3_xl" in slurm(capsys, "gpt3_xl.yaml", "--nodes", "1")


def test_options_of_sbatch_come_last_and_override(capsys: Capture) -> None:
    command = slurm(
        capsys, "gpt3_xl.yaml", "--nodes", "2", "--time", "2-00:00:00", "--account", "me", "--partition", "gpu",
        "--sbatch=--signal=USR1@900", "--sbatch=--exclude=n[3-5]",
    )  # fmt: skip
    script = command.index(SCRIPT)
    last = [
        "--time=2-00:00:00", "--account=me", "--partition=gpu", "--signal=USR1@900", "--exclude=n[3-5]",
    ]  # fmt: skip
    assert command[script - 5 : script] == last
    assert not [option for option in command[script:] if option.startswith("--")]


def test_options_not_given_are_left_to_the_scripts_header(capsys: Capture) -> None:
    command = slurm(capsys, "gpt3_xl.yaml", "--nodes", "2")
    assert not [option for option in command if re.match("--(time|account|partition|gpu-memory)", option)]


def test_arguments_with_blanks_and_brackets_are_quoted(capsys: Capture) -> None:
    sources = "data.sources=[{path: a b}]"
    command = slurm(capsys, "gpt3_xl.yaml", sources, "--nodes", "2", "run.folder=/runs/it's mine")
    assert command[command.index(SCRIPT) + 1 :] == ["gpt3_xl.yaml", sources, "run.folder=/runs/it's mine"]


def test_a_long_save_is_signalled_earlier(capsys: Capture) -> None:
    def ahead(config: str, nodes: int) -> int:
        (option,) = [o for o in slurm(capsys, config, "--nodes", str(nodes)) if o.startswith("--signal=USR1@")]
        return int(option.partition("@")[2])

    assert ahead("gpt3_125m.yaml", 1) == 300, "as in the script's header"
    # 12 bytes of each of 12.9e9 parameters, at 250 MB/s.
    assert ahead("gpt3_13b.yaml", 1) > 12 * 12.8e9 / 250e6
    assert ahead("gpt3_13b.yaml", 4) == 300


def test_micro_batches_and_memory_are_printed(capsys: Capture) -> None:
    """A batch of 2^20 tokens is 512 sequences of 2,048; fp32 weights, gradients and both moments are 16 bytes each."""
    command = ["train.batch_tokens=1048576", "train.micro_batch=4", "train.batch_ramp_start=0"]
    command += ["train.batch_ramp_tokens=0", "engine.name=fsdp"]
    assert main(["launch", "slurm", "gpt3_13b.yaml", "--nodes", "4", *command]) == 0
    comment = capsys.readouterr().out.splitlines()[0]
    assert comment.startswith("# 32 ranks, 4 micro-batch(es) of 4 per step and rank; ")
    (gigabytes,) = re.findall(r"([\d.]+) GB of each GPU", comment)
    assert float(gigabytes) == pytest.approx(16 * 12.85 / 32, rel=0.02)


def test_a_batch_that_does_not_divide_is_refused(capsys: Capture) -> None:
    line = refusal(capsys, "slurm", "gpt3_xl.yaml", "--nodes", "3", "--gpus-per-node", "8")
    assert "24 rank(s)" in line
    assert re.search(r"use train\.batch_tokens \d+", line)


def test_a_model_too_large_is_refused_with_a_way_that_works(capsys: Capture) -> None:
    job = ["slurm", "gpt3_175b.yaml", "--nodes", "64", "--gpu-memory", "80"]
    line = refusal(capsys, *job, "engine.name=ddp")
    assert "gpt3_175b does not fit on 512 GPU(s)" in line
    (gigabytes,) = re.findall(r"take ([\d.]+) GB of each GPU", line)
    assert float(gigabytes) == pytest.approx(16 * 175, rel=0.01)
    assert "of 80 GB; shard it: engine.name=fsdp" in line
    assert main(["launch", *job, "engine.name=fsdp"]) == 0


def test_too_few_sharing_ranks_are_refused_with_a_way_that_works(capsys: Capture) -> None:
    """16 bytes of 12.85e9 parameters over one node's 8 GPUs are 26 GB, over 32 GPUs 6 GB."""
    job = ["slurm", "gpt3_13b.yaml", "--nodes", "4", "--gpu-memory", "24", "engine.name=fsdp"]
    assert "engine.shard_ranks" in refusal(capsys, *job, "engine.shard_ranks=8")
    assert main(["launch", *job, "engine.shard_ranks=0"]) == 0


def test_too_low_a_stage_is_refused_with_a_way_that_works(capsys: Capture) -> None:
    job = ["slurm", "gpt3_13b.yaml", "--nodes", "4", "--gpu-memory", "24", "engine.name=zero"]
    assert "engine.stage=3" in refusal(capsys, *job, "engine.stage=1")
    assert main(["launch", *job, "engine.stage=3"]) == 0


def test_offloaded_state_takes_no_gpu_memory(capsys: Capture) -> None:
    job = ["slurm", "gpt3_13b.yaml", "--nodes", "1", "--gpu-memory", "24", "engine.name=fsdp"]
    assert "engine.offload" in refusal(capsys, *job)
    assert main(["launch", *job, "engine.offload=all"]) == 0


def test_the_largest_known_gpu_is_the_default_limit(capsys: Capture) -> None:
    assert "which the largest known GPU has" in refusal(
        capsys, "slurm", "gpt3_175b.yaml", "--nodes", "1", "engine.name=ddp"
    )
    assert main(["launch", "slurm", "gpt3_13b.yaml", "--nodes", "1", "engine.name=ddp"]) == 0


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


def test_submit_calls_sbatch_with_the_printed_arguments(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON", raising=False)
    program("sbatch", 'printf "%s\\0" "$@" > arguments; printf "%s" "$PYTHON" > python')
    command = slurm(capsys, "gpt3_xl.yaml", "data.sources=[{path: a b}]", "--nodes", "2", "--submit")
    assert Path("arguments").read_text().split("\0")[:-1] == command[1:]
    assert Path("python").read_text() == sys.executable


def test_the_users_PYTHON_is_kept(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", "/shared/python")
    program("sbatch", 'printf "%s" "$PYTHON" > python')
    slurm(capsys, "gpt3_xl.yaml", "--nodes", "2", "--submit")
    assert Path("python").read_text() == "/shared/python"


def test_the_exit_code_is_sbatchs(capsys: Capture) -> None:
    program("sbatch", "exit 3")
    assert main(["launch", "slurm", "gpt3_xl.yaml", "--nodes", "2", "--submit"]) == 3


def test_a_refused_run_is_not_submitted(capsys: Capture) -> None:
    program("sbatch", "echo > submitted")
    refusal(capsys, "slurm", "gpt3_xl.yaml", "--nodes", "3", "--submit")
    assert not Path("submitted").exists()


def test_options_of_train_are_passed_on(capsys: Capture) -> None:
    arguments = ["launch", "slurm", "gpt2_124m.yaml", "--nodes", "1", "--allow-recipe-change", "train.micro_batch=4"]
    arguments += ["--at", "1e6"]
    assert main(arguments) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[-4:] == ["gpt2_124m.yaml", "train.micro_batch=4", "--allow-recipe-change", "--at=1000000"]


def test_ranks_that_do_not_divide_into_copies_are_refused(capsys: Capture) -> None:
    job = ["slurm", "gpt3_xl.yaml", "--nodes", "2", "engine.name=fsdp"]
    assert "engine.shard_ranks 3 does not divide 16 ranks" in refusal(capsys, *job, "engine.shard_ranks=3")
    assert main(["launch", *job, "engine.shard_ranks=8"]) == 0


def test_the_config_may_be_an_option(capsys: Capture) -> None:
    command = slurm(capsys, "run.name=x", "--nodes", "2", "--config", "gpt3_xl.yaml", "run.folder=y")
    assert command[command.index(SCRIPT) + 1 :] == ["gpt3_xl.yaml", "run.name=x", "run.folder=y"]
