"""Token shards on disk: the format of a prepared folder, its verification, and the opening of any folder of shards.

A prepared folder holds `train_00000.npy`, ... and `val_00000.npy`, ... (uint16, or uint32 past 65,535 ids). Each has a
`.crc32.npy` beside it, with one checksum per block of 64 KiB. `manifest.json` is written last. Every read checks the
blocks it touches, so a corrupt shard is found before it is trained on, at a cost that does not grow with the corpus.
A folder without a manifest is read as shards of other programs.
"""

import hashlib
import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data import tokenizer
from megagpt.data.foreign_shards import foreign_shards, shard_files, shard_folders, split_of
from megagpt.data.token_stream import HEADER_BYTES, Shard, TokenStream, check_size, checksum_path, corrupt
from megagpt.errors import UserError
from megagpt.files import named_path

MANIFEST = "manifest.json"
JOURNAL = "journal.json"
FORMAT = "megagpt-shards-1"


def npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    """The header of a one-dimensional .npy file, always HEADER_BYTES long."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    header = buffer.getvalue()
    assert len(header) == HEADER_BYTES, len(header)
    return header


def open_stream(folder: str | Path, split: str) -> TokenStream:
    """Open one split ("train" or "val") of a folder of shards, checking names, headers and sizes but reading no tokens.
    An absent "val" gives a stream of no tokens. Raises UserError if the folder is incomplete, corrupt or not of token
    shards."""
    folder = named_path(folder)
    if folder.is_file():
        raise UserError(f"{folder}: is a file; name the folder of the shards: {folder.parent}")
    if not folder.is_dir():
        here = "" if folder.is_absolute() else f" in {Path.cwd()}"
        way = f"make the shards with `megagpt data prepare SOURCE --out {shlex.quote(str(folder))}`"
        raise UserError(f"{folder}: no such folder{here}; {way}")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        listed = manifest["splits"][split]
        shards = [_own_shard(folder, manifest, entry) for entry in listed["shards"]]
    elif (folder / JOURNAL).exists():
        raise UserError(f"{folder}: its preparation is not finished; run the same `megagpt data prepare` to resume")
    else:
        if any(folder.glob("*.crc32.npy")):
            raise UserError(f"{folder}: its {MANIFEST} is missing; prepare the data again")
        shards = foreign_shards(folder, split)
        listed = [[s.path.name, s.tokens] for s in shards]
    stream = TokenStream(str(folder), shards, _json_sha256(listed))
    if split == "train" and stream.tokens == 0:
        raise UserError(f"{folder}: the corpus is empty: it has no training token; prepare more text")
    return stream


def is_prepared(folder: str | Path) -> bool:
    """Whether the folder is there and no preparation of it is under way. What is in it may still be refused."""
    folder = named_path(folder)
    return folder.exists() and ((folder / MANIFEST).exists() or not (folder / JOURNAL).exists())


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
        raise corrupt(path)
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, without the checksum itself."""
    return _json_sha256({key: value for key, value in manifest.items() if key != "checksum"})


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _own_shard(folder: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> Shard:
    path = folder / entry["file"]
    shard = Shard(path, entry["tokens"], np.dtype(manifest["dtype"]), HEADER_BYTES, checked=True)
    check_size(path, HEADER_BYTES + shard.tokens * shard.dtype.itemsize)
    check_size(checksum_path(path), HEADER_BYTES + 4 * shard.blocks)
    return shard


def verify(folder: str | Path) -> int:
    """Check every token of a prepared folder against checksums and counts; returns the tokens. Raises UserError for
    the first file that is corrupt or missing."""
    folder = named_path(folder)
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
                raise corrupt(shard.path)
        with checksum_path(shard.path).open("rb") as file:
            if file.read(HEADER_BYTES) != npy_header(np.dtype("<u4"), shard.blocks):
                raise corrupt(checksum_path(shard.path))
        checked += _read_all(TokenStream(shard.path.name, [shard], ""))
    return checked


def unread_note(folder: str | Path) -> str:
    """A sentence that names what may be meant as shards but is not read: files that the manifest does not list, or
    whose names do not say that they are, and subfolders with such files (NAME/). Empty if there are none."""
    folder = named_path(folder)
    files = shard_files(folder)
    if (folder / MANIFEST).exists():
        splits = read_manifest(folder)["splits"]
        listed = {entry["file"] for split in ("train", "val") for entry in splits[split]["shards"]}
        read = listed | {checksum_path(Path(name)).name for name in listed}
        reason = f"{MANIFEST} does not list them"
    else:
        read = {p.name for p in files if split_of(p)}
        reason = "shards have `train` or `val` in their names and end in .bin or .npy"
    names = [p.name for p in files if p.name not in read]
    names += [f"{p.name}/" for p in shard_folders(folder)]
    return f"{folder}: not read: {first_names(names)}: {reason}" if names else ""


def unchecked_note(folder: str | Path) -> str:
    """A sentence that names the shards that have no checksums. Empty if there are none."""
    streams = [open_stream(folder, split) for split in ("train", "val")]
    names = [shard.path.name for stream in streams for shard in stream.shards if not shard.checked]
    known = "their sizes and token ids were checked, and a changed token is not noticed"
    return f"{folder}: no checksums: {first_names(names)}: {known}" if names else ""


def first_names(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _read_all(stream: TokenStream) -> int:
    for start in range(0, stream.tokens, 2**24):
        stream.read(start, min(2**24, stream.tokens - start))
    return stream.tokens
