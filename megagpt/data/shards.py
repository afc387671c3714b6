"""Token shards on disk: the format, its verification, and its reading.

A prepared folder holds `train_00000.npy`, ... and `val_00000.npy`, ... (uint16, or uint32 past 65,535 ids). Each has a
`.crc32.npy` beside it, with one checksum per block of 64 KiB. `manifest.json` is written last. Every read checks the
blocks it touches, so a corrupt shard is found before it is trained on, at a cost that does not grow with the corpus.
The shards of llm.c and modded-nanogpt (`.bin` with a header) and of build-nanogpt (plain `.npy`) are read too.
"""

import bisect
import hashlib
import io
import itertools
import json
import re
import tokenize
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data import tokenizer
from megagpt.errors import UserError, first_line

MANIFEST = "manifest.json"
JOURNAL = "journal.json"
FORMAT = "megagpt-shards-1"
BLOCK_BYTES = 2**16
# Bytes to which numpy pads the header of a one-dimensional array, with room for 20 digits of length.
HEADER_BYTES = 128
# llm.c's data/README: 256 int32 (magic, version, number of tokens), then uint16 for GPT-2, uint32 for Llama 3.
_BIN_HEADER_BYTES = 1024
_BIN_GPT2 = 20240520
_BIN_LLAMA3 = 20240801


def npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    """The header of a one-dimensional .npy file, always HEADER_BYTES long."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    header = buffer.getvalue()
    assert len(header) == HEADER_BYTES, len(header)
    return header


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


@dataclass
class TokenStream:
    """The tokens of one split of one corpus, end to end. A file is mapped when first touched, never read whole."""

    name: str
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
        parts = []
        i = bisect.bisect_right(self._starts, start) - 1
        while count:
            first = start - self._starts[i]
            take = min(count, self.shards[i].tokens - first)
            parts.append(self._read_shard(i, first, take))
            start, count, i = start + take, count - take, i + 1
        found = np.concatenate(parts)
        out = found.astype(np.int64)
        if out.max(initial=0) >= self.vocab_size or out.min(initial=0) < 0:
            wrong = found[(out >= self.vocab_size) | (out < 0)][0]
            problem = f"token {wrong} is outside GPT-2's vocabulary of {self.vocab_size}"
            raise UserError(f"{self.name}: {problem}: another tokenizer made these shards; prepare the text again")
        return out

    def _read_shard(self, index: int, first: int, count: int) -> np.ndarray:
        shard = self.shards[index]
        if index not in self._maps:
            self._maps[index] = _map_shard(shard)
        tokens, crcs = self._maps[index]
        if crcs is None:
            return tokens[first : first + count]
        per_block = BLOCK_BYTES // shard.dtype.itemsize
        lo, hi = first // per_block, -(-(first + count) // per_block)
        # A copy: the bytes used must be the bytes checked.
        data = np.array(tokens[lo * per_block : hi * per_block])
        if not np.array_equal(block_checksums(data.view(np.uint8).data), crcs[lo:hi]):
            raise _corrupt(shard.path)
        return data[first - lo * per_block :][:count]


def _corrupt(path: Path) -> UserError:
    return UserError(f"{path}: does not match its checksums: the file is corrupt; prepare the data again")


def _map_shard(shard: Shard) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        tokens = np.memmap(shard.path, dtype=shard.dtype, mode="r", offset=shard.offset, shape=(shard.tokens,))
        if not shard.checked:
            return tokens, None
        blocks = _blocks(shard.tokens, shard.dtype)
        crcs = np.memmap(checksum_path(shard.path), dtype="<u4", mode="r", offset=HEADER_BYTES, shape=(blocks,))
    except (OSError, ValueError) as error:
        raise UserError(f"{shard.path}: cannot be read: {error}") from None
    return tokens, crcs


def open_stream(folder: str | Path, split: str) -> TokenStream:
    """Open one split ("train" or "val") of a folder of shards, checking names, headers and sizes but reading no tokens.
    An absent "val" gives a stream of no tokens. Raises UserError if the folder is incomplete, corrupt or not of token
    shards."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make the shards with `megagpt data prepare SOURCE --out {folder}`")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        listed = manifest["splits"][split]
        shards = [_own_shard(folder, manifest, entry) for entry in listed["shards"]]
    elif (folder / JOURNAL).exists():
        raise UserError(f"{folder}: its preparation is not finished; run the same `megagpt data prepare` to resume")
    else:
        shards = _foreign_shards(folder, split)
        listed = [[s.path.name, s.tokens] for s in shards]
    stream = TokenStream(f"{folder} ({split})", shards, _json_sha256(listed))
    if split == "train" and stream.tokens == 0:
        raise UserError(f"{folder}: the corpus is empty: it has no training token; prepare more text")
    return stream


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises UserError if it is corrupt, or has another tokenizer or format."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, name = manifest["format"], manifest["tokenizer"]["name"]
        intact = manifest["checksum"] == manifest_checksum(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable manifest ({error!r:.60}); prepare the data again") from None
    if kind != FORMAT:
        raise UserError(f"{path}: format {kind!r}, this version reads {FORMAT!r}; prepare the data again")
    ours = {"name": tokenizer.NAME, "sha256": tokenizer.RANKS_SHA256}
    if manifest["tokenizer"] != ours:
        raise UserError(f"{path}: its tokenizer is {name!r}, the models' is {ours['name']!r}; prepare the data again")
    if not intact:
        raise _corrupt(path)
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, without the checksum itself."""
    return _json_sha256({key: value for key, value in manifest.items() if key != "checksum"})


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _own_shard(folder: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> Shard:
    path = folder / entry["file"]
    dtype = np.dtype(manifest["dtype"])
    _check_size(path, HEADER_BYTES + entry["tokens"] * dtype.itemsize)
    _check_size(checksum_path(path), HEADER_BYTES + 4 * _blocks(entry["tokens"], dtype))
    return Shard(path, entry["tokens"], dtype, HEADER_BYTES, checked=True)


def _blocks(tokens: int, dtype: np.dtype[Any]) -> int:
    return -(-tokens * dtype.itemsize // BLOCK_BYTES)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: is missing, but the manifest lists it; prepare the data again") from None
    if size != expected:
        verb = "truncated" if size < expected else "too long"
        raise UserError(f"{path}: {verb}: {size} bytes instead of {expected}; prepare or fetch it again")


def _foreign_shards(folder: Path, split: str) -> list[Shard]:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".npy"))
    if any(p.name.endswith(".crc32.npy") for p in files):
        raise UserError(f"{folder}: its {MANIFEST} is missing; prepare the data again")
    if not files:
        raise UserError(f"{folder}: no token shards in it (no {MANIFEST}, .bin or .npy); run `megagpt data prepare`")
    named = [p for p in files if _split_of(p) == split]
    if split == "train" and not named:
        names = ", ".join(p.name for p in files[:3])
        raise UserError(f"{folder}: no shard has 'train' in its name (found {names}, ...); rename the training shards")
    return [_bin_shard(p) if p.suffix == ".bin" else _npy_shard(p) for p in named]


def _split_of(path: Path) -> str | None:
    """Names are such as fineweb_train_000001 and edufineweb_val_000000; the first word that names a split decides."""
    words = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
    return next((words[word] for word in re.split("[^a-z]+", path.stem.lower()) if word in words), None)


def _bin_shard(path: Path) -> Shard:
    with path.open("rb") as file:
        raw = file.read(_BIN_HEADER_BYTES)
    if len(raw) < _BIN_HEADER_BYTES:
        raise UserError(f"{path}: truncated: shorter than the header of a token shard; fetch it again")
    magic, version, tokens = (int(v) for v in np.frombuffer(raw, dtype="<i4")[:3])
    if magic == _BIN_LLAMA3:
        raise UserError(f"{path}: its tokenizer is Llama 3's, the models use GPT-2's; prepare the text again")
    if magic != _BIN_GPT2 or version != 1:
        raise UserError(f"{path}: magic {magic}, version {version}: not an llm.c token shard (magic {_BIN_GPT2}, 1)")
    _check_size(path, _BIN_HEADER_BYTES + 2 * tokens)
    return Shard(path, tokens, np.dtype("<u2"), _BIN_HEADER_BYTES, checked=False)


def _npy_shard(path: Path) -> Shard:
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            offset = file.tell()
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{path}: not a .npy file: {first_line(error)}") from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise UserError(f"{path}: holds {dtype} of shape {shape}; token shards hold one-dimensional integers")
    _check_size(path, offset + shape[0] * dtype.itemsize)
    return Shard(path, shape[0], dtype, offset, checked=False)


def verify(folder: str | Path) -> int:
    """Check every token of a prepared folder against checksums and counts; returns the tokens. Raises UserError for
    the first file that is corrupt or missing."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (folder / MANIFEST).exists():
        return sum(_read_all(open_stream(folder, split)) for split in ("train", "val"))
    manifest = read_manifest(folder)
    checked = 0
    for entry in manifest["splits"]["train"]["shards"] + manifest["splits"]["val"]["shards"]:
        shard = _own_shard(folder, manifest, entry)
        with shard.path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise _corrupt(shard.path)
        with checksum_path(shard.path).open("rb") as file:
            if file.read(HEADER_BYTES) != npy_header(np.dtype("<u4"), _blocks(shard.tokens, shard.dtype)):
                raise _corrupt(checksum_path(shard.path))
        checked += _read_all(TokenStream(shard.path.name, [shard], ""))
    return checked


def _read_all(stream: TokenStream) -> int:
    for start in range(0, stream.tokens, 2**24):
        stream.read(start, min(2**24, stream.tokens - start))
    return stream.tokens
