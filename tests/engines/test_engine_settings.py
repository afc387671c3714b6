"""Contradictory engine settings are refused; the engine section and activation checkpointing read back."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from megagpt.cli import main
from megagpt.config import EngineConfig
from megagpt.config_file import load_config, to_yaml
from megagpt.errors import UserError
from tests.conftest import Refusal

# --- contradictions in the engine section ---

OFFLOADS = {
    ("ddp", None): {"none"},
    ("fsdp", None): {"none", "all"},
    ("zero", 1): {"none", "optimizer"},
    ("zero", 2): {"none", "optimizer"},
    ("zero", 3): {"none", "optimizer", "all"},
}


@pytest.mark.parametrize(
    ("place", "offload"),
    list(itertools.product(OFFLOADS, ["none", "optimizer", "all"])),
    ids=lambda v: v if isinstance(v, str) else f"{v[0]} {v[1] or ''}".strip(),
)
def test_each_engine_refuses_what_it_cannot_offload(place: tuple[str, int | None], offload: str) -> None:
    name, stage = place
    overrides = [f"engine.name={name}", f"engine.offload={offload}"] + ([f"engine.stage={stage}"] if stage else [])
    if offload in OFFLOADS[place]:
        assert load_config("gpt3_xl", overrides).engine.offload == offload
        return
    with pytest.raises(UserError) as caught:
        load_config("gpt3_xl", overrides)
    message = str(caught.value)
    assert f"engine.offload {offload}: {name}" in message
    named = message.split("can do: ")[1].split("; ")[0].split(", ")
    assert set(named) == OFFLOADS[place]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["engine.stage=3"], "engine.stage is for engine.name zero, and engine.name is ddp"),
        (["engine.name=fsdp", "engine.stage=1"], "engine.stage is for engine.name zero, and engine.name is fsdp"),
        (
            ["engine.name=zero", "engine.shard_ranks=8"],
            "engine.shard_ranks is for engine.name fsdp, and engine.name is zero",
        ),
        (["engine.shard_ranks=8"], "engine.shard_ranks is for engine.name fsdp, and engine.name is ddp"),
        (
            ["engine.name=zero", "engine.reshard_after_forward=false"],
            "engine.reshard_after_forward is for engine.name fsdp, and engine.name is zero",
        ),
        (
            ["engine.name=fsdp", "engine.deepspeed={steps_per_print: 1}"],
            "engine.deepspeed is for engine.name zero, and engine.name is fsdp",
        ),
        (
            ["engine.name=fsdp", "engine.offload=all", "engine.nvme_path=/x"],
            "engine.nvme_path is for engine.name zero, and engine.name is fsdp",
        ),
        (
            ["engine.name=zero", "engine.stage=2", "engine.offload=optimizer", "engine.nvme_path=/x"],
            "engine.nvme_path needs engine.stage 3, and it is 2",
        ),
        (
            ["engine.name=zero", "engine.stage=3", "engine.nvme_path=/x"],
            "engine.nvme_path holds offloaded state: set engine.offload to optimizer or all",
        ),
        (["engine.tensor_ranks=2"], "engine.tensor_ranks is for engine.name fsdp or zero, and engine.name is ddp"),
        (
            ["engine.name=fsdp", "engine.tensor_ranks=3"],
            "engine.tensor_ranks 3 must divide model.heads 16, model.context 2048 and the 50304 rows of the token "
            "embedding; these do: 1, 2, 4, 8, 16",
        ),
        (
            ["engine.name=zero", "engine.tensor_ranks=5", "model.width=1600", "model.heads=25"],
            "engine.tensor_ranks 5 must divide model.heads 25, model.context 2048 and the 50304 rows of the token "
            "embedding; these do: 1",
        ),
        (
            ["engine.name=fsdp", "engine.tensor_ranks=2", "train.float8=rowwise"],
            "train.float8 rowwise scales whole tensors, and tensor ranks hold parts of them: set train.float8=none or "
            "engine.tensor_ranks=1",
        ),
        (["engine.name=zero", "engine.stage=4"], "engine.stage: 4 should be less than or equal to 3"),
        (["engine.name=zero", "engine.stage=0"], "engine.stage: 0 should be greater than or equal to 1"),
        (["engine.name=zer0"], "engine.name: 'zer0' should be 'ddp', 'fsdp' or 'zero'"),
        (["engine.name=zero", "engine.deepspeed=3"], "engine.deepspeed: 3 should be"),
    ],
)
def test_contradicting_engine_settings_are_refused_in_one_line(
    overrides: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "gpt3_xl", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    assert f": {sentence}" in error


@pytest.fixture
def zero_file(tmp_path: Path) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(
        "base: gpt3_xl\n"
        "engine: {name: zero, stage: 3, offload: all, nvme_path: /local, deepspeed: {steps_per_print: 5}}\n"
    )
    return str(path)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_another_engine_drops_the_files_engine_settings(zero_file: str, name: str) -> None:
    assert load_config(zero_file, [f"engine.name={name}"]).engine == EngineConfig(name=name)  # type: ignore[arg-type]
    assert load_config(zero_file, [f"engine.name={name}", "train.micro_batch=2"]).train.micro_batch == 2


def test_overrides_hold_before_and_after_the_engines_name(zero_file: str) -> None:
    expected = EngineConfig(name="fsdp", shard_ranks=4)
    assert load_config(zero_file, ["engine.name=fsdp", "engine.shard_ranks=4"]).engine == expected
    assert load_config(zero_file, ["engine.shard_ranks=4", "engine.name=fsdp"]).engine == expected


def test_the_same_engine_keeps_the_files_settings(zero_file: str) -> None:
    expected = load_config(zero_file).engine
    assert (expected.stage, expected.offload, expected.nvme_path) == (3, "all", "/local")
    assert load_config(zero_file, ["engine.name=zero"]).engine == expected


def test_the_engine_section_reads_back_to_itself(zero_file: str, tmp_path: Path) -> None:
    run = load_config(zero_file)
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load_config(str(tmp_path / "resolved.yaml")) == run


def test_ranks_that_share_a_copy_divide_the_world() -> None:
    run = load_config("gpt3_xl", ["engine.name=fsdp", "engine.shard_ranks=4"])
    assert [run.sharing_ranks(ranks) for ranks in (4, 8, 12)] == [4, 4, 4]
    with pytest.raises(UserError, match=r"engine\.shard_ranks 4 does not divide 6 ranks; these fit: 1, 2, 3, 6"):
        run.sharing_ranks(6)
    assert load_config("gpt3_xl", ["engine.name=fsdp"]).sharing_ranks(6) == 6


# --- activation checkpointing ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("none", "none"),
        ("full", "full"),
        ("selective", "selective"),
        ("{every: 1}", {"every": 1}),
        ("{every: 3}", {"every": 3}),
        ("{every: 1000}", {"every": 1000}),
    ],
)
def test_activation_checkpointing_is_read_and_written(text: str, value: Any, tmp_path: Path) -> None:
    run = load_config("gpt3_xl", [f"train.activation_checkpointing={text}"])
    assert run.train.activation_checkpointing == value
    assert yaml.safe_load(to_yaml(run))["train"]["activation_checkpointing"] == value
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load_config(str(tmp_path / "resolved.yaml")) == run
    # An override replaces the file's value, also one of the other form.
    assert load_config(str(tmp_path / "resolved.yaml"), ["train.activation_checkpointing=full"]).train == (
        load_config("gpt3_xl", ["train.activation_checkpointing=full"]).train
    )


@pytest.mark.parametrize(
    "text",
    [
        "{every: 0}", "{every: -1}", "{every: 2, x: 1}", "{every: 1.5}", "{every: true}", "{every: '2'}", "{evry: 2}",
        "{}", "true", "false", "all", "2", "[full]", "null", "''",
    ],
)  # fmt: skip
def test_other_activation_checkpointing_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "gpt3_xl", f"train.activation_checkpointing={text}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    sentence = error.split(": train.activation_checkpointing: ")[1]
    for part in ("is not one of: none, full, selective, {every: k}", "whole number"):
        assert part in sentence


def test_tensor_ranks_that_would_share_a_batch_are_named() -> None:
    """A batch with fewer sequences than ranks is refused, and the advice of the refusal is followed."""
    wanted = ["engine.name=fsdp", "train.micro_batch=1"]
    with pytest.raises(UserError, match=r"1024 rank\(s\) x train.micro_batch 1 do not divide") as caught:
        load_config("gpt3_175b", [*wanted, "engine.tensor_ranks=1"]).check_ranks(1024)
    *_, advice = str(caught.value).split(", or ")
    assert advice == "engine.tensor_ranks 2"
    config = load_config("gpt3_175b", [*wanted, advice.replace(" ", "=")])
    config.check_ranks(1024)
    assert (config.shares(1024), config.accumulation(1024)) == (512, 3)
    with pytest.raises(
        UserError,
        match=r"engine.tensor_ranks 8 does not divide 12 ranks; these fit: 1, 2, 4; or start a multiple of 8$",
    ):
        load_config("gpt3_175b", wanted).check_ranks(12)
    load_config("gpt3_175b", [*wanted, "engine.tensor_ranks=4", "train.micro_batch=512"]).check_ranks(12)
    load_config("gpt3_175b", wanted).check_ranks(16)
    with pytest.raises(UserError, match=r"shard_ranks 4 .* no multiple of engine.tensor_ranks 8; these fit: 8, 16"):
        load_config("gpt3_175b", [*wanted, "engine.shard_ranks=4"]).sharing_ranks(16)


def test_a_config_is_shown_for_one_group_of_its_tensor_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "gpt3_175b"]) == 0
    assert (
        "on 8 ranks in 1 group of 8 tensor ranks = 128 micro-batch(es) of 12 per step and group"
        in capsys.readouterr().out
    )
    assert main(["config", "gpt3_175b", "engine.shard_ranks=64"]) == 0  # a copy of the model is the least, then
    assert "on 64 ranks in 8 groups of 8 tensor ranks" in capsys.readouterr().out


def test_a_measurement_of_checkpoints_needs_a_whole_group(tmp_path: Path, refusal: Refusal) -> None:
    command = ["checkpoint", "bench", "quickstart", "--in", str(tmp_path / "disk"), "engine.name=fsdp"]
    refusal([*command, "engine.tensor_ranks=2"], "engine.tensor_ranks 2 does not divide 1 rank; ", "a multiple of 2")
    refusal([*command, "engine.shard_ranks=2"], "engine.shard_ranks 2 does not divide 1 rank; these fit: 1")
