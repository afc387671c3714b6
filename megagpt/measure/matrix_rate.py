"""The machine's own matrix rate: that of the matrix products of a training step, each timed alone. Their share of the
step's time says how much is left to gain, and moves less from machine to machine than the step's speed. Attention's
products are not among them: they are part of its kernel."""

from typing import NamedTuple

import torch

from megagpt.models.presets import ModelConfig
from megagpt.timing import time_call

# Largest number of elements of an operand. More rows do not change the rate, and would not fit beside a large model.
_LARGEST_OPERAND = 2**31


class Linear(NamedTuple):
    """Linear layers of one shape. Each takes part in three products of a step: for its output, for its input's gradient
    and for its weight's gradient."""

    name: str
    inputs: int
    outputs: int
    layers: int
    """Layers of this shape in the model."""

    def flops(self, tokens: int) -> int:
        """FLOPs of all their products, forward and backward."""
        return 6 * tokens * self.inputs * self.outputs * self.layers


def linears(model: ModelConfig) -> list[Linear]:
    """All linear layers of a model. The head has the padded vocabulary, as in the step."""
    c, layers = model.width, model.layers
    return [
        Linear("qkv", c, 3 * c, layers),
        Linear("out", c, c, layers),
        Linear("up", c, 4 * c, layers),
        Linear("down", 4 * c, c, layers),
        Linear("head", c, model.padded_vocab_size, 1),
    ]


def matrix_flops(model: ModelConfig, tokens: int) -> int:
    """FLOPs of the matrix products of a micro-batch of `tokens`, forward and backward."""
    return sum(linear.flops(tokens) for linear in linears(model))


def matrix_seconds(model: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds that these products take one after another, with operands and results in `dtype`."""
    return sum(linear.layers * _seconds(linear, tokens, dtype, device) for linear in linears(model))


def _seconds(linear: Linear, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the three products of one layer."""
    pieces = -(-tokens * max(linear.inputs, linear.outputs) // _LARGEST_OPERAND)
    rows = -(-tokens // pieces)
    # Normal values of the size that they have in a model: a GPU's clock depends on the power that its operands cost.
    x = torch.randn(rows, linear.inputs, dtype=dtype, device=device)
    weight = torch.randn(linear.outputs, linear.inputs, dtype=dtype, device=device) / linear.inputs**0.5
    y = x @ weight.T  # serves as its own gradient, too
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    calls = (
        lambda: torch.mm(x, weight.T, out=y),
        lambda: torch.mm(y, weight, out=grad_x),
        lambda: torch.mm(y.T, x, out=grad_weight),
    )
    return sum(time_call(call, device) for call in calls) * tokens / rows
