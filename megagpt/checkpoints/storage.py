"""A checkpoint's files: PyTorch's distributed checkpoint format, checksummed block by block.

The files are those of `torch.distributed.checkpoint`, which its own tools read. Each block of BLOCK_BYTES is hashed on
its way to the disk, and compared on its way back before anything uses it: damage is found by whoever reads the block,
at no second reading.
"""

import contextlib
import io
import os
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megagpt.errors import UserError

# A reader of one small tensor reads a whole block; a checkpoint of 2 TB has half a million of them.
BLOCK_BYTES = 2**22


class DamagedError(UserError):
    """A file of a checkpoint is missing, too short, or not what was written."""


@dataclass
class FileSum:
    """What a file held when it was written."""

    size: int = 0
    blocks: list[str] = field(default_factory=list)
    """xxh3-64 of each BLOCK_BYTES, in hexadecimal."""


def sum_bytes(data: bytes) -> FileSum:
    """The checksums of a small file's content."""
    view = memoryview(data)
    blocks = [xxhash.xxh3_64_hexdigest(view[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES)]
    return FileSum(len(data), blocks)


class _HashingWriter(io.RawIOBase):
    """Passes bytes on to a file and hashes them."""

    def __init__(self, file: io.BufferedWriter, result: FileSum) -> None:
        self._file, self._result = file, result
        self._hash = xxhash.xxh3_64()
        self._room = BLOCK_BYTES

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
    """Reads a file, each block compared with its checksum before any byte of it is handed out.

    Raises DamagedError, naming the file, where they differ.
    """

    def __init__(self, path: Path, expected: FileSum) -> None:
        self._path, self._expected = path, expected
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing") from None
        size = os.fstat(self._file.fileno()).st_size
        if size != expected.size:
            self._file.close()
            raise DamagedError(f"{path} has {size} bytes instead of {expected.size}")
        self._buffer = memoryview(bytearray(min(BLOCK_BYTES, expected.size)))
        self._block = -1
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._expected.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
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
        start = block * BLOCK_BYTES
        content = self._buffer[: min(BLOCK_BYTES, self._expected.size - start)]
        if block != self._block:
            self._block = -1
            self._file.seek(start)
            filled = 0
            while filled < len(content):
                read = self._file.readinto(content[filled:])
                if not read:
                    raise DamagedError(f"{self._path} ends before its byte {start + len(content)}")
                filled += read
            if xxhash.xxh3_64_hexdigest(content) != self._expected.blocks[block]:
                raise DamagedError(
                    f"{self._path} is damaged between its bytes {start} and {start + len(content)} (wrong checksum)"
                )
            self._block = block
        return content

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _ChecksummedFiles(FileSystem):
    """Opens files for PyTorch's writer and reader with checksums by file name."""

    def __init__(self, sums: dict[str, FileSum]) -> None:
        self.sums = sums

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        path = Path(path)
        if mode == "rb":
            if path.name not in self.sums:
                raise DamagedError(f"{path} is not in the list of the checkpoint's files")
            with CheckedReader(path, self.sums[path.name]) as reader:
                yield reader
            return
        self.sums[path.name] = FileSum()
        with path.open(mode) as file, _HashingWriter(cast(io.BufferedWriter, file), self.sums[path.name]) as writer:
            yield writer

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class Writer(FileSystemWriter):
    """Writes one file for each rank; afterwards `sums` has the checksums of the files that this rank wrote."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sums: dict[str, FileSum] = {}
        self.fs = _ChecksummedFiles(self.sums)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One tensor at a time: PyTorch's own method keeps a copy of all of them until the file is closed."""
        results = []
        name = f"{plan.storage_data.prefix}0.distcp"
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in plan.items:
                # Through numpy, a part of a tensor becomes a tensor of its own without a copy.
                tensor = torch.from_numpy(planner.resolve_data(item).detach().cpu().numpy())  # type: ignore[union-attr]
                offset = stream.tell()
                torch.save(tensor, cast(Any, stream))
                length = stream.tell() - offset
                results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
            stream.flush()
            os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class Reader(FileSystemReader):
    """Reads a checkpoint's files against their checksums."""

    def __init__(self, folder: Path, sums: dict[str, FileSum]) -> None:
        super().__init__(folder)
        self.fs = _ChecksummedFiles(sums)
