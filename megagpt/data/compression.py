"""Reading files that may be compressed, and noticing files that are corrupt or were cut off."""

import bz2
import contextlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from megagpt.errors import UserError, first_line

_CHUNK = 2**17
_CORRUPT = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class Opened(NamedTuple):
    """A file open for reading."""

    data: BinaryIO
    """Its content, decompressed."""
    share: Callable[[], float]
    """Share of the file read so far, 0 to 1."""


def _gzip() -> Any:
    return zlib.decompressobj(wbits=31)  # with gzip's header and checksum


def _zstd() -> Any:
    # Many corpora are compressed with --long, whose largest window is 2 GiB.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _xz() -> Any:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)  # the older format has no mark, so that zeros pass for it


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": _gzip,
    ".zst": _zstd,
    ".zstd": _zstd,
    ".xz": _xz,
    ".bz2": bz2.BZ2Decompressor,
}
COMPRESSIONS = tuple(_DECOMPRESSORS)
# Formats whose programs let zeros follow a frame.
_PADDED = (".gz", ".xz")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a file and decompress it according to its name. Raises UserError, also from reads, if the compression is
    corrupt or ends too early."""
    with path.open("rb") as raw:
        size = max(1, path.stat().st_size)
        data: BinaryIO = raw
        ending = path.suffix.lower()
        if ending in _DECOMPRESSORS:
            pieces = _decompressed(raw, _DECOMPRESSORS[ending], ending in _PADDED)
            data = io.BufferedReader(_Stream(path, pieces), buffer_size=2**20)
        yield Opened(data, lambda: min(1.0, raw.tell() / size))


def _decompressed(raw: BinaryIO, make: Callable[[], Any], padded: bool) -> Iterator[bytes]:
    """Decompress frame by frame: the libraries' own streams take a file that was cut off, or whose second frame is
    corrupt, for a whole one."""
    frame, frames = None, 0
    while compressed := raw.read(_CHUNK):
        while compressed:
            if frame is None:
                if padded and frames and not (compressed := compressed.lstrip(b"\0")):
                    break
                frame, frames = make(), frames + 1
            yield frame.decompress(compressed)
            compressed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None or not frames:
        raise EOFError("ends in the middle of a frame" if frames else "holds no compressed data")


class _Stream(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, path: Path, pieces: Iterator[bytes]) -> None:
        self.path, self.pieces, self.left = path, pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not len(self.left):
            try:
                piece = next(self.pieces, None)
            except _CORRUPT as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's, not bz2's
                problem = f"corrupt compression: {first_line(error)}; fetch the file again"
                raise UserError(f"{self.path}: {problem}") from None
            if piece is None:
                return 0
            self.left = memoryview(piece)
        count = min(len(buffer), len(self.left))
        buffer[:count] = self.left[:count]
        self.left = self.left[count:]
        return count
