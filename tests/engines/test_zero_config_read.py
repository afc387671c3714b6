"""DeepSpeed's own reader of the generated config, and folders for offloaded state."""

import os
from pathlib import Path
from typing import Any

import pytest

from megagpt.config_file import build_config
from megagpt.engines.zero_config import check_nvme, deepspeed_config
from megagpt.errors import UserError
from tests.processes import run_ranks

Tree = dict[str, Any]


PRECISIONS = ["fp32", "bf16", "fp16"]


MODEL = {"layers": 2, "width": 32, "heads": 2, "context": 64}


# --- as DeepSpeed reads it ---


def read_by_deepspeed(trees: list[Tree]) -> list[Tree]:
    """The generated configs, as DeepSpeed's own reader understands them on this number of ranks."""
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
def test_deepspeed_reads_every_setting_as_meant() -> None:
    cases = [
        (stage, precision, offload)
        for stage in (1, 2, 3)
        for precision in PRECISIONS
        for offload in (("none", "optimizer", "all") if stage == 3 else ("none", "optimizer"))
    ]
    trees: list[Tree] = []
    for stage, precision, offload in cases:
        # Given buckets, each different from the others and from DeepSpeed's defaults.
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
        assert read["clip_norm"] == 0.75
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
    if os.access(folder, os.W_OK):  # root may write everywhere but in the kernel's own folders
        folder = Path("/proc")
    if not folder.is_dir():
        pytest.skip("root may write everywhere here")
    with pytest.raises(UserError) as caught:
        check_nvme(str(folder), on_gpu=False)
    assert f"engine.nvme_path {folder}: cannot be written to" in str(caught.value)


def test_a_good_folder_passes_or_libaio_is_missing(tmp_path: Path) -> None:
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
