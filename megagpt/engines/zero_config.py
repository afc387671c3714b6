"""DeepSpeed's config, generated from megagpt's; the user's `engine.deepspeed` section is checked and merged over it."""

import os
import tempfile
from pathlib import Path
from typing import Any

from megagpt.config import Config
from megagpt.engines.deepspeed_library import load_deepspeed
from megagpt.engines.zero_settings import check_combination, check_on_cpu, check_settings, check_zero_section
from megagpt.errors import UserError

# Largest bucket of gradients or weights, in elements: 200 MB in fp32, more than links need to run at full rate.
# DeepSpeed's own 5e8 would take 2 GB for each bucket.
_LARGEST_BUCKET = 50_000_000


def bucket_elements(config: Config) -> int:
    """Elements in a bucket: the weights of a block, of several tensor ranks those of each one's part, but at most the
    largest bucket. An even number, which DeepSpeed asks for."""
    return min(_LARGEST_BUCKET, config.model.block_parameters // config.engine.tensor_ranks) // 2 * 2


def deepspeed_config(config: Config, ranks: int, on_gpu: bool) -> dict[str, Any]:
    """The whole DeepSpeed config of a run on `ranks` ranks. Raises UserError, naming the key, if `engine.deepspeed`
    holds a key or value that it may not."""
    model, train, engine = config.model, config.train, config.engine
    bucket = bucket_elements(config)
    zero: dict[str, Any] = {
        "stage": engine.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # At stage 3 the gathers of the next block's weights run beside the computation, without races since DeepSpeed
        # 0.19.8 (deepspeed#7898). Off below, where races with contiguous gradients came back more than once.
        "overlap_comm": engine.stage == 3,
        "contiguous_gradients": True,
        "round_robin_gradients": False,
    }
    if engine.stage == 3:
        zero |= {
            "memory_efficient_linear": False,
            "stage3_prefetch_bucket_size": bucket,
            # Elements: biases and LayerNorm gains, at most 4 widths long, stay whole on every rank; matrices do not.
            "stage3_param_persistence_threshold": 4 * model.width,
        }
    device = "nvme" if engine.nvme_path else "cpu"
    target = {"device": device, "pin_memory": on_gpu} | ({"nvme_path": engine.nvme_path} if engine.nvme_path else {})
    if engine.offload != "none":
        zero["offload_optimizer"] = target
    if engine.offload == "all":
        zero["offload_param"] = target
    generated: dict[str, Any] = {
        "train_batch_size": config.batch_sequences,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation(ranks),
        "gradient_clipping": config.optimizer.clip_norm,
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,
        # PyTorch's fused AdamW updates on CPUs too, as under the other engines.
        "zero_force_ds_cpu_optimizer": False,
        # Gradients are summed in fp32, over micro-batches and over ranks.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }
    if train.precision == "bf16":
        generated["bf16"] = {"enabled": True}
    if train.precision == "fp16":
        # Constant for DeepSpeed; the engine overrides it before each step.
        generated["fp16"] = {"enabled": True, "loss_scale": 1.0}
    passed = check_settings(engine.deepspeed)
    if "zero_optimization" in passed:
        zero |= passed["zero_optimization"]
        check_zero_section(zero, on_gpu)
    made = generated | passed | {"zero_optimization": zero}
    check_combination(made, ranks, engine.tensor_ranks)
    if train.device == "cpu":
        check_on_cpu(made)
    return made


def check_nvme(folder: str, on_gpu: bool) -> None:
    """Raise UserError if the folder cannot take offloaded state."""
    if not Path(folder).is_dir():
        raise UserError(f"engine.nvme_path {folder}: no such folder on this machine; make it on each node's local disk")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"engine.nvme_path {folder}: cannot be written to ({reason}); choose another folder") from None
    load_deepspeed(on_gpu)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            f"engine.nvme_path {folder}: DeepSpeed needs libaio and a C++ compiler to use a disk; install them "
            "(Debian: apt install libaio-dev g++), or leave engine.nvme_path out to offload to memory"
        )
