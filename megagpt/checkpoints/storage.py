"""A checkpoint's files: the format of `torch.distributed.checkpoint`, whose own tools read them, with checksums.

Each block of BLOCK_BYTES is hashed when it is written, and compared when it is read, before anything uses it: every
read verifies its blocks, and no extra pass is needed. (Token shards have smaller blocks with CRC-32, because a training
batch reads single sequences of them.)"""

import contextlib
import io
import itertools
import os
import threading
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import set_crc32_options

from megagpt.errors import UserError

# Bytes with one checksum. A reader of a small tensor reads a whole block; a checkpoint of 2 TB has half a million.
BLOCK_BYTES = 2**22
_KEPT_BLOCKS = 4
_AHEAD_BYTES = 2**24


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


class _HashingWriter(io.RawIOBase):
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


class _ChecksummedFiles(FileSystem):
    """Opens files for PyTorch's writer and reader with checksums by file name."""

    def __init__(self, sums: dict[str, FileSum]) -> None:
        self.sums = sums

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        path = Path(path)
        if mode == "rb":
            if path.name not in self.sums:
                raise CorruptError(path, "is not in the list of the checkpoint's files")
            # Buffered, because pickle asks for single bytes.
            with io.BufferedReader(CheckedReader(path, self.sums[path.name])) as reader:
                yield cast(io.IOBase, reader)
            return
        self.sums[path.name] = FileSum()
        with path.open(mode) as file, _HashingWriter(cast(io.BufferedWriter, file), self.sums[path.name]) as writer:
            yield writer

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class Writer(dcp.FileSystemWriter):
    """Writes one file for each rank; afterwards `sums` has the checksums of the files that this rank wrote."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sums: dict[str, FileSum] = {}
        self.fs = _ChecksummedFiles(self.sums)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        """One tensor at a time: PyTorch's own method keeps a copy of all of them until the file is closed."""
        # PyTorch's zip container would hash everything once more, at a fourth of the speed.
        set_crc32_options(False)
        results = []
        name = f"{plan.storage_data.prefix}0.distcp"
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in plan.items:
                # Through numpy, a part of a tensor becomes a tensor of its own without a copy.
                tensor = torch.from_numpy(planner.resolve_data(item).detach().cpu().numpy())  # type: ignore[union-attr]
                offset = stream.tell()
                try:
                    torch.save(tensor, cast(Any, stream))
                except RuntimeError as error:
                    if isinstance(error.__context__, OSError):  # the disk's error, which PyTorch hides
                        raise error.__context__ from None
                    raise
                length = stream.tell() - offset
                results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
            stream.flush()
            os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint's files against their checksums."""

    def __init__(self, folder: Path, sums: dict[str, FileSum]) -> None:
        super().__init__(folder)
        self.fs = _ChecksummedFiles(sums)

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        """Sort the reads by their place in the files; PyTorch sorts them by name."""

        def place(item: dcp.ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        return replace(plan, items=sorted(plan.items, key=place))

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """PyTorch's method, while a thread keeps the disk busy by bringing the next ranges into the page cache."""
        infos = [self.storage_data[item.storage_index] for item in plan.items]
        ranges = [(Path(self.path) / i.relative_path, i.offset, i.offset + i.length) for i in infos]
        stopped = threading.Event()
        thread = threading.Thread(target=_read_ahead, args=(ranges, stopped), daemon=True)
        thread.start()
        try:
            return super().read_data(plan, planner)
        finally:
            stopped.set()
            thread.join()


def _read_ahead(ranges: list[tuple[Path, int, int]], stopped: threading.Event) -> None:
    """Read byte ranges of files in order, a large piece at a time, and discard the bytes."""
    scratch = memoryview(bytearray(_AHEAD_BYTES))
    for path, of_file in itertools.groupby(ranges, key=lambda r: r[0]):
        try:
            with path.open("rb", buffering=0) as file:
                done = 0
                for _, start, stop in of_file:
                    # One piece may cover several small ranges.
                    done = max(done, start)
                    while done < stop and not stopped.is_set():
                        count = os.preadv(file.fileno(), [scratch], done)
                        done += count or stop
        except OSError:
            return  # the reader that needs these bytes will raise the error
