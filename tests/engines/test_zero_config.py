"""DeepSpeed's config as it is generated, and what may be said about engines and recomputation."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megagpt.cli import main
from megagpt.config import Config, EngineConfig
from megagpt.config_file import build_config, load_config, to_yaml
from megagpt.engines.zero_config import check_nvme, deepspeed_config
from megagpt.errors import UserError
from tests.ranks import run_ranks

Tree = dict[str, Any]
PRECISIONS = ["fp32", "bf16", "fp16"]
MODEL = {"layers": 2, "width": 32, "heads": 2, "context": 64}


def config(ranks: int = 1, micro_batch: int = 2, accumulation: int = 3, **sections: Tree) -> Config:
    """A ZeRO run whose batch is that many micro-batches on each of that many ranks."""
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


def test_clipping_is_the_optimizers() -> None:
    made = deepspeed_config(config(optimizer={"clip_norm": 0.625}), ranks=1, on_gpu=False)
    assert made["gradient_clipping"] == 0.625


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stage_and_what_goes_with_it(stage: int) -> None:
    zero = generated(stage=stage)["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["round_robin_gradients"] is False
    assert zero.get("memory_efficient_linear") is (False if stage == 3 else None)
    assert any(key.startswith("stage3_") for key in zero) == (stage == 3)
    assert "offload_optimizer" not in zero
    assert "offload_param" not in zero


def test_at_stage_3_vectors_stay_whole_and_matrices_do_not() -> None:
    threshold = generated(stage=3)["zero_optimization"]["stage3_param_persistence_threshold"]
    # DeepSpeed keeps what has at most so many elements.
    assert 4 * 32 <= threshold < 32 * 32


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("nvme_path", ["", "/local"])
@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_offloading(offload: str, nvme_path: str, on_gpu: bool) -> None:
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


def test_it_is_plain_json_and_another_one_each_time() -> None:
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


def test_sections_of_tools_and_the_one_allowed_type_pass_through() -> None:
    passed = {
        "communication_data_type": "fp32",
        "comms_logger": {"enabled": True},
        "flops_profiler": {"enabled": True, "profile_step": 2},
        "aio": {"block_size": 1048576},
    }
    made = generated(passed)
    assert {key: made[key] for key in passed} == passed


def test_a_file_may_hold_it(tmp_path: Path) -> None:
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
def test_what_the_config_decides_is_refused(key: str, value: Any) -> None:
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
def test_what_the_config_decides_about_zero_is_refused(key: str, value: Any) -> None:
    refused({"zero_optimization": {key: value}}, f"engine.deepspeed.zero_optimization.{key} is decided by")


@pytest.mark.parametrize("value", ["bf16", "fp16", "fp64"])
def test_gradients_do_not_travel_in_less(value: str) -> None:
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


# --- as DeepSpeed reads it ---


def read_by_deepspeed(trees: list[Tree]) -> list[Tree]:
    """What DeepSpeed's own reader makes of the configs generated for this world."""
    from megagpt.engines.deepspeed_library import load_deepspeed
    from megagpt.world import join

    load_deepspeed(on_gpu=False)
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig

    with join("cpu") as world:
        os.environ["LOCAL_RANK"] = str(world.local_rank)
        deepspeed.init_distributed(auto_mpi_discovery=False)
        results = []
        for tree in trees:
            made = deepspeed_config(build_config(tree, "here"), world.size, on_gpu=False)
            read = DeepSpeedConfig(made)
            zero = read.zero_config
            results.append(
                {
                    "world": read.world_size,
                    "batch": read.train_batch_size,
                    "micro_batch": read.train_micro_batch_size_per_gpu,
                    "accumulation": read.gradient_accumulation_steps,
                    "clip_norm": read.gradient_clipping,
                    "gradients": (read.grad_accum_dtype, str(read.communication_data_type)),
                    "bf16": read.bfloat16_config.enabled,
                    "fp16": read.float16_config.enabled,
                    "constant scale": read.float16_config.loss_scale,
                    "stage": int(zero.stage),
                    "round robin": zero.round_robin_gradients,
                    "memory-efficient linear": zero.memory_efficient_linear,
                    "buckets": (zero.reduce_bucket_size, zero.allgather_bucket_size, zero.prefetch_bucket_size),
                    "optimizer": zero.offload_optimizer and str(zero.offload_optimizer.device),
                    "weights": zero.offload_param and str(zero.offload_param.device),
                    "hpz": zero.zero_hpz_partition_size,
                }
            )
        return results


@pytest.mark.slow
def test_deepspeed_reads_what_is_meant() -> None:
    cases = [
        (stage, precision, offload)
        for stage in (1, 2, 3)
        for precision in PRECISIONS
        for offload in (("none", "optimizer", "all") if stage == 3 else ("none", "optimizer"))
    ]
    trees: list[Tree] = []
    for stage, precision, offload in cases:
        # Buckets given by the user, so that each can be told from DeepSpeed's defaults and from the others.
        zero: Tree = {"reduce_bucket_size": 111, "allgather_bucket_size": 222}
        if stage == 3:
            zero |= {"stage3_prefetch_bucket_size": 333, "zero_hpz_partition_size": 2}
        trees.append(
            {
                "model": MODEL,
                "train": {"batch_tokens": 64 * 2 * 5 * 3, "micro_batch": 5, "precision": precision},
                "optimizer": {"clip_norm": 0.75},
                "engine": {
                    "name": "zero",
                    "stage": stage,
                    "offload": offload,
                    "deepspeed": {"zero_optimization": zero},
                },
            }
        )
    first, second = run_ranks(2, read_by_deepspeed, trees)
    assert first == second
    for (stage, precision, offload), read in zip(cases, first, strict=True):
        assert (read["world"], read["batch"], read["micro_batch"], read["accumulation"]) == (2, 30, 5, 3)
        assert read["clip"] == 0.75
        assert read["gradients"] == ("fp32", "torch.float32")
        assert (read["bf16"], read["fp16"]) == (precision == "bf16", precision == "fp16")
        assert precision != "fp16" or read["constant scale"] == 1.0
        assert read["stage"] == stage
        assert read["round robin"] is False
        assert stage != 3 or read["memory-efficient linear"] is False
        assert read["buckets"][:2] == (111, 222)
        assert stage != 3 or (read["buckets"][2], read["hpz"]) == (333, 2)
        devices = {"none": (None, None), "optimizer": ("cpu", None), "all": ("cpu", "cpu")}[offload]
        assert tuple(d and d.split(".")[-1] for d in (read["optimizer"], read["weights"])) == devices


# --- folders for offloaded state ---


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UserError) as caught:
            check_nvme(str(path), on_gpu=False)
        assert f"engine.nvme_path {path}: no such folder" in str(caught.value)


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # as root, who is kept out of the kernel's own folders only
        folder = Path("/proc")
    if not folder.is_dir():
        pytest.skip("root may write everywhere here")
    with pytest.raises(UserError) as caught:
        check_nvme(str(folder), on_gpu=False)
    assert f"engine.nvme_path {folder}: cannot be written to" in str(caught.value)


def test_a_good_folder_passes_where_libaio_is_installed(tmp_path: Path) -> None:
    message = ""
    try:
        check_nvme(str(tmp_path), on_gpu=False)
    except UserError as error:
        message = str(error)
    assert message == "" or ("libaio" in message and message.startswith(f"engine.nvme_path {tmp_path}: "))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("installed", [True, False])
def test_a_good_folder_needs_libaio(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megagpt.engines.deepspeed_library import load_deepspeed

    load_deepspeed(on_gpu=False)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: installed)
    if installed:
        check_nvme(str(tmp_path), on_gpu=False)
    else:
        with pytest.raises(UserError, match="libaio"):
            check_nvme(str(tmp_path), on_gpu=False)


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
def test_what_each_engine_can_offload(place: tuple[str, int | None], offload: str) -> None:
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
def test_another_engine_on_the_command_line_drops_the_files_settings(zero_file: str, name: str) -> None:
    assert load_config(zero_file, [f"engine.name={name}"]).engine == EngineConfig(name=name)  # type: ignore[arg-type]
    assert load_config(zero_file, [f"engine.name={name}", "train.micro_batch=2"]).train.micro_batch == 2


def test_further_overrides_hold_wherever_they_stand(zero_file: str) -> None:
    expected = EngineConfig(name="fsdp", shard_ranks=4)
    assert load_config(zero_file, ["engine.name=fsdp", "engine.shard_ranks=4"]).engine == expected
    assert load_config(zero_file, ["engine.shard_ranks=4", "engine.name=fsdp"]).engine == expected


def test_the_same_engine_on_the_command_line_keeps_them(zero_file: str) -> None:
    expected = load_config(zero_file).engine
    assert (expected.stage, expected.offload, expected.nvme_path) == (3, "all", "/local")
    assert load_config(zero_file, ["engine.name=zero"]).engine == expected


def test_the_engine_section_reads_back_to_itself(zero_file: str, tmp_path: Path) -> None:
    run = load_config(zero_file)
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load_config(str(tmp_path / "resolved.yaml")) == run


def test_ranks_that_share_a_copy_divide_the_world() -> None:
    run = load_config("gpt3_xl", ["engine.name=fsdp", "engine.shard_ranks=4"])
    assert [run.sharing_ranks(world) for world in (4, 8, 12)] == [4, 4, 4]
    with pytest.raises(UserError, match=r"engine\.shard_ranks 4 does not divide 6 ranks; these do: 1, 2, 3, 6"):
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
def test_recomputation_is_read_and_written(text: str, value: Any, tmp_path: Path) -> None:
    run = load_config("gpt3_xl", [f"train.activation_checkpointing={text}"])
    assert run.train.activation_checkpointing == value
    assert yaml.safe_load(to_yaml(run))["train"]["activation_checkpointing"] == value
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load_config(str(tmp_path / "resolved.yaml")) == run
    # And over a file that says it in the other form.
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
def test_other_recomputations_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "gpt3_xl", f"train.activation_checkpointing={text}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    sentence = error.split(": train.activation_checkpointing: ")[1]
    for part in ("is not one of: none, full, selective, {every: k}", "whole number"):
        assert part in sentence


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
        # The whole output is still the config.
        (tmp_path / "gpt3_xl.yaml").write_text(output)
        assert load_config(str(tmp_path / "gpt3_xl.yaml")) == run


def test_the_config_command_refuses_what_deepspeed_would_be_refused(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["engine.name=zero", "engine.deepspeed={zero_optimization: {stage: 3}}"]
    assert main(["config", "gpt3_xl.yaml", *overrides]) == 2
    captured = capsys.readouterr()
    assert "engine.deepspeed.zero_optimization.stage" in captured.err
    assert captured.err.count("\n") == 1


def test_other_engines_have_no_deepspeed_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "gpt3_xl.yaml", "engine.name=fsdp"]) == 0
    assert "zero_optimization" not in capsys.readouterr().out
