"""DeepSpeed's generated config, and the user's section in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.cli import main
from megagpt.config import Config
from megagpt.config_file import build_config, load_config
from megagpt.engines.zero_config import deepspeed_config
from megagpt.errors import UserError

Tree = dict[str, Any]


PRECISIONS = ["fp32", "bf16", "fp16"]


MODEL = {"layers": 2, "width": 32, "heads": 2, "context": 64}


def config(ranks: int = 1, micro_batch: int = 2, accumulation: int = 3, **sections: Tree) -> Config:
    """A ZeRO run with `accumulation` micro-batches on each of `ranks` ranks."""
    train = {"batch_tokens": 64 * ranks * micro_batch * accumulation, "micro_batch": micro_batch}
    tree: Tree = {"model": MODEL, "train": train, "engine": {"name": "zero"}}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return build_config(tree, "here")


def generated(passed: Tree | None = None, **engine: Any) -> Tree:
    return deepspeed_config(config(engine={**engine, "deepspeed": passed or {}}), ranks=1, on_gpu=False)


# --- what is generated ---


@given(ranks=st.integers(1, 300), micro_batch=st.integers(1, 64), accumulation=st.integers(1, 64))
def test_the_three_batch_sizes_agree(ranks: int, micro_batch: int, accumulation: int) -> None:
    made = deepspeed_config(config(ranks, micro_batch, accumulation), ranks, on_gpu=True)
    assert made["train_micro_batch_size_per_gpu"] == micro_batch
    assert made["gradient_accumulation_steps"] == accumulation
    assert made["train_batch_size"] == micro_batch * accumulation * ranks


def test_tensor_ranks_take_one_share_of_the_batch() -> None:
    """DeepSpeed multiplies by the groups: that is what its `mpu` tells it."""
    made = deepspeed_config(config(4, 2, 3, engine={"tensor_ranks": 2}), ranks=8, on_gpu=True)
    assert made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 4 == made["train_batch_size"]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="batch_tokens"):
        deepspeed_config(config(1, 2, 3), ranks=4, on_gpu=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_summed_in_fp32_in_every_precision(precision: str, stage: int) -> None:
    run = config(train={"batch_tokens": 384, "micro_batch": 2, "precision": precision}, engine={"stage": stage})
    made = deepspeed_config(run, ranks=1, on_gpu=True)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["communication_data_type"] == "fp32"
    assert [name for name in PRECISIONS if name in made] == ([] if precision == "fp32" else [precision])
    if precision != "fp32":
        assert made[precision]["enabled"] is True
    if precision == "fp16":
        assert made["fp16"]["loss_scale"] > 0  # constant: 0 would start DeepSpeed's own dynamic one


def test_gradient_clipping_is_the_optimizers_clip_norm() -> None:
    made = deepspeed_config(config(optimizer={"clip_norm": 0.625}), ranks=1, on_gpu=False)
    assert made["gradient_clipping"] == 0.625


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_stage_has_its_own_keys(stage: int) -> None:
    zero = generated(stage=stage)["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["round_robin_gradients"] is False
    assert zero.get("memory_efficient_linear") is (False if stage == 3 else None)
    assert any(key.startswith("stage3_") for key in zero) == (stage == 3)
    assert "offload_optimizer" not in zero
    assert "offload_param" not in zero


def test_at_stage_3_vectors_stay_whole_and_matrices_do_not() -> None:
    threshold = generated(stage=3)["zero_optimization"]["stage3_param_persistence_threshold"]
    # DeepSpeed keeps parameters with at most `threshold` elements whole.
    assert 4 * 32 <= threshold < 32 * 32


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("nvme_path", ["", "/local"])
@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_offloading_names_a_device_for_each_state(offload: str, nvme_path: str, on_gpu: bool) -> None:
    run = config(engine={"stage": 3, "offload": offload, "nvme_path": nvme_path})
    zero = deepspeed_config(run, ranks=1, on_gpu=on_gpu)["zero_optimization"]
    place: Tree = {"device": "cpu", "pin_memory": on_gpu}
    if nvme_path:
        place |= {"device": "nvme", "nvme_path": "/local"}
    assert zero["offload_optimizer"] == place
    assert zero.get("offload_param") == (place if offload == "all" else None)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_lower_stages_offload_their_optimizer(stage: int) -> None:
    zero = generated(stage=stage, offload="optimizer")["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"


def test_the_config_is_json_and_new_at_each_call() -> None:
    run = config(engine={"stage": 3, "offload": "all", "deepspeed": {"zero_optimization": {"sub_group_size": 1000}}})
    made = deepspeed_config(run, ranks=1, on_gpu=True)
    assert json.loads(json.dumps(made)) == made
    expected = json.dumps(made)
    made["zero_optimization"].clear()
    assert json.dumps(deepspeed_config(run, ranks=1, on_gpu=True)) == expected


# --- what is passed through ---


def test_the_users_section_wins() -> None:
    plain = generated(stage=3)
    passed = {
        "steps_per_print": 7,
        "wall_clock_breakdown": True,
        "zero_optimization": {"reduce_bucket_size": 12345, "overlap_comm": True, "sub_group_size": 10**6},
    }
    made = generated(passed, stage=3)
    changed = plain["zero_optimization"] | passed["zero_optimization"]  # type: ignore[operator]
    assert plain["zero_optimization"]["reduce_bucket_size"] != 12345
    assert made == plain | passed | {"zero_optimization": changed}


def test_zero_plus_plus_passes_through() -> None:
    keys = {"zero_hpz_partition_size": 8, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    made = generated({"zero_optimization": keys}, stage=3)["zero_optimization"]
    assert {key: made[key] for key in keys} == keys


def test_sections_of_deepspeeds_tools_pass_through() -> None:
    passed = {
        "communication_data_type": "fp32",
        "comms_logger": {"enabled": True},
        "flops_profiler": {"enabled": True, "profile_step": 2},
        "aio": {"block_size": 1048576},
    }
    made = generated(passed)
    assert {key: made[key] for key in passed} == passed


def test_a_config_file_may_hold_the_section(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "base: gpt3_xl\nengine: {name: zero, stage: 3, deepspeed: {zero_optimization: {reduce_bucket_size: 1e6}}}\n"
    )
    override = "engine.deepspeed.zero_optimization.stage3_prefetch_bucket_size=2e6"
    run = load_config(str(tmp_path / "own.yaml"), [override])
    zero = deepspeed_config(run, ranks=1, on_gpu=True)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (10**6, 2 * 10**6)


# --- what is refused there ---


def refused(passed: Tree, *parts: str, stage: int = 3) -> None:
    with pytest.raises(UserError) as caught:
        generated(passed, stage=stage)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_batch_size", 8),
        ("train_micro_batch_size_per_gpu", 2),
        ("gradient_accumulation_steps", 4),
        ("gradient_clipping", 1.0),
        ("optimizer", {"type": "Adam"}),
        ("scheduler", {"type": "WarmupLR"}),
        ("fp16", {"enabled": True}),
        ("bf16", {"enabled": True}),
        ("amp", {"enabled": True}),
        ("torch_autocast", {"enabled": True}),
        ("data_types", {"grad_accum_dtype": "bf16"}),
        ("compile", {}),
        ("activation_checkpointing", {"cpu_checkpointing": True}),
        ("seed", 3),
        ("zero_allow_untested_optimizer", False),
        ("zero_force_ds_cpu_optimizer", True),
        ("tensorboard", {"enabled": True}),
        ("checkpoint", {"tag_validation": "Ignore"}),
        ("curriculum_learning", {"enabled": True}),
        ("data_efficiency", {"enabled": True}),
        ("elasticity", {"enabled": True}),
    ],
)
def test_keys_that_megagpt_decides_are_refused(key: str, value: Any) -> None:
    refused({key: value}, f"engine.deepspeed.{key} is decided by", "leave it out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", 3),
        ("offload_optimizer", {"device": "cpu"}),
        ("offload_param", {"device": "cpu"}),
        ("cpu_offload", True),
        ("round_robin_gradients", True),
        ("memory_efficient_linear", True),
        ("load_from_fp32_weights", False),
        ("elastic_checkpoint", True),
        ("zenflow", {}),
    ],
)
def test_zero_keys_that_megagpt_decides_are_refused(key: str, value: Any) -> None:
    refused({"zero_optimization": {key: value}}, f"engine.deepspeed.zero_optimization.{key} is decided by")


@pytest.mark.parametrize("value", ["bf16", "fp16", "fp64"])
def test_gradients_in_less_than_fp32_are_refused(value: str) -> None:
    refused({"communication_data_type": value}, "engine.deepspeed.communication_data_type", value, "fp32")


@pytest.mark.parametrize(
    ("passed", "parts"),
    [
        ({"steps_per_prnt": 1}, ["unknown key engine.deepspeed.steps_per_prnt", "did you mean steps_per_print"]),
        ({"zero_optimisation": {}}, ["engine.deepspeed.zero_optimisation", "did you mean zero_optimization"]),
        ({"train_batchsize": 1}, ["engine.deepspeed.train_batchsize", "did you mean train_batch_size"]),
        ({"zero_optimization": 3}, ["engine.deepspeed.zero_optimization", "3", "not a section"]),
        (
            {"zero_optimization": {"reduce_bucket_sze": 1}},
            ["unknown key engine.deepspeed.zero_optimization.reduce_bucket_sze", "did you mean reduce_bucket_size"],
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "large"}},
            ["engine.deepspeed.zero_optimization.reduce_bucket_size", "'large'", "integer"],
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": 0}},
            ["engine.deepspeed.zero_optimization.reduce_bucket_size", "0", "greater than 0"],
        ),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_size": -1}},
            ["engine.deepspeed.zero_optimization.stage3_prefetch_bucket_size", "-1"],
        ),
        (
            {"zero_optimization": {"zero_quantized_weights": "maybe"}},
            ["engine.deepspeed.zero_optimization.zero_quantized_weights", "'maybe'", "boolean"],
        ),
        (
            {"zero_optimization": {"zero_hpz_partition_size": 1.5}},
            ["engine.deepspeed.zero_optimization.zero_hpz_partition_size", "1.5"],
        ),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(passed: Tree, parts: list[str]) -> None:
    refused(passed, *parts)


# --- on the command line ---


def test_the_config_command_shows_deepspeeds_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["engine.name=zero", "engine.stage=3"]
    run = load_config("gpt3_xl.yaml", overrides)
    for ranks in (1, 16):
        assert main(["config", "gpt3_xl.yaml", *overrides, "--ranks", str(ranks)]) == 0
        output = capsys.readouterr().out
        lines = output.splitlines()
        opening = lines.index("# {")
        assert all(line.startswith("# ") for line in lines[opening:])
        shown = json.loads("\n".join(line.removeprefix("# ") for line in lines[opening:]))
        assert shown == deepspeed_config(run, ranks, on_gpu=True)
        assert shown["train_batch_size"] == 512
        assert shown["gradient_accumulation_steps"] * shown["train_micro_batch_size_per_gpu"] * ranks == 512
        # With the comments, the output is still the config.
        (tmp_path / "gpt3_xl.yaml").write_text(output)
        assert load_config(str(tmp_path / "gpt3_xl.yaml")) == run


def test_the_config_command_refuses_the_same_keys(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["engine.name=zero", "engine.deepspeed={zero_optimization: {stage: 3}}"]
    assert main(["config", "gpt3_xl.yaml", *overrides]) == 2
    captured = capsys.readouterr()
    assert "engine.deepspeed.zero_optimization.stage" in captured.err
    assert captured.err.count("\n") == 1


def test_other_engines_have_no_deepspeed_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "gpt3_xl.yaml", "engine.name=fsdp"]) == 0
    assert "zero_optimization" not in capsys.readouterr().out
