"""Bytes of weights, gradients and optimizer state on each rank, by formula.

Activations, gathered weights and buffers of a single operation are not included."""

from dataclasses import dataclass

from megagpt.config import Config
from megagpt.engines.zero_config import bucket_elements

_FP32 = 4
_MOMENTS = 2 * _FP32


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank at the end of a step's last backward pass, before the update."""

    weights: float
    """Weights in the precision that the engine keeps for the forward pass."""
    gradients: float
    """Sums of gradients, and the buckets that stay allocated for them."""
    optimizer: float
    """Both Adam moments; under ZeRO also the fp32 weights."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def state_bytes(config: Config, ranks: int) -> StateBytes:
    """State per rank under any engine, with the bytes that `engine.offload` moves to the CPU's memory or to a disk.

    DDP: 4 + 4 + 8 bytes per parameter. FSDP: the same, divided by the ranks that share a copy. ZeRO keeps weights in
    the compute precision (2 bytes in bf16 and fp16) and an fp32 copy that is part of the optimizer state; all sums
    of gradients are fp32. Stage 1 sums the gradients of all weights on each rank until the step ends; in bf16 it also
    keeps the bf16 gradient of the last micro-batch. A bucket that stays allocated counts as gradients."""
    engine, parameters = config.engine, config.model.stored_parameters
    if engine.name != "zero":
        held = parameters / (config.sharing_ranks(ranks) if engine.name == "fsdp" else 1)
        return StateBytes(_FP32 * held, _FP32 * held, _MOMENTS * held)
    low = _FP32 if config.train.precision == "fp32" else 2
    held = parameters / ranks
    weights = low * (held if engine.stage == 3 else parameters)
    gradients: float = _FP32 * (parameters if engine.stage == 1 else held)
    if engine.stage == 1 and config.train.precision == "bf16":
        gradients += low * parameters
    elif engine.stage != 2:
        gradients += _FP32 * bucket_elements(config.model)
    return StateBytes(weights, gradients, (_FP32 + _MOMENTS) * held)


def gpu_state_bytes(config: Config, ranks: int) -> StateBytes:
    """The part of `state_bytes` that lies in the GPU's memory."""
    state, offload = state_bytes(config, ranks), config.engine.offload
    if offload == "all":
        return StateBytes(0.0, 0.0, 0.0)
    return StateBytes(state.weights, state.gradients, 0.0) if offload == "optimizer" else state
