"""The tokens of one split of one corpus, end to end. A file is mapped when first touched, and never read whole."""

import bisect
import itertools
import threading
import weakref
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data import tokenizer
from megagpt.data.mapped_file import map_file
from megagpt.errors import UserError

BLOCK_BYTES = 2**16
# Bytes to which numpy pads the header of a one-dimensional array, with room for 20 digits of length.
HEADER_BYTES = 128
# Shards that a process keeps mapped. Each has two maps if it has checksums, and Linux allows a process 65,530.
_MOST_MAPPED = 8192


def block_checksums(data: memoryview) -> np.ndarray:
    """CRC-32 of each BLOCK_BYTES of the tokens' bytes, uint32."""
    crcs = (zlib.crc32(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES))
    return np.fromiter(crcs, dtype=np.uint32)


def checksum_path(shard: Path) -> Path:
    return shard.with_suffix(".crc32.npy")


@dataclass(frozen=True)
class Shard:
    """A file of tokens."""

    path: Path
    tokens: int
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first token."""
    checked: bool
    """Whether it has a file of block checksums."""

    @property
    def blocks(self) -> int:
        """Blocks that its tokens take, the last one perhaps not full."""
        return -(-self.tokens * self.dtype.itemsize // BLOCK_BYTES)


@dataclass
class TokenStream:
    """The tokens of a list of shards, end to end."""

    name: str
    """Its folder."""
    shards: list[Shard]
    fingerprint: str
    """Changes when the tokens change (shards of other programs: when names or sizes change)."""
    vocab_size: int = tokenizer.VOCAB_SIZE
    _starts: list[int] = field(init=False, repr=False)
    _maps: dict[int, tuple[np.ndarray, np.ndarray | None]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._starts = list(itertools.accumulate((s.tokens for s in self.shards), initial=0))

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), int64 of shape (count,). Raises UserError if a shard is corrupt."""
        out = np.empty(count, dtype=np.int64)
        done, i = 0, bisect.bisect_right(self._starts, start) - 1
        while done < count:
            first = start + done - self._starts[i]
            take = min(count - done, self.shards[i].tokens - first)
            if take:
                out[done : done + take] = self._read_shard(i, first, take)
            done, i = done + take, i + 1
        if out.max(initial=0) >= self.vocab_size or out.min(initial=0) < 0:
            raise self._outside(start + int(np.argmax((out >= self.vocab_size) | (out < 0))))
        return out

    def _outside(self, place: int) -> UserError:
        i = bisect.bisect_right(self._starts, place) - 1
        token = self._read_shard(i, place - self._starts[i], 1)[0]
        problem = f"token {token} is outside GPT-2's vocabulary of {self.vocab_size}"
        return UserError(f"{self.shards[i].path}: {problem}: another tokenizer made it; prepare the text again")

    def _mapped(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """A shard's tokens and checksums; the shard used least recently, of any stream, makes room for it."""
        with _lock:
            _recent[id(self), index] = weakref.ref(self)
            _recent.move_to_end((id(self), index))
            if len(_recent) > _MOST_MAPPED:
                (_, oldest), stream = _recent.popitem(last=False)
                if owner := stream():
                    owner._maps.pop(oldest, None)
            if index not in self._maps:
                self._maps[index] = _map_shard(self.shards[index])
            return self._maps[index]

    def _read_shard(self, index: int, first: int, count: int) -> np.ndarray:
        shard = self.shards[index]
        tokens, crcs = self._mapped(index)
        if crcs is None:
            return tokens[first : first + count]
        per_block = BLOCK_BYTES // shard.dtype.itemsize
        lo, hi = first // per_block, -(-(first + count) // per_block)
        # A copy: the bytes used must be the bytes checked.
        data = np.array(tokens[lo * per_block : hi * per_block])
        if not np.array_equal(block_checksums(data.view(np.uint8).data), crcs[lo:hi]):
            raise corrupt(shard.path)
        return data[first - lo * per_block :][:count]


# The mapped shards of all streams, by stream and index, the one used least recently first. The lock is for the thread
# that reads ahead. A stream that has ended has no maps; its entries leave in their turn.
_recent: OrderedDict[tuple[int, int], weakref.ref[TokenStream]] = OrderedDict()
_lock = threading.Lock()


def _map_shard(shard: Shard) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        tokens = np.frombuffer(map_file(shard.path), shard.dtype, shard.tokens, shard.offset)
        if not shard.checked:
            return tokens, None
        return tokens, np.frombuffer(map_file(checksum_path(shard.path)), "<u4", shard.blocks, HEADER_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{shard.path}: cannot be read: {error}") from None


def corrupt(path: Path) -> UserError:
    """The error for a file whose bytes differ from its checksums."""
    return UserError(f"{path}: does not match its checksums: the file is corrupt; prepare the data again")


def check_size(path: Path, expected: int) -> None:
    """Raises UserError unless the file has that many bytes."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: is missing, but the manifest lists it; prepare the data again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if size != expected:
        verb = "truncated" if size < expected else "too long"
        raise UserError(f"{path}: {verb}: {size} bytes instead of {expected}; prepare or fetch it again")
