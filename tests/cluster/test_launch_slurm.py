"""launch slurm: the sbatch command, and the runs that it refuses."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.planning.memory import peak_memory
from tests.cluster.launching import Capture, program, refusal
from tests.processes import REPOSITORY

SCRIPT = str(REPOSITORY / "launch" / "multinode.sh")
PRESETS = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml"))

pytestmark = pytest.mark.usefixtures("elsewhere")

UNSHARDED = ["engine.name=ddp", "train.micro_batch=3"]


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
    """A batch of 2^20 tokens is 512 sequences of 2,048. The plan's own peak is what is printed."""
    command = ["train.batch_tokens=1048576", "train.micro_batch=4", "train.batch_ramp_start=0"]
    command += ["train.batch_ramp_tokens=0", "engine.name=fsdp"]
    assert main(["launch", "slurm", "gpt3_13b.yaml", "--nodes", "4", *command]) == 0
    comment = capsys.readouterr().out.splitlines()[0]
    assert comment.startswith("# 32 ranks, 4 micro-batch(es) of 4 per step and rank; each GPU needs ")
    assert comment.endswith("; name yours with --gpu or --gpu-memory to have that checked")
    (gigabytes,) = re.findall(r"needs ([\d.]+) GB at the peak", comment)
    peak = peak_memory(load_config("gpt3_13b.yaml", command), 32).total
    assert float(gigabytes) == pytest.approx(peak / 1e9, abs=0.1)


def test_an_automatic_micro_batch_is_printed_for_a_named_gpu(capsys: Capture) -> None:
    job = ["launch", "slurm", "gpt2_124m.yaml", "--nodes", "8", "train.micro_batch=auto"]
    assert main(job) == 0
    assert "# 64 ranks, train.micro_batch auto depends on the GPU; name yours" in capsys.readouterr().out
    for card in (["--gpu", "a100-40gb"], ["--gpu-memory", "42"]):
        assert main([*job, *card]) == 0
        comment = capsys.readouterr().out.splitlines()[0]
        assert comment.startswith("# 64 ranks, 1 micro-batch(es) of 8 per step and rank; each GPU needs ")
        assert re.search(r", and has 42\.\d GB$", comment)
    assert main([*job, "train.device=cpu"]) == 0
    assert "# 64 ranks, 2 micro-batch(es) of 4 per step and rank; memory is not checked" in capsys.readouterr().out


def test_little_room_is_a_warning_beside_the_command(capsys: Capture) -> None:
    job = ["gpt2_1558m.yaml", "engine.name=ddp", "train.micro_batch=4", "train.activation_checkpointing=none"]
    assert main(["launch", "slurm", *job, "--nodes", "1", "--gpu", "a100-40gb"]) == 0
    printed = capsys.readouterr()
    assert shlex.split(printed.out.splitlines()[1])[0] == "sbatch"
    assert printed.err.startswith("warning: memory is tight: ")
    assert printed.err.count("\n") == 1


def test_a_named_gpu_needs_products_in_the_runs_precision(capsys: Capture) -> None:
    line = refusal(capsys, "slurm", "gpt2_124m.yaml", "--nodes", "1", "--gpu", "t4", "train.micro_batch=1")
    assert "t4 has no products in bf16: set train.precision=fp16" in line
    job = ["slurm", "gpt2_124m.yaml", "--nodes", "1", "--gpu", "t4", "train.micro_batch=1", "train.precision=fp16"]
    assert main(["launch", *job]) == 0


def test_an_unknown_gpu_is_asked_for_its_memory(capsys: Capture) -> None:
    job = ["slurm", "gpt2_124m.yaml", "--nodes", "1", "--gpu", "h2000"]
    line = refusal(capsys, *job)
    assert "--gpu 'h2000' is unknown: did you mean h200" in line
    assert "give the memory with --gpu-memory" in line
    assert main(["launch", *job, "--gpu-memory", "96"]) == 0


def test_a_batch_that_does_not_divide_is_refused(capsys: Capture) -> None:
    line = refusal(capsys, "slurm", "gpt3_xl.yaml", "--nodes", "3", "--gpus-per-node", "8")
    assert "24 rank(s)" in line
    assert re.search(r"use train\.batch_tokens \d+", line)


@pytest.mark.parametrize(
    ("job", "way"),
    [
        (["gpt3_175b.yaml", "--nodes", "64", "--gpu", "h100", *UNSHARDED], "engine.name=fsdp"),
        (["gpt3_175b.yaml", "--nodes", "64", "--gpu-memory", "80", *UNSHARDED], "engine.name=fsdp"),
        (
            ["gpt3_13b.yaml", "--nodes", "4", "--gpu-memory", "24", "engine.name=zero", "engine.stage=1"],
            "engine.stage=",
        ),
        (["gpt3_13b.yaml", "--nodes", "1", "--gpu-memory", "24", "engine.name=fsdp"], "engine.offload=all"),
        (["gpt3_175b.yaml", "--nodes", "1", "engine.name=ddp"], "engine.offload=all"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_that_works(job: list[str], way: str, capsys: Capture) -> None:
    line = refusal(capsys, "slurm", *job)
    assert re.search(r"gpt3_\w+ does not fit on \d+ GPU\(s\) of [\d.]+ GB", line)
    assert ("the largest known; name yours" in line) == ("--gpu" not in job and "--gpu-memory" not in job)
    (words,) = re.findall(r"; set ((?:\S+=\S+ ?)+)", line)
    assert way in words
    assert main(["launch", "slurm", *job, *words.rstrip(", ").split()]) == 0


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
        assert re.search(rf"train\.batch_tokens .* {gpus} rank\(s\)|does not fit on {gpus} GPU\(s\) of .* GB", line)


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


def test_groups_of_tensor_ranks_stay_on_a_node(capsys: Capture) -> None:
    """The number that a refusal names works; the ranks are described with their groups."""
    job = ["slurm", "gpt3_13b.yaml", "engine.name=fsdp", "train.micro_batch=1", "--nodes", "8"]
    line = refusal(capsys, *job, "--gpus-per-node", "4", "engine.tensor_ranks=8")
    assert "engine.tensor_ranks 8: ranks 0 to 7 are on node 1 and node 2" in line
    (way,) = re.findall(r"set (engine\.tensor_ranks=\d+)", line)
    assert way == "engine.tensor_ranks=4"
    assert main(["launch", *job, "--gpus-per-node", "4", way]) == 0
    assert "# 32 ranks in 8 groups of 4 tensor ranks, " in capsys.readouterr().out
    assert main(["launch", *job, "engine.tensor_ranks=8"]) == 0
    comment = capsys.readouterr().out.splitlines()[0]
    # 1,024 sequences of 2,048 tokens
    assert comment.startswith("# 64 ranks in 8 groups of 8 tensor ranks, 128 micro-batch(es) of 1 per step and group; ")
