"""Writes token shards document by document. A shard has the suffix `.partial` until it is complete."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.shards import npy_header
from megagpt.data.token_stream import HEADER_BYTES, block_checksums, checksum_path
from megagpt.errors import UserError
from megagpt.files import write_atomic

DTYPE = np.dtype("<u2")  # GPT-2's ids stay below 65,536


class SplitWriter:
    """Appends the documents of one split to shards of at most `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, state: dict[str, Any] | None) -> None:
        state = state or {"shards": [], "tokens": 0, "documents": 0}
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards: list[dict[str, Any]] = state["shards"]
        self.tokens: int = state["tokens"]
        """Tokens in the open shard."""
        self.documents: int = state["documents"]
        """Documents that start in the open shard."""
        self.total: int = self.tokens + sum(shard["tokens"] for shard in self.shards)
        """Tokens in all shards."""
        self.documents_total: int = self.documents + sum(shard["documents"] for shard in self.shards)
        self._cut_back()
        self._open()

    def _paths(self) -> tuple[Path, Path]:
        """The open shard's name when it is full, and its name until then."""
        path = self.folder / f"{self.split}_{len(self.shards):05d}.npy"
        return path, path.with_suffix(".npy.partial")

    def _cut_back(self) -> None:
        """Remove what was written after the journal."""
        path, partial = self._paths()
        if path.exists():
            path.rename(partial)
        for stale in self.folder.glob(f"{self.split}_*"):
            index = int(stale.name[len(self.split) + 1 :][:5])
            if index > len(self.shards) or (index == len(self.shards) and stale != partial):
                stale.unlink()

    def _open(self) -> None:
        """Open the unfinished shard, cut back to the length that the journal records."""
        _, partial = self._paths()
        self.file = partial.open("r+b" if partial.exists() else "w+b")
        known = HEADER_BYTES + self.tokens * DTYPE.itemsize
        if self.tokens and self.file.seek(0, os.SEEK_END) < known:
            remedy = f"remove {self.folder} and prepare the data again"
            raise UserError(f"{partial}: is shorter than its journal says; {remedy}")
        self.file.truncate(known)
        self.file.seek(0, os.SEEK_END)

    def append(self, document: np.ndarray) -> None:
        """Start a document with these tokens."""
        self.documents += 1
        self.documents_total += 1
        self.write(document)

    def write(self, tokens: np.ndarray) -> None:
        """Continue the last document."""
        self.total += len(tokens)
        while len(tokens):
            room = self.shard_tokens - self.tokens
            self.file.write(tokens[:room].tobytes())
            self.tokens += len(tokens[:room])
            tokens = tokens[room:]
            if self.tokens == self.shard_tokens:
                self._complete()
                self._open()

    def read(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Each shard, the open one last, with its tokens: uint16 (N,), mapped."""
        self.file.flush()
        open_shard = {"file": self._paths()[1].name, "tokens": self.tokens, "documents": self.documents}
        for shard in [*self.shards, open_shard]:
            path, shape = self.folder / shard["file"], (shard["tokens"],)
            if shard["tokens"]:
                yield shard, np.memmap(path, DTYPE, mode="r", offset=HEADER_BYTES, shape=shape)

    def flush(self) -> dict[str, Any]:
        """Bring everything appended so far to the disk; returns the state for the journal."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"shards": list(self.shards), "tokens": self.tokens, "documents": self.documents}

    def _complete(self) -> None:
        self.file.seek(0)
        self.file.write(npy_header(DTYPE, self.tokens))
        self.flush()
        self.file.close()
        path, partial = self._paths()
        data = np.memmap(partial, dtype=np.uint8, mode="r")
        crcs = block_checksums(data[HEADER_BYTES:].data)
        write_atomic(checksum_path(path), npy_header(crcs.dtype, len(crcs)) + crcs.tobytes())
        digest = hashlib.sha256(data.data).hexdigest()
        partial.rename(path)
        self.shards.append({"file": path.name, "tokens": self.tokens, "documents": self.documents, "sha256": digest})
        self.tokens = self.documents = 0

    def finish(self) -> dict[str, Any]:
        """Complete the last shard; returns the split's part of the manifest."""
        if self.tokens:
            self._complete()
        else:
            self.file.close()
            Path(self.file.name).unlink()
        counts = {key: sum(s[key] for s in self.shards) for key in ("tokens", "documents")}
        return {**counts, "shards": self.shards}
