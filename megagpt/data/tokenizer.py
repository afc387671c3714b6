"""GPT-2's byte-pair encoding, offline: tiktoken's encoder over a rank table that ships with this package."""

import base64
import functools
import hashlib
from importlib import resources

import numpy as np
import regex
import tiktoken

from megagpt.errors import UserError

NAME = "gpt2"
END_OF_TEXT = 50256
VOCAB_SIZE = 50257
# SHA-256 of the rank table, the same as in tiktoken's source for r50k_base, whose ranks and split pattern are GPT-2's.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's split pattern, from encoder.py of its release.
_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def encode(text: str) -> np.ndarray:
    """Ids of a text, uint32 (N,), without end-of-text, even if the text spells it. Half a surrogate pair, which JSON
    can hold and UTF-8 cannot, becomes U+FFFD, as in tiktoken's own `encode`."""
    try:
        # No special token is allowed, and none is forbidden: text that spells one is ordinary text.
        return gpt2().encode_to_numpy(text, allowed_special=set(), disallowed_special=())
    except UnicodeEncodeError:
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError:
        # tiktoken's regular expressions fail on hundreds of thousands of spaces. Split in Python instead.
        pieces = (piece.encode() for piece in regex.findall(_PATTERN, text))
        ids = [token for piece in pieces for token in gpt2()._encode_single_piece(piece)]
        return np.array(ids, dtype=np.uint32)


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """The encoding. `encode_ordinary` never yields END_OF_TEXT, even if the text spells it; append it yourself."""
    data = resources.files("megagpt.data").joinpath("gpt2/r50k_base.tiktoken").read_bytes()
    if hashlib.sha256(data).hexdigest() != RANKS_SHA256:
        raise UserError("megagpt/data/gpt2/r50k_base.tiktoken is corrupt: reinstall megagpt")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines())}
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding(
        NAME, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=VOCAB_SIZE
    )
