"""The user's `engine.deepspeed` section: which settings of DeepSpeed it may hold, and which values DeepSpeed takes."""

import contextlib
import json
from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Ge, Gt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from megagpt.config import Config
from megagpt.engines.deepspeed_library import load_deepspeed
from megagpt.errors import ExpectedError, UserError, did_you_mean, first_line

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Count = Annotated[int, Gt(0)]


class _Disk(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    block_size: _Count
    queue_depth: _Count
    intra_op_parallelism: _Count
    single_submit: bool
    overlap_events: bool
    use_gds: bool


class _Profiler(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    enabled: bool
    recompute_fwd_factor: Annotated[float, Ge(0)]
    profile_step: _Count
    module_depth: Annotated[int, Ge(-1)]
    top_modules: _Count
    detailed: bool
    output_file: str | None


class _CommsLogger(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    enabled: bool
    prof_all: bool
    prof_ops: list[str]
    verbose: bool
    debug: bool


class _Settings(TypedDict, total=False):
    """They change no result and contradict no key of megagpt's. DeepSpeed checks the keys of `zero_optimization`
    itself; it checks neither names nor types of the others."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    zero_optimization: dict[str, Any]
    aio: _Disk
    comms_logger: _CommsLogger
    communication_data_type: str
    disable_allgather: bool
    dump_state: bool
    flops_profiler: _Profiler
    gradient_predivide_factor: Annotated[float, Gt(0)]
    memory_breakdown: bool
    prescale_gradients: bool
    steps_per_print: _Count
    wall_clock_breakdown: bool


_SECTIONS = {"zero_optimization": None, "aio": _Disk, "comms_logger": _CommsLogger, "flops_profiler": _Profiler}

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
    # Another choice of the modules that are gathered as one breaks the backward pass.
    "leaf_module": "megagpt, which gathers weights block by block",
    "zenflow": "optimizer",
    "compute_grad_norm": "optimizer.clip_norm",
    "stage3_gather_16bit_weights_on_model_save": "megagpt, whose checkpoints gather nothing",
    "stage3_gather_fp16_weights_on_model_save": "megagpt, whose checkpoints gather nothing",
}


def check_settings(section: dict[str, Any]) -> dict[str, Any]:
    """The user's section, without its empty parts. Raises UserError, naming the key, for a key that is unknown or
    decided elsewhere, and for a value of the wrong kind."""
    section = {key: value for key, value in section.items() if value is not None or key not in _SECTIONS}
    for key in section:
        _refuse_owned(f"engine.deepspeed.{key}", key, _OWNED)
    try:
        # JSON mode: no string passes for a number, no bool for an int.
        TypeAdapter(_Settings).validate_json(json.dumps(section))
    except ValidationError as error:
        raise UserError(_problem(error.errors()[0])) from None
    sums_in = section.get("communication_data_type", "fp32")
    if sums_in != "fp32":
        place = f"engine.deepspeed.communication_data_type {sums_in!r}"
        raise UserError(f"{place}: every engine sums gradients in fp32; leave it out")
    for key, value in section.get("zero_optimization", {}).items():
        place = f"engine.deepspeed.zero_optimization.{key}"
        _refuse_owned(place, key, _OWNED_ZERO)
        if value == "auto":
            raise UserError(f"{place}: 'auto' is for programs that fill it in; leave it out to get megagpt's value")
    return section


def _refuse_owned(place: str, key: str, owned: dict[str, str]) -> None:
    if key in owned:
        raise UserError(f"{place} is decided by {owned[key]}; leave it out")


def _problem(error: Any) -> str:
    *outer, key = map(str, error["loc"])
    place, value = ".".join(["engine.deepspeed", *outer, key]), error["input"]
    match error["type"]:
        case "extra_forbidden":
            section = _SECTIONS[outer[0]] if outer else None
            known = section.__annotations__ if section else (*_Settings.__annotations__, *_OWNED)
            return f"unknown key {place}: {did_you_mean(key, [k for k in known if not k.startswith('_')])}"
        case "dict_type":
            return f"{place}: {value!r} is not a section with keys of its own"
    return f"{place}: {value!r} {error['msg'].replace('Input should be', 'should be')}"


def check_zero_section(zero: dict[str, Any], on_gpu: bool) -> None:
    """Raise UserError if the merged section does not fit DeepSpeed's own names and types."""
    load_deepspeed(on_gpu)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    for key in zero:
        if key not in known:
            raise UserError(f"unknown key engine.deepspeed.zero_optimization.{key}: {did_you_mean(key, known)}")
    try:
        parsed = DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        at = f".{key}: {first['input']!r}" if key else ":"
        raise UserError(f"engine.deepspeed.zero_optimization{at} {first['msg']}") from None
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"engine.deepspeed.zero_optimization: {first_line(error)}") from None
    names = {field.alias or name: name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for key, value in zero.items():
        # DeepSpeed itself reads "false" as false, but nothing that looks at the section before it does.
        if isinstance(value, str) and isinstance(getattr(parsed, names[key]), int | float):
            raise UserError(f"engine.deepspeed.zero_optimization.{key}: {value!r} is a text; leave the quotes out")


def check_on_cpu(made: dict[str, Any]) -> None:
    """Raise UserError, naming the key, for settings of the whole config that only a GPU has."""
    zero = made["zero_optimization"]
    quantized = [key for key in zero if key.startswith("zero_quantized_") and zero[key] and zero["stage"] == 3]
    keys = [f"zero_optimization.{key}" for key in quantized]
    keys += ["aio.use_gds"] if made.get("aio", {}).get("use_gds") else []
    for key in keys:
        raise UserError(f"engine.deepspeed.{key} true: it needs a GPU, and this run is on a CPU; leave it out")


@contextlib.contextmanager
def refusals(config: Config) -> Iterator[None]:
    """Turn what DeepSpeed still refuses when it builds its engine into a UserError. Errors of the machine stay as they
    are: a retry may help."""
    try:
        yield
    except Exception as error:
        text = str(error)
        # Operators that DeepSpeed compiles on first use, for quantized weights.
        missing = isinstance(error, NotImplementedError) or "JIT load" in text or "building extension" in text
        if isinstance(error, ExpectedError) or (isinstance(error, OSError | RuntimeError) and not missing):
            raise
        keys = ", ".join(f"engine.deepspeed.{key}" for key in config.engine.deepspeed)
        advice = f"change or leave out {keys}" if keys else "use another engine.stage, or engine.name fsdp"
        problem = f"DeepSpeed refuses engine.stage {config.engine.stage} with these settings"
        raise UserError(f"{problem}: {first_line(error)}; {advice}") from error


def check_combination(made: dict[str, Any], ranks: int, tensor_ranks: int = 1) -> None:
    """Raise UserError, naming the key, for what DeepSpeed 0.19 refuses in the whole config, or computes wrongly, when
    its engine is built on `ranks` ranks, in groups of `tensor_ranks`."""
    for key, value, problem in (*_unlike_neighbours(made, tensor_ranks), *_contradictions(made, ranks)):
        raise UserError(f"engine.deepspeed.{key} {json.dumps(value)}: {problem}")


def _unlike_neighbours(made: dict[str, Any], tensor_ranks: int) -> Iterator[tuple[str, Any, str]]:
    """ZeRO++ makes its groups of neighbouring ranks, and tensor ranks are neighbours."""
    zero = made["zero_optimization"]
    if zero["stage"] < 3 or tensor_ranks == 1:
        return
    for key, off in {"zero_hpz_partition_size": 1, "zero_quantized_gradients": False}.items():
        if (value := zero.get(key, off)) > off:
            problem = "DeepSpeed would do it among neighbouring ranks, which hold different weights with "
            problem += f"engine.tensor_ranks {tensor_ranks}; leave it out, or set engine.tensor_ranks=1"
            yield f"zero_optimization.{key}", value, problem


def _contradictions(made: dict[str, Any], ranks: int) -> Iterator[tuple[str, Any, str]]:
    zero = made["zero_optimization"]
    stage, scatters = zero["stage"], zero.get("reduce_scatter", True)
    if zero.get("legacy_stage1"):
        yield "zero_optimization.legacy_stage1", True, "DeepSpeed no longer has it; leave it out"
    prescales, factor = made.get("prescale_gradients", False), made.get("gradient_predivide_factor", 1.0)
    scattering = f"DeepSpeed cannot do it at engine.stage {stage} while it scatters gradients; leave it out, or set "
    scattering += "engine.deepspeed.zero_optimization.reduce_scatter to false"
    if prescales and stage > 1 and scatters:
        yield "prescale_gradients", True, scattering
    if factor != 1 and stage == 2 and scatters:
        yield "gradient_predivide_factor", factor, scattering
    if factor != 1 and stage == 3:
        # Without reduce_scatter, DeepSpeed forgets to multiply if the factor is the number of ranks.
        yield "gradient_predivide_factor", factor, "DeepSpeed cannot do it at engine.stage 3; leave it out"
    bucket = zero["allgather_bucket_size"]
    # At stage 1 in bf16 DeepSpeed uses another optimizer, unless it is offloaded.
    aligns = stage == 2 or (stage == 1 and ("bf16" not in made or "offload_optimizer" in zero))
    if aligns and bucket % 2:
        yield "zero_optimization.allgather_bucket_size", bucket, f"must be even; use {bucket + 1}"
    if threshold := zero.get("stage3_module_granularity_threshold", 0):
        problem = "megagpt gathers weights block by block; leave it out"
        yield "zero_optimization.stage3_module_granularity_threshold", threshold, problem
    sharing = min(zero.get("zero_hpz_partition_size", 1), ranks)
    if stage == 3 and sharing > 1 and ranks % sharing:
        problem = f"does not divide {ranks} ranks; choose a divisor of them"
        yield "zero_optimization.zero_hpz_partition_size", sharing, problem
    if zero.get("zero_quantized_gradients") and not scatters:
        yield "zero_optimization.zero_quantized_gradients", True, "it needs reduce_scatter; leave one of them out"
