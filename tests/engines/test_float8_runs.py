"""Float8 in whole runs: under each engine, across resumes, and refused where it cannot work."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.engines import float8
from megagpt.engines.engine import build_engine
from megagpt.engines.float8 import check_float8
from megagpt.errors import UserError
from megagpt.measure.cases import ENGINE_CASES, LR, Case, Curve, difference, share
from megagpt.training.run_folder import run_folder
from megagpt.world import World, join
from tests.conftest import Refusal, Tiny, metrics
from tests.engines.test_float8 import TOLERANCE, Scaling, configured
from tests.processes import run_ranks

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")

GPU = torch.device("cuda", 0)


# --- under each engine ---


def curve(case: Case, scaling: Scaling, world: World) -> tuple[Curve, int]:
    """This rank's curve, and the number of converted layers."""
    engine = build_engine(configured(case, scaling), world)
    results = [engine.train_step(share(step, world.rank, case), LR) for step in range(2)]
    converted = sum(type(module).__name__ == "Float8Linear" for module in engine.model.modules())
    return [(r.loss, r.gradient_norm) for r in results], converted


def curves(ways: list[tuple[str, Scaling]]) -> list[tuple[Curve, int]]:
    float8.emulated = True
    with join("cpu") as world:
        return [curve(Case(ENGINE_CASES[n].engine, 2, 2, "selective"), scaling, world) for n, scaling in ways]


@pytest.mark.slow
def test_every_engine_trains_in_float8() -> None:
    """Near bf16, and every rank sees the same."""
    ways: list[tuple[str, Scaling]] = [("ddp", "none"), ("ddp", "tensorwise"), ("fsdp", "rowwise")]
    ways += [("zero-1", "rowwise"), ("zero-2", "tensorwise"), ("zero-3", "tensorwise")]
    one, other = run_ranks(2, curves, ways)
    assert one == other
    (bf16, _), *others = one
    for way, (found, converted) in zip(ways[1:], others, strict=True):
        assert converted == 3 * 4, way
        assert 1e-4 < difference(found, bf16)[0] < TOLERANCE, way


# --- across resumes ---

FLOAT8 = ["train.precision=bf16", "train.device=auto", "train.float8=tensorwise"]


def steps(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["gradient_norm"]) for line in metrics(run)]


@pytest.mark.slow
def test_runs_switch_to_float8_and_back_with_permission(
    tiny: Tiny, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one kind of checkpoint: fp32 weights under the same names."""
    monkeypatch.setattr(float8, "emulated", True)
    train: dict[str, Any] = {"batch_tokens": 32, "micro_batch": 1, "tokens": 128}
    config = str(tiny(train=train, checkpoint={"every_tokens": 64}, validation={"tokens": 32}, sampling={"samples": 0}))
    whole, run = (folder_of(config, name) for name in ("whole", "cut"))
    assert main(["train", config, "run.name=whole", *FLOAT8]) == 0
    assert main(["train", config, "run.name=cut", *FLOAT8, "train.tokens=64"]) == 0
    # The same numbers, if it stays float8.
    again = ["train", "--resume", str(run), "train.tokens=128"]
    assert main(again) == 0
    assert steps(run) == steps(whole)
    # Other numbers, near them, if it goes on in bf16; only with permission.
    back = [*again, "--at", "64", "train.float8=none"]
    refusal(back, "train.float8 is tensorwise in the checkpoint, none now", "--allow-recipe-change")
    assert main([*back, "--allow-recipe-change"]) == 0
    assert steps(run)[:2] == steps(whole)[:2]
    assert 0 < difference(steps(run)[2:], steps(whole)[2:])[0] < TOLERANCE
    of_bf16, of_float8 = (metrics(folder, "validation")[-1]["validation_loss"] for folder in (run, whole))
    assert 0 < abs(of_bf16 - of_float8) < TOLERANCE
    # And from bf16 back to float8.
    assert main([*again, "train.tokens=192", "train.float8=rowwise", "--allow-recipe-change"]) == 0
    assert len(steps(run)) == 6


def folder_of(config: str, name: str) -> Path:
    return run_folder(load_config(config, [f"run.name={name}"]))


# --- refused ---


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.precision=fp32"], ["train.precision bf16", "train.precision is fp32"]),
        (["train.precision=fp16"], ["train.precision bf16", "train.precision is fp16"]),
        (["train.device=cpu"], ["needs a GPU", "train.device is cpu"]),
        (["model.width=40"], ["multiples of 16", "model.width is 40", "32 and 48"]),
        (["model.context=8", "validation.tokens=0"], ["multiples of 16", "model.context is 8", "nearest: 16"]),
        (["train.float8=e4m3"], ["train.float8", "tensorwise", "rowwise"]),
    ],
)
def test_contradictions_are_refused_before_a_run(
    overrides: list[str], parts: list[str], tiny: Tiny, refusal: Refusal
) -> None:
    assert main(["config", str(tiny()), *FLOAT8]) == 0
    refusal(["config", str(tiny()), *FLOAT8, *overrides], "train.float8", *parts)


def test_a_run_without_a_gpu_is_refused(tiny: Tiny, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = str(tiny())
    refusal(["train", config, *FLOAT8], "train.float8 tensorwise needs a GPU", "runs on cpu", "train.float8=none")
    assert not folder_of(config, "tiny").exists()


def test_a_run_without_torchao_is_refused(tiny: Tiny, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "emulated", True)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    refusal(["train", str(tiny()), *FLOAT8], "train.float8 tensorwise", "pip install -e ", "[float8]")


@pytest.mark.parametrize(
    ("scaling", "card", "capability", "refused"),
    [
        ("tensorwise", "NVIDIA A100-SXM4-80GB", (8, 0), "compute capability 8.0, and it needs 8.9 or higher"),
        ("tensorwise", "NVIDIA L40S", (8, 9), ""),
        ("rowwise", "NVIDIA L40S", (8, 9), "compute capability 8.9, and it needs 9.0 or higher"),
        ("rowwise", "NVIDIA H100 80GB HBM3", (9, 0), ""),
        ("tensorwise", "NVIDIA B200", (10, 0), ""),
    ],
)
def test_the_card_decides(
    scaling: Any, card: str, capability: tuple[int, int], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(float8, "device_name", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(float8, "_try", lambda _, scaling, __: tried.append(scaling))
    config = configured(Case({}, 1), scaling)
    if not refused:
        check_float8(config, GPU)
        assert tried == [scaling]
        return
    with pytest.raises(UserError, match=f"^train.float8 {scaling}: {card} has {refused}.*train.float8=none"):
        check_float8(config, GPU)
    assert not tried


def test_a_product_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on cards for which PyTorch has no kernel, whatever their number says."""

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLt\nmore")

    monkeypatch.setattr(float8, "device_name", lambda _: "NVIDIA RTX PRO 5000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(float8, "_try", fails)
    with pytest.raises(UserError, match=r"on NVIDIA RTX PRO 5000: RuntimeError: CUDA error: CUBLAS.*; use") as e:
        check_float8(configured(Case({}, 1), "rowwise"), GPU)
    assert "\n" not in str(e.value)
