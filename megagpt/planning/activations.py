"""Activations of a block on a GPU: bytes that its forward pass keeps, and bytes in use while its backward pass runs.

All numbers are in bytes a token. The tables count widths: 34 means 34 bytes for each of the `model.width` numbers of a
token. They were counted on traces (trace.py), and tests count them again; the sums below say what they consist of.
`tensor_activations` has the widths of tensor ranks."""

import functools

from megagpt.config import Config, compiles
from megagpt.models.presets import ModelConfig
from megagpt.planning import tensor_activations
from megagpt.planning.tensor_activations import Widths

_STREAM = {"fp32": 4, "bf16": 2}

# Widths in use in a block's backward pass, what it kept included, when the gradient of a weight is computed: of `down`,
# `up`, of attention, of `qkv`. Key: bytes of a number in matrix products, bytes of one in the residual stream.
_EAGER = {(2, 4): (50, 34, 26, 18), (4, 4): (84, 56, 44, 28), (2, 2): (46, 32, 24, 16)}
_COMPILED = {(2, 4): (48, 32, 22, 14), (4, 4): (84, 56, 44, 28), (2, 2): (42, 28, 22, 14)}
# A compiled block under activation checkpointing computes again what its next operator needs, not all at once.
_COMPILED_SELECTIVE = {(2, 4): (36, 28, 20, 10), (4, 4): (60, 48, 40, 24), (2, 2): (30, 24, 20, 12)}
_COMPILED_FULL = {(2, 4): (34, 26, 18, 10), (4, 4): (60, 48, 40, 24), (2, 2): (30, 24, 20, 12)}
MOMENTS = ("down", "up", "attention", "qkv")
# Those of tensor ranks at which tokens are exchanged: in front of the first gradient, and behind that of `up`.
EXCHANGES = ("exchange", "sum")

# Widths beside all kept activations while the last block's forward pass runs, if it is not compiled.
_FORWARD = {"none": 0, "selective": 18, "full": 24}

Kind = tuple[str, bool]
"""A block's activation checkpointing (none, selective or full), and whether its attention is banded."""


def compute_bytes(config: Config) -> int:
    """Bytes of a number in matrix products."""
    return 4 if config.train.precision == "fp32" else 2


def kinds_of_blocks(config: Config) -> tuple[Kind, ...]:
    """The kind of each block, in order."""
    mode, model = config.train.activation_checkpointing, config.model
    every = mode["every"] if isinstance(mode, dict) else 1
    given = "full" if isinstance(mode, dict) else mode
    return _kinds(given, every, model)


@functools.lru_cache(maxsize=64)
def _kinds(given: str, every: int, model: ModelConfig) -> tuple[Kind, ...]:
    banded = model.window < model.context
    modes = [given if layer % every == 0 else "none" for layer in range(model.layers)]
    return tuple((mode, banded and model.is_banded(layer)) for layer, mode in enumerate(modes))


def kept_per_token(config: Config, kind: Kind) -> float:
    """Bytes a token that one block keeps for its backward pass.

    none: both LayerNorms' inputs in fp32 with their mean and 1/deviation, and their outputs; queries, keys and values;
    attention's output and the logarithms of its sums; outputs of `up` and of GELU. A compiled block keeps the second
    LayerNorm's input as the output of `out`, from which it follows. selective: the block's input, the outputs of `qkv`,
    attention, `out` and `up`. full: the block's input."""
    mode, banded = kind
    a, stream, dropout = compute_bytes(config), _STREAM[config.train.residual], config.model.dropout > 0
    if config.engine.tensor_ranks > 1:
        widths = tensor_activations.kept(mode, a, stream, _compiled(config), dropout)
    elif mode == "none":
        widths = Widths(stream + 15 * a if _compiled(config) else 8 + 14 * a)
    else:  # with dropout, attention runs again, and the output of `down` is kept in place of its own
        widths = Widths(stream if mode == "full" else stream + 9 * a)
    kept = _bytes(config, widths)
    if mode == "none":
        kept += _bytes(config, Widths(2 if dropout else 0)) + 16 / config.engine.tensor_ranks
    if mode == "none" or (mode == "selective" and not dropout):
        kept += _sums(config)
    return kept + (_band(config) if banded and mode == "none" else 0.0)


def kept_bytes(config: Config) -> float:
    """Bytes of one micro-batch that all blocks keep, at the end of the forward pass."""
    kinds = kinds_of_blocks(config)
    per_token = sum(kinds.count(kind) * kept_per_token(config, kind) for kind in set(kinds))
    mask = _bytes(config, Widths(1 if config.model.dropout else 0))  # of the embedding's dropout
    return config.micro_batch * config.model.context * (per_token + mask)


def backward_per_token(config: Config, kind: Kind) -> dict[str, float]:
    """Bytes a token of one block at each of `MOMENTS` of its backward pass: what it kept or has computed again, and the
    gradients on their way. Of tensor ranks, also at the exchanges of `EXCHANGES`."""
    mode, banded = kind
    a, stream, compiled = compute_bytes(config), _STREAM[config.train.residual], _compiled(config)
    # LayerNorm takes a bf16 input as an fp32 copy, which is kept in its place, unless all is computed from it.
    again = stream if mode != "none" and stream == 2 and not compiled else 0
    if config.engine.tensor_ranks > 1:
        widths = tensor_activations.backward(
            mode, a, stream, _reordered(config), compiled, banded, config.model.dropout > 0
        )
    else:
        tables = {"none": _COMPILED, "selective": _COMPILED_SELECTIVE, "full": _COMPILED_FULL}
        counted = tables[mode][a, stream] if compiled else _EAGER[a, stream]
        widths = dict(zip(MOMENTS, map(Widths, counted), strict=True))
    taken = {moment: _bytes(config, width) + _bytes(config, Widths(again)) for moment, width in widths.items()}
    for moment in taken.keys() - {"qkv"}:
        taken[moment] += _sums(config) + (_band(config) if banded else 0)
    if banded:
        taken["attention"] += _bytes(config, Widths(a))
    if config.model.dropout:
        for moment in taken.keys() - {"attention", "qkv"}:
            taken[moment] += _bytes(config, Widths(1))
    return taken


def forward_per_token(config: Config, kind: Kind) -> float:
    """Bytes a token in the forward pass of a block that are freed at its end, if it is not compiled: then more is
    written to memory than is kept. Of tensor ranks, those at its last exchange."""
    a, compiled = compute_bytes(config), _compiled(config)
    if config.engine.tensor_ranks > 1:
        return _bytes(config, tensor_activations.forward(kind[0], a, _reordered(config), compiled))
    return 0.0 if compiled else _bytes(config, Widths(_FORWARD[kind[0]] * a / 2))


def _compiled(config: Config) -> bool:
    return compiles(config.train.compile, "cuda")


def _bytes(config: Config, widths: Widths) -> float:
    """Bytes a token on one rank."""
    return config.model.width * (widths.cut / config.engine.tensor_ranks + widths.whole)


def _reordered(config: Config) -> int:
    """Bytes of a number that lies in memory twice around an exchange of tensor ranks."""
    return compute_bytes(config) if config.micro_batch > 1 else 0


def _sums(config: Config) -> float:
    """The logarithm of each softmax's sum, in fp32."""
    return 4 * config.model.heads / config.engine.tensor_ranks


def _band(config: Config) -> float:
    """Banded attention keeps its output twice, keys and values with one more window, and rows of a multiple of 32."""
    model, a = config.model, compute_bytes(config)
    rows = -(-model.context // model.window) * model.window / model.context
    longer = 3 * (rows - 1) + 2 * model.window / model.context
    padded = -(-model.window // 32) * 32 / model.window * rows - 1
    return _bytes(config, Widths(a * (1 + longer))) + _sums(config) * padded
