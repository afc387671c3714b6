"""Settings that DeepSpeed refuses: one line that names the key, from `megagpt config` or from the engine."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import main
from megagpt.config_file import build_config
from megagpt.engines import deepspeed_library, zero_config
from megagpt.engines.zero_config import bucket_elements, deepspeed_config
from megagpt.engines.zero_settings import check_on_cpu
from megagpt.errors import UserError
from megagpt.models.presets import ModelConfig
from tests.conftest import Refusal
from tests.processes import run_ranks

Tree = dict[str, Any]
SCATTERS = {"reduce_scatter": False}
# Stage, section, and the key that is named: what DeepSpeed's engine refuses on one CPU.
REFUSED: list[tuple[int, Tree, str]] = [
    (2, {"prescale_gradients": True}, "prescale_gradients true"),
    (3, {"prescale_gradients": True}, "prescale_gradients true"),
    (2, {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor 2.0"),
    (3, {"gradient_predivide_factor": 2}, "gradient_predivide_factor 2"),
    (1, {"zero_optimization": {"legacy_stage1": True}}, "zero_optimization.legacy_stage1 true"),
    (2, {"zero_optimization": {"legacy_stage1": True}}, "zero_optimization.legacy_stage1 true"),
    (1, {"zero_optimization": {"allgather_bucket_size": 7}}, "zero_optimization.allgather_bucket_size 7"),
    (2, {"zero_optimization": {"allgather_bucket_size": 7}}, "zero_optimization.allgather_bucket_size 7"),
]
ACCEPTED: list[tuple[int, Tree]] = [
    (1, {"prescale_gradients": True, "gradient_predivide_factor": 2.0}),
    (2, {"prescale_gradients": False, "gradient_predivide_factor": 1.0}),
    (2, {"prescale_gradients": True, "zero_optimization": SCATTERS}),
    (2, {"gradient_predivide_factor": 2.0, "zero_optimization": SCATTERS}),
    (3, {"prescale_gradients": True, "zero_optimization": SCATTERS}),
    (1, {"zero_optimization": {"legacy_stage1": False, "allgather_bucket_size": 8}}),
    (3, {"zero_optimization": {"allgather_bucket_size": 7, "zero_hpz_partition_size": 4}}),
    (2, {"zero_optimization": None, "aio": None}),
]
# Values of the wrong kind, which DeepSpeed does not check.
WRONG: list[tuple[Tree, str]] = [
    ({"prescale_gradients": "yes"}, "prescale_gradients: 'yes'"),
    ({"gradient_predivide_factor": 0}, "gradient_predivide_factor: 0 should be greater than 0"),
    ({"steps_per_print": 0}, "steps_per_print: 0 should be greater than 0"),
    ({"steps_per_print": True}, "steps_per_print: True"),
    ({"aio": {"block_size": "1M"}}, "aio.block_size: '1M'"),
    ({"aio": {"blocksize": 1}}, "unknown key engine.deepspeed.aio.blocksize: did you mean block_size?"),
    ({"aio": 3}, "aio: 3 is not a section"),
    (
        {"zero_optimization": {"allgather_bucket_size": "5000"}},
        "allgather_bucket_size: '5000' is a text; leave the quotes",
    ),
    ({"zero_optimization": {"legacy_stage1": "false"}}, "legacy_stage1: 'false' is a text; leave the quotes out"),
    ({"flops_profiler": {"profile_step": 0}}, "flops_profiler.profile_step: 0"),
    ({"flops_profiler": {"enable": True}}, "unknown key engine.deepspeed.flops_profiler.enable: did you mean enabled?"),
    ({"comms_logger": {"prof_ops": "all_reduce"}}, "comms_logger.prof_ops: 'all_reduce'"),
    ({"zero_optimization": {"leaf_module": {"names": ["blocks"]}}}, "zero_optimization.leaf_module is decided by"),
    ({"zero_optimization": {"stage3_module_granularity_threshold": 9}}, "granularity_threshold 9: megagpt gathers"),
]


def config(stage: int, passed: Tree, **optimizer: float) -> Any:
    train = {"tokens": 64 * 16, "batch_tokens": 4 * 16, "micro_batch": 2, "precision": "fp32"}
    model = {"layers": 1, "width": 8, "heads": 1, "context": 16}
    engine = {"name": "zero", "stage": stage, "deepspeed": passed}
    tree = {"model": model, "train": train, "engine": engine, "optimizer": optimizer, "schedule": {"shape": "constant"}}
    return build_config(tree, "here")


@pytest.mark.parametrize(("stage", "passed", "key"), REFUSED, ids=str)
def test_what_deepspeed_refuses_is_refused_by_key(stage: int, passed: Tree, key: str) -> None:
    with pytest.raises(UserError) as caught:
        deepspeed_config(config(stage, passed), ranks=1, on_gpu=False)
    assert f"engine.deepspeed.{key}: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stage", "passed"), ACCEPTED, ids=str)
def test_what_deepspeed_takes_is_passed_through(stage: int, passed: Tree) -> None:
    made = deepspeed_config(config(stage, passed), ranks=1, on_gpu=False)
    given = {key: value for key, value in passed.items() if value is not None}
    zero = given.pop("zero_optimization", {})
    assert made == made | given
    assert made["zero_optimization"] == made["zero_optimization"] | zero


def test_an_odd_bucket_is_taken_where_deepspeed_takes_it() -> None:
    run = config(1, {"zero_optimization": {"allgather_bucket_size": 7}})
    bf16 = dataclasses.replace(run, train=dataclasses.replace(run.train, precision="bf16"))
    assert deepspeed_config(bf16, ranks=1, on_gpu=False)["zero_optimization"]["allgather_bucket_size"] == 7
    offloaded = dataclasses.replace(bf16, engine=dataclasses.replace(run.engine, offload="optimizer"))
    with pytest.raises(UserError, match="allgather_bucket_size 7: must be even; use 8"):
        deepspeed_config(offloaded, ranks=1, on_gpu=False)


@pytest.mark.parametrize(("passed", "problem"), WRONG, ids=str)
def test_values_of_the_wrong_kind_are_refused_by_key(passed: Tree, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        deepspeed_config(config(2, passed), ranks=1, on_gpu=False)
    assert problem in str(caught.value)
    assert "engine.deepspeed." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_config_command_refuses_them_too(
    tmp_path: Path, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"base": "gpt3_xl.yaml", "engine": {"name": "zero", "deepspeed": {"prescale_gradients": True}}}
    (tmp_path / "own.yaml").write_text(json.dumps(tree))
    refusal(["config", str(tmp_path / "own.yaml")], "engine.deepspeed.prescale_gradients true: ")
    main(["config", str(tmp_path / "own.yaml")])
    assert capsys.readouterr().out == ""


def test_ranks_that_share_weights_must_divide_all_ranks(refusal: Refusal) -> None:
    zero = ["gpt3_xl", "engine.name=zero", "engine.stage=3", "train.micro_batch=1"]
    sharing = "engine.deepspeed.zero_optimization.zero_hpz_partition_size=6"
    refusal(["config", *zero, sharing, "--ranks", "16"], "zero_hpz_partition_size 6: does not divide 16 ranks")


@pytest.mark.parametrize(("key", "value"), [("zero_hpz_partition_size", 2), ("zero_quantized_gradients", True)])
def test_zeropps_groups_are_refused_with_tensor_ranks(key: str, value: Any, refusal: Refusal) -> None:
    zero = ["config", "gpt3_xl", "engine.name=zero", "engine.stage=3", "train.micro_batch=1", "--ranks", "16"]
    own = f"engine.deepspeed.zero_optimization.{key}={json.dumps(value)}"
    advice = "leave it out, or set engine.tensor_ranks=1"
    refusal([*zero, own, "engine.tensor_ranks=4"], f"{key} {json.dumps(value)}: DeepSpeed would do it", advice)
    assert main([*zero, own, "engine.tensor_ranks=1"]) == 0
    assert main([*zero, "engine.tensor_ranks=4"]) == 0


def test_settings_of_gpus_are_refused_on_cpus(refusal: Refusal) -> None:
    zero = ["gpt3_xl", "engine.name=zero", "engine.stage=3", "train.device=cpu"]
    key = "engine.deepspeed.zero_optimization.zero_quantized_weights"
    refusal(["config", *zero, f"{key}=true"], f"{key} true: it needs a GPU")
    with pytest.raises(UserError, match=r"engine\.deepspeed\.aio\.use_gds true: it needs a GPU"):
        check_on_cpu(deepspeed_config(config(3, {"aio": {"use_gds": True}}), ranks=1, on_gpu=False))


@pytest.mark.parametrize("width", range(1, 12))
def test_buckets_have_an_even_number_of_elements(width: int) -> None:
    run = config(3, {})
    model = ModelConfig(layers=1, width=width, heads=1, context=8)
    elements = bucket_elements(dataclasses.replace(run, model=model))
    assert elements in (model.block_parameters, model.block_parameters - 1)
    assert elements % 2 == 0
    two = dataclasses.replace(run.engine, tensor_ranks=2)
    assert bucket_elements(run) // 2 - bucket_elements(dataclasses.replace(run, engine=two)) in (0, 1)


def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"engine\.name zero: DeepSpeed cannot be imported: .*pip install deepspeed"):
        deepspeed_library.load_deepspeed(on_gpu=False)


# --- by the engine ---


def built_unchecked(cases: list[tuple[int, Tree]]) -> list[str]:
    """The line with which each engine ends whose settings nothing has checked before DeepSpeed."""
    from megagpt.engines.engine import build_engine
    from megagpt.world import join

    zero_config.check_combination = lambda *_: None  # type: ignore[assignment]
    lines = []
    with join("cpu") as world:
        for stage, passed in cases:
            try:
                build_engine(config(stage, passed), world)
                lines.append("")
            except UserError as error:
                lines.append(str(error))
    return lines


def steps_unclipped(stages: list[int]) -> list[list[tuple[float, float]]]:
    """Loss and gradient norm of three steps without clipping, at each stage, then under DDP."""
    import torch

    from megagpt.data.loader import Batch
    from megagpt.engines.engine import build_engine
    from megagpt.world import join

    tokens = torch.randint(100, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch([(tokens[:, :-1], tokens[:, 1:].contiguous())], 4, 64)
    curves = []
    with join("cpu") as world:
        for stage in stages:
            run = config(stage or 2, {}, clip_norm=math.inf)
            if not stage:
                run = dataclasses.replace(run, engine=type(run.engine)())
            engine = build_engine(run, world)
            curves.append([engine.train_step(batch, 1e-2)[:2] for _ in range(3)])
    return curves


@pytest.mark.slow
def test_the_engine_says_in_one_line_what_deepspeed_refuses() -> None:
    """DeepSpeed itself is the reference: it refuses each of the settings that are refused before."""
    ((*lines, accepted),) = run_ranks(1, built_unchecked, [*(case[:2] for case in REFUSED), ACCEPTED[2]])
    assert accepted == ""
    for (stage, passed, _), line in zip(REFUSED, lines, strict=True):
        assert f"DeepSpeed refuses engine.stage {stage} with these settings: " in line
        assert f"change or leave out engine.deepspeed.{next(iter(passed))}" in line
        assert "\n" not in line


@pytest.mark.slow
def test_an_infinite_clip_norm_clips_under_no_engine() -> None:
    (curves,) = run_ranks(1, steps_unclipped, [1, 2, 3, 0])
    for curve in curves:
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, curves[-1], strict=True):
            assert loss == pytest.approx(expected_loss, abs=5e-6)
            assert norm == pytest.approx(expected_norm, abs=2e-5)
