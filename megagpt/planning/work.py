"""FLOPs and bytes of a rank in a step, counted from the config."""

from typing import NamedTuple

from megagpt.config import Config
from megagpt.planning.exchange import Exchange, exchanges
from megagpt.planning.state import held_parameters

# Share of a block's products that recomputation repeats: all but the last one, `down`, whose result nothing needs.
_REPEATED = 2 / 3
# Bytes of a parameter that cross PCIe when its state lies on the host: fp32 weights up for both passes, gradients down.
_STREAMED = 12


class Work(NamedTuple):
    """Counts of one rank: of a micro-batch, unless a line says otherwise. Tensor ranks have equal parts of each count
    but the tokens, which all of them multiply with their parts of the matrices."""

    micro_batches: int
    """In a full step."""
    tokens: int
    block_flops: float
    """Of the blocks' matrix products."""
    head_flops: float
    attention_flops: float
    """Of the causal half, backward 2.5 times forward."""
    values: float
    """Tokens x blocks x width, with what is repeated, as a multiple of a step that repeats nothing."""
    logits: float
    parameters: float
    """Weights that products read."""
    updated: float
    """Weights that the rank updates at the end of the step."""
    launches: float
    """Blocks that the host launches, forward and backward."""
    streamed: float
    """Bytes over PCIe."""
    exchanges: list[Exchange]


def count_work(config: Config, ranks: int) -> Work:
    """Raises UserError if the batch cannot be divided among the ranks."""
    model, train, engine = config.model, config.train, config.engine
    tokens = config.micro_batch * model.context
    again = repeated_share(config)
    other_again = 1.0 if train.activation_checkpointing == "selective" else again
    group, shares = engine.tensor_ranks, config.shares(ranks)
    sharing = {"ddp": 1, "zero": shares}.get(engine.name) or config.sharing_ranks(ranks) // group
    parameters, part = held_parameters(model, group), tokens / group
    return Work(
        micro_batches=config.accumulation(ranks),
        tokens=tokens,
        block_flops=24 * model.width**2 * model.layers * (3 + _REPEATED * again) * part,
        head_flops=6 * model.padded_vocab_size * model.width * part,
        attention_flops=4 * model.width * _keys(config) * (3.5 + again) * part,
        values=model.layers * model.width * (3 + other_again) / 3 * part,
        logits=model.padded_vocab_size * part,
        parameters=parameters,
        updated=parameters / sharing,
        launches=model.layers * (3 + again) / 3,
        streamed=_STREAMED * parameters / sharing if engine.offload == "all" else 0.0,
        exchanges=exchanges(config, ranks),
    )


def repeated_share(config: Config) -> float:
    """Share of blocks whose forward pass is done twice."""
    mode, layers = config.train.activation_checkpointing, config.model.layers
    if isinstance(mode, dict):
        return -(-layers // mode["every"]) / layers
    return 1.0 if mode == "full" else 0.0


def _keys(config: Config) -> float:
    """Keys that a query is multiplied with, over all layers: of a dense layer half of the context on average, of a
    banded one its own block and the one before."""
    model = config.model
    banded = model.layers // 2 if model.attention == "banded" and model.window < model.context else 0
    return (model.layers - banded) * model.context / 2 + banded * 2 * model.window
