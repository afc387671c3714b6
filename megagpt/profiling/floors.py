"""The least time that each part of a step can take: its FLOPs at the device's peak, or the bytes that it must move at
the memory's bandwidth, whichever takes longer. Counts are those of one rank and one step, from the shapes alone.

Bytes count what no fusion can save: inputs read once, results written once."""

from typing import NamedTuple

from megagpt.config import Config
from megagpt.planning.state import held_parameters
from megagpt.profiling.parts import Part
from megagpt.profiling.rates import Rates

# Bytes of a value in the optimizer's state, in sums of gradients and in the residual stream.
_FP32 = 4
# Bytes of an operand of a product in float8.
_FLOAT8 = 1
# Peak of float8's products over that of bf16's: 2 on every card that has them, by the makers' data sheets.
_FLOAT8_SPEEDUP = 2
# AdamW reads weight, gradient and both moments and writes all but the gradient, which the norm has read before.
_ADAMW_BYTES = 8 * _FP32


class Work(NamedTuple):
    """The work that a part must do in a step."""

    flops: float
    moved: float | None
    """Bytes through the device's memory; None: they take another way."""
    speedup: int = 1
    """Peak of these FLOPs, as a multiple of the peak in the run's precision."""


class Floor(NamedTuple):
    """The least time of a part."""

    seconds: float
    bound: str
    """The count that it comes from: "FLOPs" or "bytes"."""


def work(config: Config, ranks: int, micro_batches: float, sequences: float) -> dict[Part, Work]:
    """The work of those parts that have a floor, with the operators that activation checkpointing repeats.
    `micro_batches`, `sequences`: those that one rank computes in a step, on average; of several tensor ranks, each
    computes its part of them."""
    model, train, group = config.model, config.train, config.engine.tensor_ranks
    c, part, layers, float8 = model.width, model.width // group, model.layers, train.float8 != "none"
    value, residual = (_FP32 if number == "fp32" else 2 for number in (train.precision, train.residual))
    tokens = sequences * model.context
    again = _repeated_blocks(config) / layers
    # Of a block's four products, the last one's result is not needed again.
    operand = _FLOAT8 if float8 else value
    shapes = (c, 3 * part), (part, c), (c, 4 * part), (4 * part, c)
    repeats = again, again, again, 0
    products = [
        _product(tokens, micro_batches, *shape, value, operand, n) for shape, n in zip(shapes, repeats, strict=True)
    ]
    pairs = sum(_pairs(model.context, model.window if model.is_banded(layer) else None) for layer in range(layers))
    vocabulary = model.padded_vocab_size // group
    head = _product(tokens, micro_batches, c, vocabulary, value, value, 0).flops
    # Forward: two LayerNorms with the sums before them, and GELU. Backward: the same the other way.
    forward = 2 * (2 * residual + 2 * value) + 8 * value
    backward = 2 * (3 * residual + 2 * value) + 12 * value
    # The repetition begins with a sum that it has, so its first LayerNorm only reads that and writes its own result.
    repeated = 3 * residual + 3 * value + 8 * value
    all_again = 1 if train.activation_checkpointing == "selective" else again
    return {
        # Two products of a query and a key each way, forward once and backward twice; the causal half only.
        Part.ATTENTION: Work(
            (12 + 4 * again) * part * pairs * sequences,
            (12 + 4 * again) * part * layers * tokens * value,
        ),
        Part.PRODUCTS: Work(
            layers * sum(p.flops for p in products),
            layers * sum(p.moved or 0 for p in products),
            _FLOAT8_SPEEDUP if float8 else 1,
        ),
        Part.BLOCKS: Work(0, layers * tokens * part * (forward + all_again * repeated + backward)),
        # A token's row is read, and its gradient is added; the residual stream is written, and its gradient is read.
        Part.EMBEDDING: Work(0, tokens * part * (2 * _FP32 + 2 * residual)),
        Part.HEAD: Work(head, 3 * value * c * (tokens + micro_batches * vocabulary)),
        Part.OPTIMIZER: Work(0, None if config.engine.offload != "none" else _optimizer_bytes(config, ranks, value)),
    }


def floor(work: Work, rates: Rates) -> Floor | None:
    """None if the part moves bytes that do not go through the device's memory."""
    if work.moved is None:
        return None
    computing, moving = work.flops / (rates.flops * work.speedup), work.moved / rates.bandwidth
    return Floor(computing, "FLOPs") if computing >= moving else Floor(moving, "bytes")


def _product(
    tokens: float, micro_batches: float, inner: int, columns: int, value: int, operand: int, again: float
) -> Work:
    """A layer's three products, its output and both gradients, summed over a step's micro-batches. `value`, `operand`:
    bytes of a result's and of an operand's value; `again`: the share of outputs that are computed twice."""
    inputs, weight, outputs = tokens * inner, micro_batches * inner * columns, tokens * columns
    moved = (2 * operand + value) * (inputs + weight + outputs)
    moved_again = operand * (inputs + weight) + value * outputs
    return Work((3 + again) * 2 * tokens * inner * columns, moved + again * moved_again)


def _pairs(context: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, in a sequence."""
    seen = min(window or context, context)
    return seen * (seen + 1) // 2 + (context - seen) * seen


def _repeated_blocks(config: Config) -> int:
    """Blocks whose whole forward pass is done twice."""
    mode, layers = config.train.activation_checkpointing, config.model.layers
    if isinstance(mode, dict):
        return -(-layers // mode["every"])
    return layers if mode == "full" else 0


def _optimizer_bytes(config: Config, ranks: int, value: int) -> float:
    engine, group = config.engine, config.engine.tensor_ranks
    parameters = held_parameters(config.model, group)
    if engine.name == "ddp":
        return _ADAMW_BYTES * parameters
    if engine.name == "fsdp":
        return _ADAMW_BYTES * parameters / (config.sharing_ranks(ranks) // group)
    rounded = value if config.train.precision != "fp32" else 0
    return (_ADAMW_BYTES + rounded) * parameters / config.shares(ranks)
