"""DeepSpeed's config, generated from megagpt's; the user's `engine.deepspeed` section is checked and merged over it."""

import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megagpt.config import Config
from megagpt.engines.deepspeed_library import load_deepspeed
from megagpt.errors import UserError, did_you_mean, first_line
from megagpt.models.presets import ModelConfig

# Largest bucket of gradients or weights, in elements: 200 MB in fp32, more than links need to run at full rate.
# DeepSpeed's own 5e8 would take 2 GB for each bucket.
_LARGEST_BUCKET = 50_000_000

# DeepSpeed keys that a user may set, with their types: they change no result and contradict no key of megagpt's.
_PASSED_THROUGH: dict[str, type | tuple[type, ...]] = {
    "zero_optimization": dict,
    "aio": dict,
    "comms_logger": dict,
    "communication_data_type": str,
    "disable_allgather": bool,
    "dump_state": bool,
    "flops_profiler": dict,
    "gradient_predivide_factor": (int, float),
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
}

# DeepSpeed keys that a user may not set, with the megagpt key that decides each.
_OWNED = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch",
    "managed_gradient_accumulation": "train.batch_tokens and train.micro_batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    **dict.fromkeys(("fp16", "bf16", "amp", "torch_autocast", "data_types"), "train.precision"),
    "compile": "train.compile",
    "activation_checkpointing": "train.activation_checkpointing",
    "seed": "run.seed",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "engine.offload",
    "tensorboard": "the run's own TensorBoard events",
    "checkpoint": "checkpoint",
    "curriculum_learning": "data",
    "data_efficiency": "data",
    "elasticity": "train.batch_tokens: the batch is the same on any number of ranks",
}  # fmt: skip
_OWNED_ZERO = {
    "stage": "engine.stage",
    **dict.fromkeys(("offload_optimizer", "offload_param"), "engine.offload and engine.nvme_path"),
    **dict.fromkeys(("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"), "engine.offload"),
    # The first breaks gradients under activation checkpointing, the second the map from weights to their fp32 copies.
    "memory_efficient_linear": "megagpt, as false: it adds biases twice under selective activation checkpointing",
    "round_robin_gradients": "megagpt, as false: its order of the weights is not that of their optimizer state",
    "elastic_checkpoint": "megagpt, whose checkpoints fit any number of ranks",
    "load_from_fp32_weights": "megagpt, which always does",
    "zenflow": "optimizer",
    "compute_grad_norm": "optimizer.clip_norm",
    "stage3_gather_16bit_weights_on_model_save": "megagpt, whose checkpoints gather nothing",
    "stage3_gather_fp16_weights_on_model_save": "megagpt, whose checkpoints gather nothing",
}


def bucket_elements(model: ModelConfig) -> int:
    """Elements in a bucket: the weights of a block, but at most the largest bucket."""
    return min(_LARGEST_BUCKET, model.block_parameters)


def deepspeed_config(config: Config, ranks: int, on_gpu: bool) -> dict[str, Any]:
    """The whole DeepSpeed config of a run on `ranks` ranks. Raises UserError, naming the key, if `engine.deepspeed`
    holds a key or value that it may not."""
    model, train, engine = config.model, config.train, config.engine
    bucket = bucket_elements(model)
    zero: dict[str, Any] = {
        "stage": engine.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # Off: it has had races with contiguous gradients more than once.
        "overlap_comm": False,
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
        "train_micro_batch_size_per_gpu": train.micro_batch,
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
    _check_passed_through(engine.deepspeed)
    if "zero_optimization" in engine.deepspeed:
        zero |= engine.deepspeed["zero_optimization"]
        _check_zero_section(zero, on_gpu)
    return generated | engine.deepspeed | {"zero_optimization": zero}


def _check_passed_through(section: dict[str, Any]) -> None:
    for key, value in section.items():
        place = f"engine.deepspeed.{key}"
        _refuse_owned(place, key, _OWNED)
        if key not in _PASSED_THROUGH:
            raise UserError(f"unknown key {place}: {did_you_mean(key, (*_PASSED_THROUGH, *_OWNED))}")
        kind = _PASSED_THROUGH[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            name = "a section with keys of its own" if kind is dict else f"a {getattr(kind, '__name__', 'number')}"
            raise UserError(f"{place}: {value!r} is not {name}")
    sums_in = section.get("communication_data_type", "fp32")
    if sums_in != "fp32":
        place = f"engine.deepspeed.communication_data_type {sums_in!r}"
        raise UserError(f"{place}: every engine sums gradients in fp32; leave it out")
    for key, value in section.get("zero_optimization", {}).items():
        place = f"engine.deepspeed.zero_optimization.{key}"
        _refuse_owned(place, key, _OWNED_ZERO)
        if value == "auto":
            raise UserError(f"{place}: 'auto' is for programs that fill it in; leave it out to get megagpt's value")


def _refuse_owned(place: str, key: str, owned: dict[str, str]) -> None:
    if key in owned:
        raise UserError(f"{place} is decided by {owned[key]}; leave it out")


def _check_zero_section(zero: dict[str, Any], on_gpu: bool) -> None:
    """Raise UserError if the merged section does not fit DeepSpeed's own names and types."""
    load_deepspeed(on_gpu)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    for key in zero:
        if key not in known:
            raise UserError(f"unknown key engine.deepspeed.zero_optimization.{key}: {did_you_mean(key, known)}")
    try:
        DeepSpeedZeroConfig(**zero)
    except AssertionError as error:
        raise UserError(f"engine.deepspeed.zero_optimization: {first_line(error)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        at = f".{key}: {first['input']!r}" if key else ":"
        raise UserError(f"engine.deepspeed.zero_optimization{at} {first['msg']}") from None


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
