"""megagpt plan: its JSON, its refusals, what it writes and draws, and the advice that it prints."""

import itertools
import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.config import EngineConfig
from megagpt.config_file import file_engine, load_config
from megagpt.planning.setting import typed, vary
from megagpt.schedule import batch_sequences, cut, ramp_work
from tests.conftest import Refusal
from tests.runs import shrunk

Capture = pytest.CaptureFixture[str]


def record(capsys: Capture, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_json_has_the_plan_of_the_config_as_it_is(capsys: Capture) -> None:
    found = record(capsys, "gpt3_xl.yaml", "--gpus", "64", "--price", "2", "train.micro_batch=2")
    own = found["as_configured"]
    low, high = own["tokens_per_second_range"]
    assert low < own["tokens_per_second"] < high
    assert own["memory"]["total"] == pytest.approx(sum(own["memory"]["parts"].values()))
    assert own["fits"] is True
    assert (own["micro_batch"], own["engine"]["name"], own["overrides"]) == (2, "ddp", ["train.micro_batch=2"])
    assert own["days"] * 86_400 >= 300e9 / own["tokens_per_second"]
    assert own["cost"] == pytest.approx(own["days"] * 24 * 64 * 2)
    assert own["step_seconds"] == pytest.approx(sum(own["step_parts"].values()))


@pytest.mark.slow
def test_what_exceeds_the_gpu_does_not_fit(capsys: Capture) -> None:
    found = record(capsys, "gpt3_175b.yaml", "--gpus", "8")
    assert found["as_configured"]["fits"] is False
    assert found["as_configured"]["memory"]["total"] > found["cluster"]["figures"]["memory"]
    assert found["recommended"] is None
    assert found["clusters"]["smallest"]["fits"] is True


def test_without_gpus_the_clusters_are_found(capsys: Capture) -> None:
    clusters = record(capsys, "gpt3_13b.yaml", "--days", "30")["clusters"]
    everything = clusters["all"]
    assert clusters["smallest"]["gpus"] == min(plan["gpus"] for plan in everything if plan["verdict"] == "fits")
    assert clusters["cheapest"]["gpu_hours"] == min(plan["gpu_hours"] for plan in everything)
    in_time = [plan["gpus"] for plan in everything if plan["days"] <= 30]
    assert clusters["in_time"]["gpus"] == min(in_time)


def test_no_cluster_has_a_group_of_tensor_ranks_on_two_nodes(capsys: Capture) -> None:
    found = record(capsys, "gpt3_175b", "engine.tensor_ranks=16", "--days", "6")["clusters"]["in_time"]
    assert main(shlex.split(found["start"])[1:]) == 0
    assert found["engine"]["tensor_ranks"] <= 8
    assert "engine.tensor_ranks=16" not in found["start"]


@pytest.mark.parametrize(("arguments", "parts"), [
    (["gpt3_175b", "--gpus", "1024", "engine.tensor_ranks=1", "train.micro_batch=1"],
     ["1024 rank(s)", "2097152 or 4194304", "768 or 1536 ranks"]),
    (["gpt3_xl", "--gpus", "12"], ["nodes of 8", "8 or 16"]),
    (["gpt3_175b", "--gpus", "1020", "engine.tensor_ranks=1"], ["whole nodes of 8", "use 128 GPUs, or"]),
    (["gpt3_xl", "--gpus", "16", "engine.name=fsdp", "engine.tensor_ranks=16"], ["node 1 and node 2", "set engine."]),
    (["gpt3_175b", "--gpus", "2000", "--per-node", "6"], ["whole nodes of 6", "use 1536 or 3072 GPUs"]),
    (["gpt3_xl", "--gpus", "8", "--gpu", ""], ["unknown GPU ''"]),
    (["gpt3_175b", "--gpu", "t4"], ["t4 has no products in bf16", "set train.precision=fp16"]),
    (["gpt3_xl", "--gpus", "8", "--trace", "engine.name=zero"], ["cannot be traced", "without --trace"]),
    (["gpt3_xl", "--gpus", "8", "--gpu", "h1000"], ["unknown GPU", "--gpu-memory"]),
    (["gpt3_xl", "--gpus", "8", "--write", "/nowhere/x.yaml"], ["/nowhere", "--write"]),
    (["gpt3_xl", "--gpus", "8", "--picture", "x.pdf"], ["--picture", ".png"]),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], parts: list[str], refusal: Refusal) -> None:
    refusal(["plan", *arguments], *parts)


@pytest.mark.parametrize("option", ["--gpus", "--per-node", "--network", "--price", "--days", "--gpu-memory"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
def test_numbers_that_are_not_above_zero_are_refused(option: str, value: str, refusal: Refusal) -> None:
    refusal(["plan", "gpt3_xl", f"{option}={value}"], f"argument {option}: '{value}' is not", "above 0")


def test_a_plan_needs_no_torch() -> None:
    code = "import sys; from megagpt.cli import main; main(['plan', 'gpt3_175b', '--gpus', '512']); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_the_written_config_reads_back_and_trains(tmp_path: Path, corpus: Path, capsys: Capture) -> None:
    written = tmp_path / "my.yaml"
    found = record(capsys, "gpt3_125m.yaml", "--gpus", "8", "--write", str(written))["recommended"]
    config = load_config(str(written))
    assert config == load_config("gpt3_125m.yaml", [*found["overrides"]])
    run = [f"run.folder={tmp_path / 'runs'}", "engine.name=ddp", "train.micro_batch=4"]
    assert main(["train", str(written), *shrunk(corpus), *run]) == 0


@pytest.mark.slow
def test_the_picture_is_drawn(tmp_path: Path, capsys: Capture) -> None:
    assert main(["plan", "gpt2_124m", "--gpus", "8", "--price", "2", "--picture", str(tmp_path / "a.svg")]) == 0
    text = (tmp_path / "a.svg").read_text()
    assert all(word in text for word in ("Memory of a GPU", "Time to the last token", "Cost at $2 an hour"))


def test_the_overrides_replace_those_of_another_engine(capsys: Capture) -> None:
    given = ["engine.name=zero", "engine.stage=3", "engine.offload=all", "train.micro_batch=auto"]
    best = record(capsys, "gpt3_xl", "--gpus", "64", *given)["recommended"]
    again = record(capsys, "gpt3_xl", "--gpus", "64", *best["overrides"])["as_configured"]
    assert again["step_seconds"] == best["step_seconds"]
    assert best["start"] == shlex.join(["megagpt", "launch", "slurm", "gpt3_xl", *best["overrides"], "--nodes", "8",
                                        "--gpus-per-node", "8"])  # fmt: skip


@pytest.mark.parametrize("given", [
    [], ["engine.tensor_ranks=1"], ["engine.tensor_ranks=4", "train.activation_checkpointing=full"],
    ["engine.name=fsdp", "engine.shard_ranks=8"], ["engine.name=ddp"], ["engine.stage=1", "engine.offload=optimizer"],
])  # fmt: skip
def test_the_overrides_of_every_setting_give_it(given: list[str], tmp_path: Path) -> None:
    """From a file whose engine has settings of its own, and some that others have, too."""
    file = tmp_path / "own.yaml"
    file.write_text("base: gpt3_xl.yaml\nengine: {name: zero, stage: 3, tensor_ranks: 8}\n")
    config, engine_of_file = load_config(str(file), given), file_engine(str(file))
    made = [{"name": "ddp"}, {"name": "fsdp", "reshard_after_forward": False}, {"name": "zero", "stage": 2}]
    for values, tensor_ranks in itertools.product(made, (1, 2, 8)):
        engine = EngineConfig(**values, tensor_ranks=tensor_ranks if values["name"] != "ddp" else 1)
        wanted = vary(config, engine=vars(engine), train={"activation_checkpointing": "selective"})
        again = load_config(str(file), typed(given, config, wanted, engine_of_file))
        assert (again.engine, again.train) == (wanted.engine, wanted.train)


def test_a_change_that_gains_nothing_is_not_recommended(capsys: Capture) -> None:
    """A tiny model is as fast with activation checkpointing, which has no use there."""
    best = record(capsys, "quickstart", "--gpus", "1", "train.micro_batch=4")["recommended"]
    assert best["overrides"] == ["train.micro_batch=8"]


def test_compare_without_gpus_ranks_the_recommended_cluster(capsys: Capture) -> None:
    assert main(["plan", "gpt2_124m", "--compare"]) == 0
    assert "Every setting on 1 GPU, the best first:" in capsys.readouterr().out


def test_the_recommended_command_is_understood(capsys: Capture) -> None:
    assert main(["plan", "gpt3_175b", "--gpus", "512", "train.micro_batch=1"]) == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  megagpt launch slurm")]
    assert main(shlex.split(command)[1:]) == 0
    assert "train.micro_batch=1" not in command


def test_every_term_is_explained_and_lines_are_short(capsys: Capture) -> None:
    assert main(["plan", "gpt3_13b", "--gpus", "64", "--price", "2.5", "--compare", "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "megagpt launch" not in line) <= 120
    text = "\n".join(lines)
    assert all(word in text for word in ("saved activations", "matrix products", "reserve", "energy", "data sheet"))


def test_an_override_is_typed_once() -> None:
    given = ["train.micro_batch=1", "run.name=a", "engine.stage=3", "engine.name=zero"]
    config, engine = load_config("gpt2_124m", given), file_engine("gpt2_124m")
    wanted = vary(config, train={"micro_batch": 4}, engine=vars(EngineConfig("fsdp")))
    assert typed(given, config, wanted, engine) == ["run.name=a", "engine.name=fsdp", "train.micro_batch=4"]
    assert typed(given, config, vary(wanted, engine=vars(engine)), engine) == ["run.name=a", "train.micro_batch=4"]


@pytest.mark.parametrize("name", ["gpt3_175b", "gpt3_125m", "gpt2_124m"])
def test_steps_of_the_ramp_are_counted_without_a_walk(name: str) -> None:
    config, shares, seen, walked = load_config(name), 64, 0, Counter[int]()
    while seen * config.model.context < config.train.batch_ramp_tokens:
        walked[batch_sequences(config, seen)] += 1
        seen += batch_sequences(config, seen)
    for compiled in (False, True):
        work = ramp_work(config, shares, compiled)
        counted, micro_batches = Counter[int](), Counter[int]()
        for sequences, steps in walked.items():
            count, size = cut(sequences, shares, config.micro_batch, compiled)
            counted[size] += steps
            micro_batches[size] += count * steps
        assert work.sequences == seen
        assert work.cuts == {size: (counted[size], micro_batches[size]) for size in counted}
