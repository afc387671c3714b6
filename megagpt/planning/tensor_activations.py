"""Activations of a block on one of several tensor ranks, in bytes a token for each number of the model's width.

Each rank has its part of the residual stream, of the heads and of the MLP's inner columns: these bytes are `cut`.
Inputs of products that were gathered, partial sums and gathered gradients are `whole`. At an exchange, all tokens lie
there in two orders, by ranks and by sequences, unless a micro-batch is one sequence. Counted on traces, as in
`activations`."""

from typing import NamedTuple


class Widths(NamedTuple):
    """Bytes for each number of a token's width."""

    cut: float
    """Divided by the tensor ranks."""
    whole: float = 0.0
    """On each of them."""


# a: bytes of a number in matrix products; stream: of one in the residual stream; twice: `a` if tokens lie there in two
# orders, else 0. A LayerNorm that is not compiled keeps its input in fp32.


def kept(mode: str, a: int, stream: int, compiled: bool, dropout: bool) -> Widths:
    """Bytes that a block keeps for its backward pass."""
    if mode == "full":
        return Widths(stream)
    if mode == "selective":  # with dropout, the output of `down` instead of attention's, unless a compiler drops it
        return Widths(stream + (7 if dropout else 8) * a, (2 if dropout and not compiled else 1) * a)
    return Widths((2 * stream if compiled else 8) + 12 * a, 2 * a)


def forward(mode: str, a: int, twice: int, compiled: bool) -> Widths:
    """Bytes that the last exchange of a block's forward pass takes, beside those that the block keeps."""
    if compiled:
        return Widths(0 if mode == "none" else 4, 2 * a)
    return Widths(8, 2 * a + twice) if mode == "none" else Widths(12 + 4 * a, 3 * a + twice)


def backward(
    mode: str, a: int, stream: int, twice: int, compiled: bool, banded: bool, dropout: bool
) -> dict[str, Widths]:
    """Bytes in use when the gradient of a weight is computed, and at exchanges of tokens: at the fullest one in front
    of the first gradient, which under activation checkpointing is one of the repeated forward pass, and behind `up`."""
    if compiled and mode != "none":
        last = Widths(stream + 3 * a, 2 * a)
        if mode == "selective":
            most, held = Widths(2 * stream + 8 * a, 3 * a), Widths(2 * stream + 8 * a, 2 * a)
            return {"exchange": most, "down": held, "up": held, "attention": held, "qkv": last}
        most, held = Widths(2 * stream + 4 * a, 4 * a), Widths(stream + 8 * a, 3 * a)
        # In fp32, the gradient behind GELU is made from the one in front of it, without a cast between them.
        up = Widths(stream + 12 * a, 2 * a) if a == 4 else held
        return {"exchange": most, "down": held, "up": up, "attention": held, "qkv": last}
    inputs = 2 * stream if compiled else 8
    cast = a if stream != a and not compiled else 0
    repeated = Widths(2 * stream + 8 + (8 if mode == "selective" else 4) * a, 4 * a + twice)
    if dropout:  # its last draw is repeated, too, so the last exchange in front of it is
        repeated = Widths(16 + 12 * a + stream, 4 * a + twice)
    elif banded:  # queries, keys and values as they were before the cut into windows, and the output in two orders
        repeated = Widths(repeated.cut + 4 * a, repeated.whole)
    return {
        "exchange": Widths(inputs + 12 * a + stream + cast, 3 * a + twice) if mode == "none" else repeated,
        "down": Widths(inputs + 16 * a + stream, 3 * a),
        "up": Widths(inputs + 8 * a + stream, 3 * a),
        "sum": Widths(inputs + 4 + 4 * a + stream, 3 * a + twice),
        "attention": Widths(inputs / 2 + 8 * a + stream, a),
        "qkv": Widths(inputs / 2 + 3 * a + stream, 2 * a),
    }
