"""A checkpoint's files: the format of `torch.distributed.checkpoint`, whose own tools read them, with checksums."""

import contextlib
import io
import itertools
import os
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import set_crc32_options

from megagpt.checkpoints.checksums import CheckedReader, CorruptError, FileSum, HashingWriter

# Bytes that are brought into the page cache at a time.
_AHEAD_BYTES = 2**24


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
        with path.open(mode) as file, HashingWriter(cast(io.BufferedWriter, file), self.sums[path.name]) as writer:
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
        self._rows: dict[bytes, tuple[torch.dtype, torch.Size]] = {}
        """Descriptions of tensors that lay in a file row by row, each with the dtype and the shape of a row."""

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        """Sort the reads by their place in the files; PyTorch sorts them by name."""

        def place(item: dcp.ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        return replace(plan, items=sorted(plan.items, key=place))

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """Read each tensor into the memory that waits for it, while a thread keeps the disk busy by bringing the next
        ranges into the page cache."""
        infos = [self.storage_data[item.storage_index] for item in plan.items]
        ranges = [(Path(self.path) / i.relative_path, i.offset, i.offset + i.length) for i in infos]
        stopped = threading.Event()
        thread = threading.Thread(target=_read_ahead, args=(ranges, stopped), daemon=True)
        thread.start()
        try:
            for name, items in itertools.groupby(plan.items, key=self._file_of):
                path = self.fs.concat_path(self.path, name)
                with self.fs.create_stream(path, "rb") as stream:
                    for item in items:
                        archive = self._slice_file(stream, self.storage_data[item.storage_index])
                        self._read_tensor(Path(path), archive, item, planner)
        finally:
            stopped.set()
            thread.join()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _file_of(self, item: dcp.ReadItem) -> str:
        name: str = self.storage_data[item.storage_index].relative_path
        return name

    def _read_tensor(self, path: Path, archive: IO[bytes], item: dcp.ReadItem, planner: dcp.LoadPlanner) -> None:
        """`torch.load` unpickles each tensor, a millisecond even for a bias, and copies all of it into memory of its
        own. So rows of a tensor with the description of an earlier one, which lay there row by row, are read straight
        into their place."""
        target = planner.resolve_tensor(item).detach()
        reader: Any = torch._C.PyTorchFileReader(archive)
        description = reader.get_record("data.pkl")
        in_rows = target.device.type == "cpu" and target.is_contiguous()
        if in_rows and self._rows.get(description) == (target.dtype, target.shape[1:]):
            first_row = item.storage_offsets[0] if item.storage_offsets else 0
            row = target.shape[1:].numel() * target.element_size()
            archive.seek(reader.get_record_offset("data/0") + first_row * row)
            place = memoryview(cast(Any, target.view(-1).view(torch.uint8).numpy()))
            while place:
                count = archive.readinto(place)  # type: ignore[attr-defined]
                if not count:
                    raise CorruptError(path, f"ends inside of {item.storage_index.fqn}")
                place = place[count:]
        else:
            archive.seek(0)
            tensor = torch.load(archive, map_location="cpu", weights_only=True)
            if tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes():
                self._rows[description] = tensor.dtype, tensor.shape[1:]
            target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))
        planner.commit_tensor(item, target)


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
