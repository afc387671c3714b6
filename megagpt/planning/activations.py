"""Activations of a block on a GPU: bytes that its forward pass keeps, and bytes in use while its backward pass runs.

All numbers are in bytes a token. The tables count widths: 34 means 34 bytes for each of the `model.width` numbers of a
token. They were counted on traces (trace.py), and tests count them again; the sums below say what they consist of."""

from megagpt.config import Config, compiles

_STREAM = {"fp32": 4, "bf16": 2}

# Widths in use in a block's backward pass, what it kept included, when the gradient of a weight is computed: of `down`,
# `up`, of attention, of `qkv`. Key: bytes of a number in matrix products, bytes of one in the residual stream.
_EAGER = {(2, 4): (50, 34, 26, 18), (4, 4): (84, 56, 44, 28), (2, 2): (46, 32, 24, 16)}
_COMPILED = {(2, 4): (48, 32, 22, 14), (4, 4): (84, 56, 44, 28), (2, 2): (42, 28, 22, 14)}
# A compiled block under activation checkpointing computes again what its next operator needs, not all at once.
_COMPILED_SELECTIVE = {(2, 4): (36, 28, 20, 10), (4, 4): (60, 48, 40, 24), (2, 2): (30, 24, 20, 12)}
_COMPILED_FULL = {(2, 4): (34, 26, 18, 10), (4, 4): (60, 48, 40, 24), (2, 2): (30, 24, 20, 12)}
MOMENTS = ("down", "up", "attention", "qkv")

# Widths beside all kept activations while the last block's forward pass runs, if it is not compiled.
_FORWARD = {"none": 0, "selective": 18, "full": 24}

Kind = tuple[str, bool]
"""A block's activation checkpointing (none, selective or full), and whether its attention is banded."""


def compute_bytes(config: Config) -> int:
    """Bytes of a number in matrix products."""
    return 4 if config.train.precision == "fp32" else 2


def kinds_of_blocks(config: Config) -> list[Kind]:
    """The kind of each block, in order."""
    mode, model = config.train.activation_checkpointing, config.model
    every = mode["every"] if isinstance(mode, dict) else 1
    given = "full" if isinstance(mode, dict) else mode
    banded = model.window < model.context
    return [
        (given if layer % every == 0 else "none", banded and model.is_banded(layer)) for layer in range(model.layers)
    ]


def kept_per_token(config: Config, kind: Kind) -> float:
    """Bytes a token that one block keeps for its backward pass.

    none: both LayerNorms' inputs in fp32 with their mean and 1/deviation, and their outputs; queries, keys and values;
    attention's output and the logarithms of its sums; outputs of `up` and of GELU. A compiled block keeps the second
    LayerNorm's input as the output of `out`, from which it follows. selective: the block's input, the outputs of `qkv`,
    attention, `out` and `up`. full: the block's input."""
    mode, banded = kind
    c, a, stream = config.model.width, compute_bytes(config), _STREAM[config.train.residual]
    if mode == "full":
        return stream * c
    extra = _band(config) if banded and mode == "none" else 0.0
    if mode == "selective":
        # With dropout, attention runs again, and the output of `down` is kept in place of its own.
        return c * (stream + 9 * a) + (0 if config.model.dropout else _sums(config))
    masks = 2 * c if config.model.dropout else 0
    kept = c * (stream + 15 * a) if _compiled(config) else c * (8 + 14 * a)
    return kept + _sums(config) + 16 + masks + extra


def kept_bytes(config: Config) -> float:
    """Bytes of one micro-batch that all blocks keep, at the end of the forward pass."""
    kinds = kinds_of_blocks(config)
    per_token = sum(kinds.count(kind) * kept_per_token(config, kind) for kind in set(kinds))
    mask = config.model.width if config.model.dropout else 0  # of the embedding's dropout
    return config.micro_batch * config.model.context * (per_token + mask)


def backward_per_token(config: Config, kind: Kind) -> dict[str, float]:
    """Bytes a token of one block at each of `MOMENTS` of its backward pass: what it kept or has computed again, and the
    gradients on their way."""
    mode, banded = kind
    c, a, stream = config.model.width, compute_bytes(config), _STREAM[config.train.residual]
    if _compiled(config):
        tables = {"none": _COMPILED, "selective": _COMPILED_SELECTIVE, "full": _COMPILED_FULL}
        widths = tables[mode][a, stream]
        again = 0
    else:
        widths = _EAGER[a, stream]
        # LayerNorm takes a bf16 input as an fp32 copy, which is kept in its place, unless all is computed from it.
        again = stream if mode != "none" and stream == 2 else 0
    taken = {moment: float(c * (width + again)) for moment, width in zip(MOMENTS, widths, strict=True)}
    for moment in ("down", "up", "attention"):
        taken[moment] += _sums(config) + (_band(config) if banded else 0)
    if banded:
        taken["attention"] += c * a
    if config.model.dropout:
        taken["down"] += c
        taken["up"] += c
    return taken


def forward_per_token(config: Config, kind: Kind) -> float:
    """Bytes a token in the forward pass of a block that are freed at its end, if it is not compiled: then more is
    written to memory than is kept."""
    return 0.0 if _compiled(config) else float(_FORWARD[kind[0]] * config.model.width * compute_bytes(config) / 2)


def _compiled(config: Config) -> bool:
    return compiles(config.train.compile, "cuda")


def _sums(config: Config) -> int:
    """The logarithm of each softmax's sum, in fp32."""
    return 4 * config.model.heads


def _band(config: Config) -> float:
    """Banded attention keeps its output twice, keys and values with one more window, and rows of a multiple of 32."""
    model, a = config.model, compute_bytes(config)
    rows = -(-model.context // model.window) * model.window / model.context
    longer = 3 * (rows - 1) + 2 * model.window / model.context
    padded = -(-model.window // 32) * 32 / model.window * rows - 1
    return model.width * a * (1 + longer) + _sums(config) * padded
