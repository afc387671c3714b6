"""Sequence number -> (source, index in it): pure functions, no state, O(1) memory.

A sequence is context + 1 consecutive tokens of one source. Sequences of the mixture are numbered from 0 in the order in
which training takes them, so one integer is a run's position, and each rank finds its own sequences from it alone.
There are two steps. `interleave` spreads the sources over the numbers by weight. `permute` shuffles each source's
sequences in a new order in every epoch, so none comes twice before every other one of its source has come once."""

import hashlib
import math

import numpy as np

_ROUNDS = 6  # of the Feistel network


def _mix(x: np.ndarray, key: np.uint32) -> np.ndarray:
    """A 32-bit integer hash (the finalizer of MurmurHash3) of x under a key; uint64 in and out."""
    mask = np.uint64(0xFFFFFFFF)
    x = (x ^ np.uint64(key)) & mask
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & mask
    x = ((x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & mask
    return x ^ (x >> np.uint64(16))


def permute(index: np.ndarray, size: int, *key: object) -> np.ndarray:
    """A pseudo-random permutation of range(size), applied to the numbers in `index`; int64 in and out. A balanced
    Feistel network permutes the next power of four, whatever its round function. A value that falls outside the range
    is mapped again until it is inside; the result is still a permutation (Black and Rogaway 2002)."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    value = index.astype(np.uint64)
    outside = np.arange(len(value))
    while len(outside):
        left, right = value[outside] >> half, value[outside] & low
        for round_key in np.frombuffer(digest, "<u4", _ROUNDS):
            left, right = right, left ^ (_mix(right, round_key) & low)
        value[outside] = (left << half) | right
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


def integer_weights(weights: tuple[float, ...]) -> list[int]:
    """Weights, rounded to 6 decimals, as integers in exactly the same proportion."""
    parts = [round(w * 10**6) for w in weights]
    divisor = math.gcd(*parts)
    return [p // divisor for p in parts]


def interleave(number: np.ndarray, weights: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Source of each sequence number, and how many sequences of that source came before it; both int64. The list of
    sources is split in halves, recursively. At each split, the left half gets round(n w_left / w) of the first n
    numbers. That is off by at most 1/2, and each source inherits its share of the error, so after any n every source is
    within log2(sources) of its exact share."""
    source = np.zeros(len(number), dtype=np.int64)
    before = np.array(number, dtype=np.int64)

    def split(members: np.ndarray, lo: int, hi: int) -> None:
        if hi - lo == 1 or not len(members):
            source[members] = lo
            return
        middle = (lo + hi) // 2
        left, total = sum(weights[lo:middle]), sum(weights[lo:hi])
        n = before[members]
        left_before, left_after = _rounded_share(n, left, total), _rounded_share(n + 1, left, total)
        goes_left = left_after > left_before
        before[members] = np.where(goes_left, left_before, n - left_before)
        split(members[goes_left], lo, middle)
        split(members[~goes_left], middle, hi)

    split(np.arange(len(number)), 0, len(weights))
    return source, before


def _rounded_share(n: np.ndarray, part: int, total: int) -> np.ndarray:
    """round(n * part / total), exact; int64 in and out."""
    if total > 2**31:
        n = n.astype(object)  # Python's integers: products of such weights do not fit into int64
    whole = n // total
    rest = n - whole * total
    share: np.ndarray = whole * part + (rest * part + total // 2) // total
    return share.astype(np.int64)


def locate(number: np.ndarray, sizes: list[int], weights: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Source of each sequence number, and its index among the source's sequences, which are shuffled in each epoch;
    both int64 like `number`. sizes: sequences of each source; weights: from `integer_weights`."""
    source, before = interleave(number, weights)
    index = np.empty_like(before)
    for s in np.unique(source):
        mine = np.flatnonzero(source == s)
        epoch, within = np.divmod(before[mine], sizes[s])
        for e in np.unique(epoch):
            chosen = mine[epoch == e]
            index[chosen] = permute(within[epoch == e], sizes[s], seed, int(s), int(e))
    return source, index
