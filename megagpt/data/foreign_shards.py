"""Token shards that other programs wrote: llm.c and modded-nanogpt (`.bin` with a header), build-nanogpt (plain `.npy`)
and nanoGPT (`train.bin` and `val.bin`, uint16 without a header). They have no checksums."""

import re
import tokenize
from pathlib import Path

import numpy as np

from megagpt.data.token_stream import Shard, check_size
from megagpt.data.tokenizer import VOCAB_SIZE
from megagpt.errors import UserError, first_line

# llm.c's data/README: 256 int32 (magic, version, number of tokens), then uint16 for GPT-2, uint32 for Llama 3. Neither
# magic can begin a file without a header: its lower half, taken for a uint16 token, is outside GPT-2's vocabulary.
_HEADER_BYTES = 1024
_GPT2 = 20240520
_LLAMA3 = 20240801
# The names that nanoGPT's data/*/prepare.py writes. Other files without a header could be anything.
_HEADLESS = ("train.bin", "val.bin")
_ENDINGS = (".bin", ".npy")


def foreign_shards(folder: Path, split: str) -> list[Shard]:
    """The split's shards, ordered by name, without reading their tokens. Raises UserError if a file is corrupt or of
    another kind, or if the split is "train" and no file is named so."""
    files = [p for p in shard_files(folder) if p.suffix in _ENDINGS]
    if not files and (below := shard_folders(folder)):
        names = ", ".join(str(p) for p in below[:5])
        raise UserError(f"{folder}: no token shards in it, but in folders below it; name them as sources: {names}")
    if not files:
        raise UserError(f"{folder}: no token shards in it (no manifest, .bin or .npy); run `megagpt data prepare`")
    named = [p for p in files if split_of(p) == split]
    if split == "train" and not named:
        names = ", ".join(p.name for p in files[:3])
        raise UserError(f"{folder}: no shard has 'train' in its name (found {names}, ...); rename the training shards")
    try:
        return [_bin_shard(p) if p.suffix == ".bin" else _npy_shard(p) for p in named]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None


def shard_files(folder: Path) -> list[Path]:
    """The files that may be meant as token shards, by name: hidden and compressed ones, too."""
    endings = {*_ENDINGS, ".npz"}
    return sorted(p for p in folder.iterdir() if endings & {s.lower() for s in p.suffixes} and not p.is_dir())


def shard_folders(folder: Path) -> list[Path]:
    """The folders right below this one that have such files."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and _has_shard_files(p))


def _has_shard_files(folder: Path) -> bool:
    try:
        return bool(shard_files(folder))
    except OSError:  # removed meanwhile, or not to be read
        return False


def split_of(path: Path) -> str | None:
    """The split of a shard, by its name alone; None if the name is not one of a shard. Names are such as
    fineweb_train_000001.bin and edufineweb_val_000000.npy; the first word that names a split decides. Hidden files are
    no shards: macOS keeps attributes in files such as ._train_0.bin."""
    if path.suffix not in _ENDINGS or path.name.startswith("."):
        return None
    words = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
    return next((words[word] for word in re.split("[^a-z]+", path.stem.lower()) if word in words), None)


def _bin_shard(path: Path) -> Shard:
    with path.open("rb") as file:
        raw = file.read(_HEADER_BYTES)
    header = np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<i4")
    magic = int(header[0]) if len(header) else 0
    # Every header of this form is zero after its first three numbers; no text begins with 500 times the token 0, "!".
    headless = magic not in (_GPT2, _LLAMA3) and (len(raw) < _HEADER_BYTES or bool(header[3:].any()))
    if headless and path.name in _HEADLESS:
        return _headless_shard(path, np.frombuffer(raw[: len(raw) // 2 * 2], dtype="<u2"))
    if len(raw) < _HEADER_BYTES:
        raise UserError(f"{path}: truncated: shorter than the header of a token shard; fetch it again")
    magic, version, tokens = (int(v) for v in header[:3])
    if magic == _LLAMA3:
        raise UserError(f"{path}: its tokenizer is Llama 3's, the models use GPT-2's; prepare the text again")
    if magic != _GPT2 or version != 1:
        problem = f"magic {magic}, version {version}: not an llm.c token shard (magic {_GPT2}, 1)"
        way = f"; uint16 tokens without a header are read from files named {' and '.join(_HEADLESS)}"
        raise UserError(f"{path}: {problem}{way if headless else ''}")
    check_size(path, _HEADER_BYTES + 2 * tokens)
    return Shard(path, tokens, np.dtype("<u2"), _HEADER_BYTES, checked=False)


def _headless_shard(path: Path, head: np.ndarray) -> Shard:
    """head: the first tokens, uint16. Nothing in the file tells what it is, so that whatever can be known is checked
    here; the ids of its other tokens are checked as they are read."""
    if (path.parent / "meta.pkl").exists():
        problem = "the meta.pkl beside it holds a vocabulary of its own, as for single characters"
        raise UserError(f"{path}: {problem}; the models use GPT-2's: prepare the text again")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"{path}: truncated: {size} bytes are no whole number of uint16 tokens; fetch it again")
    if len(head) >= 8 and head[1::2].max() < 8:  # the upper halves of ids below 524,288
        raise UserError(f"{path}: its numbers have 32 bits or more, nanoGPT's have 16: write it again as uint16")
    if head.max() >= VOCAB_SIZE:
        token = f"token {head[head >= VOCAB_SIZE][0]} is outside GPT-2's vocabulary of {VOCAB_SIZE}"
        problem = f"neither an llm.c shard nor uint16 tokens without a header: {token}"
        raise UserError(f"{path}: {problem}; prepare the text again")
    return Shard(path, size // 2, np.dtype("<u2"), 0, checked=False)


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
    check_size(path, offset + shape[0] * dtype.itemsize)
    return Shard(path, shape[0], dtype, offset, checked=False)
