"""Bytes that ranks exchange in a step, by engine.

Weights travel in the compute precision, gradients in fp32. A gather or a scatter over N ranks sends (N - 1)/N of a
tensor, a sum of it twice as much (Patarasuk and Yuan 2009). Tensor ranks exchange activations in the compute precision:
a gather of all tokens before each pair of matrix products, and an all-to-all of partial sums behind it."""

from typing import NamedTuple

from megagpt.config import Config
from megagpt.planning.activations import compute_bytes, kinds_of_blocks
from megagpt.planning.state import held_block, held_parameters, uncut_parameters

_FP32 = 4
# Elements in one of DDP's buckets: 25 MiB of fp32.
_DDP_BUCKET = 25 * 2**20 / _FP32
# Gathers and all-to-alls of a block, forward and backward, and those that a forward pass repeats: all but the last one,
# which only dropout repeats, because its mask comes after it.
_OF_BLOCK, _REPEATED = 8, 3
# The same outside of the blocks: of the embedding and of the final LayerNorm's output.
_OUTSIDE = 4
# Parameters of a block that tensor ranks have whole: of both LayerNorms, and two biases.
_UNCUT = 6
# Numbers a token, in fp32, that tensor ranks exchange in the loss: a largest logit, a sum, and the target's logit.
_LOSS = 3


class Exchange(NamedTuple):
    """One kind of exchange."""

    name: str
    moved: float
    """Bytes that a rank sends, each time."""
    ranks: int
    """Ranks that share it: a whole copy's, or one of each copy."""
    calls: float
    """Gathers, scatters and sums of which it consists, each time."""
    each_micro_batch: bool
    """False: once a step, with its last micro-batch or after it."""
    is_sum: bool = False
    """Whether it is an all-reduce, for which NCCL has trees beside rings."""
    rings: int = 1
    """Groups of ranks that do the same at the same time, each with every `rings`-th rank."""
    between_products: bool = False
    """Whether it is one of tensor ranks, for which the next operation waits; no computation hides it."""
    copied: float = 0.0
    """Bytes that the rank reads and writes around it, to put tokens in order and to add up what it got."""


def exchanges(config: Config, ranks: int) -> list[Exchange]:
    """The exchanges of a rank, by kind; none on one rank."""
    shares = config.shares(ranks)
    return [*_tensor_exchanges(config, shares), *(_engine_exchanges(config, ranks, shares) if shares > 1 else [])]


def _engine_exchanges(config: Config, ranks: int, shares: int) -> list[Exchange]:
    """Those of weights and gradients, among the ranks that have the same part of the model: one of each group of tensor
    ranks."""
    engine, layers, size = config.engine, config.model.layers, config.engine.tensor_ranks
    parameters, value, share = held_parameters(config.model, size), compute_bytes(config), (shares - 1) / shares
    if engine.name == "ddp":
        buckets = parameters / _DDP_BUCKET
        return [Exchange("gradients", 2 * share * _FP32 * parameters, shares, buckets, False, is_sum=True)]
    if engine.name == "fsdp":
        return _fsdp(config, ranks, value)
    if engine.stage == 3:
        # DeepSpeed fetches the weights of each module by itself: six in a block, as its published speeds show.
        gathered = Exchange("weights", 2 * share * value * parameters, shares, 2 * 6 * layers, True, rings=size)
        scattered = Exchange("gradients", share * _FP32 * parameters, shares, 6 * layers, True, rings=size)
        return [gathered, scattered]
    rounded = Exchange("weights", share * value * parameters, shares, layers, False, rings=size)
    if engine.stage == 2:
        sums = Exchange("gradients", share * _FP32 * parameters, shares, layers, True, rings=size)
        return [sums, rounded]
    # DeepSpeed's optimizer for bf16 sums on every rank.
    is_sum = config.train.precision == "bf16"
    moved = (2 if is_sum else 1) * share * _FP32 * parameters
    return [Exchange("gradients", moved, shares, layers, False, is_sum=is_sum, rings=size), rounded]


def _tensor_exchanges(config: Config, shares: int) -> list[Exchange]:
    """Those of one group of tensor ranks: of activations in each micro-batch, and of the gradients of what every rank
    has."""
    model, size = config.model, config.engine.tensor_ranks
    if size == 1:
        return []
    part, tokens = (size - 1) / size, config.micro_batch * model.context
    kinds = kinds_of_blocks(config)
    repeated = len(kinds) - kinds.count(("none", False)) - kinds.count(("none", True))
    calls = _OUTSIDE + _OF_BLOCK * model.layers + (_REPEATED + bool(model.dropout)) * repeated
    values = calls * tokens * model.width * compute_bytes(config)
    moved = part * (values + size * tokens * _LOSS * _FP32)
    # A single sequence is in order. Every second exchange adds up what it got.
    copied = values * ((2 if config.micro_batch > 1 else 0) + 0.5)
    found = [Exchange("activations", moved, size, calls, True, between_products=True, copied=copied)]
    uncut = 2 * part * _FP32 * uncut_parameters(model)
    if config.engine.name == "zero":  # each parameter by itself, as it gets its gradient
        number = 3 + _UNCUT * model.layers
        return [*found, Exchange("uncut gradients", uncut, size, number, True, True, between_products=True)]
    sharing = config.sharing_ranks(shares * size) // size
    return [*found, Exchange("uncut gradients", uncut / sharing, size, 1, False, True, between_products=True)]


def exchanged_bytes(config: Config, ranks: int, micro_batches: float) -> float:
    """Bytes that a rank sends in a step."""
    return sum(e.moved * (micro_batches if e.each_micro_batch else 1) for e in exchanges(config, ranks))


def _fsdp(config: Config, ranks: int, value: int) -> list[Exchange]:
    model, together, size = config.model, config.sharing_ranks(ranks), config.engine.tensor_ranks
    shard, copies = together // size, ranks // together
    parameters, layers, inside = held_parameters(model, size), model.layers, (shard - 1) / shard
    twice = config.engine.reshard_after_forward
    gathered = parameters + (layers * held_block(model, size) if twice else 0)
    found = []
    if shard > 1:
        gathers = (2 if twice else 1) * layers
        found.append(Exchange("weights", inside * value * gathered, shard, gathers, True, rings=size))
        found.append(Exchange("gradients", inside * _FP32 * parameters, shard, layers, True, rings=size))
    if copies > 1:
        moved = 2 * (copies - 1) / copies * _FP32 * parameters / shard
        found.append(Exchange("sums over copies", moved, copies, layers, False, is_sum=True, rings=together))
    return found
