"""The fullest moment of a training step on a GPU, by formula: named parts, whose sum is the peak."""

from dataclasses import dataclass
from typing import Literal

from megagpt.config import Config
from megagpt.planning.activations import compute_bytes, saved_bytes
from megagpt.planning.state import gpu_state_bytes

Verdict = Literal["fits", "tight", "does not fit"]

# Beside the tensors, from experience: bytes of the CUDA context, cuBLAS and NCCL, and the allocator's slack as a share of
# what comes and goes.
_CONTEXT_BYTES = 2.5e9
_SLACK = 0.06


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step."""

    moment: str
    """That moment, in plain words."""
    parts: dict[str, float]
    """Bytes by name; their sum is the peak."""
    state: float
    """Bytes of weights, gradients and optimizer, which stay from step to step; they are among the parts."""

    @property
    def total(self) -> float:
        """Bytes of all tensors at that moment."""
        return sum(self.parts.values())

    @property
    def reserve(self) -> float:
        """Bytes to keep free beside the tensors: CUDA's context, libraries' buffers, the allocator's slack."""
        return _CONTEXT_BYTES + _SLACK * (self.total - self.state)

    def spare(self, capacity: float) -> float:
        """Bytes of a GPU with `capacity` bytes that are left beside peak and reserve; negative if they exceed it."""
        return capacity - self.total - self.reserve

    def verdict(self, capacity: float) -> Verdict:
        """fits: with the reserve; tight: only the tensors do."""
        if self.spare(capacity) >= 0:
            return "fits"
        return "tight" if self.total <= capacity else "does not fit"


def peak_memory(config: Config, ranks: int) -> Memory:
    """The peak of a full step on a GPU. Raises UserError if the run cannot be divided among the ranks."""
    config.check_ranks(ranks)
    model, a = config.model, compute_bytes(config)
    c, v, tokens = model.width, model.padded_vocab_size, config.micro_batch * model.context
    state, block = gpu_state_bytes(config, ranks), model.block_parameters
    parts = {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer}
    parts["activations"] = saved_bytes(config)
    parts["head"] = 12 * c * tokens + 4 * v * c + min(8192, tokens) * v * a
    if config.engine.name == "fsdp":
        parts["gathered weights"] = a * (v + model.context) * c + 10 * block
    elif config.engine.name == "zero" and config.engine.stage == 3:
        parts["gathered weights"] = a * min(model.stored_parameters, 1e9 + block)
    elif config.engine.name == "ddp" and a == 2:
        parts["weights in the compute precision"] = a * (v * c + 12 * c * c * model.layers)
    return Memory("the head's loss", parts, state.total)
