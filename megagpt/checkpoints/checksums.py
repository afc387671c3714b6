"""Checksums of a checkpoint's files. Each block of BLOCK_BYTES is hashed when it is written, and compared when it is
read, before anything uses it: every read verifies its blocks, and no extra pass is needed. (Token shards have smaller
blocks with CRC-32, because a training batch reads single sequences of them.)"""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megagpt.errors import UserError

# Bytes with one checksum. A reader of a small tensor reads a whole block; a checkpoint of 2 TB has half a million.
BLOCK_BYTES = 2**22
_KEPT_BLOCKS = 4


class CorruptError(UserError):
    """A file of a checkpoint is missing, too short, or differs from what was written."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(file, what)  # both arguments, so that the error can be pickled for other ranks
        self.file, self.what = file, what

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


@dataclass
class FileSum:
    """Size and checksums of a file when it was written."""

    size: int = 0
    blocks: list[str] = field(default_factory=list)
    """xxh3-64 of each BLOCK_BYTES, in hexadecimal."""


def sum_bytes(data: bytes) -> FileSum:
    """The checksums of a small file's content."""
    parts = (memoryview(data)[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES))
    blocks = [xxhash.xxh3_64_hexdigest(part) for part in parts]
    return FileSum(len(data), blocks)


def check_size(path: Path, expected: FileSum) -> None:
    """Raises CorruptError if a file is missing or of another size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptError(path, "is missing") from None
    if size != expected.size:
        raise CorruptError(path, f"has {size} bytes instead of {expected.size}")


class HashingWriter(io.RawIOBase):
    """Passes bytes on to a file and hashes them."""

    def __init__(self, file: io.BufferedWriter, result: FileSum) -> None:
        self._file, self._result = file, result
        self._hash, self._room = xxhash.xxh3_64(), BLOCK_BYTES

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        self._file.write(rest)
        while len(rest):
            part, rest = rest[: self._room], rest[self._room :]
            self._hash.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._end_block()
        self._result.size += length
        return length

    def _end_block(self) -> None:
        self._result.blocks.append(self._hash.hexdigest())
        self._hash.reset()
        self._room = BLOCK_BYTES

    def tell(self) -> int:
        return self._result.size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        if not self.closed and self._room < BLOCK_BYTES:
            self._end_block()
        super().close()


class CheckedReader(io.RawIOBase):
    """Reads a file, and compares each block with its checksum before it returns any byte of it. The last blocks stay in
    memory, because each tensor's zip directory, at its end, is read before and after the tensor itself. Raises
    CorruptError, naming the file, if a checksum differs."""

    def __init__(self, path: Path, expected: FileSum) -> None:
        check_size(path, expected)
        self._path, self._expected = path, expected
        self._file = path.open("rb", buffering=0)
        self._position = 0
        self._kept: dict[int, memoryview] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._expected.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, target: Any) -> int:
        out = memoryview(target).cast("B")
        count = min(len(out), max(0, self._expected.size - self._position))
        done = 0
        while done < count:
            block, start = divmod(self._position, BLOCK_BYTES)
            content = self._content(block)
            part = min(count - done, len(content) - start)
            out[done : done + part] = content[start : start + part]
            done += part
            self._position += part
        return done

    def _content(self, block: int) -> memoryview:
        content = self._kept.pop(block, None)
        if content is None:
            oldest = self._kept.pop(next(iter(self._kept))) if len(self._kept) == _KEPT_BLOCKS else None
            content = self._read(block, oldest)
        self._kept[block] = content  # now the most recent one
        return content

    def _read(self, block: int, buffer: memoryview | None) -> memoryview:
        start = block * BLOCK_BYTES
        size = min(BLOCK_BYTES, self._expected.size - start)
        # Reuse an old block's memory, unless the sizes differ: the last block of a file is shorter.
        content = buffer if buffer is not None and len(buffer) == size else memoryview(bytearray(size))
        filled = 0
        while filled < size:
            read = os.preadv(self._file.fileno(), [content[filled:]], start + filled)
            if not read:
                raise CorruptError(self._path, f"ends before its byte {start + size}")
            filled += read
        if xxhash.xxh3_64_hexdigest(content) != self._expected.blocks[block]:
            raise CorruptError(self._path, f"is corrupt between its bytes {start} and {start + size} (wrong checksum)")
        return content

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()
