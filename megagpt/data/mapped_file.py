"""Files mapped into memory without an open file each, so that their number does not meet the limit of open files."""

import ctypes
import functools
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

_FAILED = ctypes.c_void_p(-1).value


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    word, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype, libc.mmap.argtypes = word, (word, size, number, number, number, ctypes.c_long)
    libc.munmap.restype, libc.munmap.argtypes = number, (word, size)
    return libc


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file that is not empty, read-only uint8 (size,), mapped for as long as the array or a view of it
    lives. Raises OSError.

    Python's own mmap, and so np.memmap, keeps a duplicate of the descriptor; from Python 3.13 on, `trackfd=False` is
    the same as this."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    memory = (ctypes.c_uint8 * size).from_address(address)
    # At exit the process's maps end by themselves, and a thread may still read them.
    weakref.finalize(memory, _libc().munmap, address, size).atexit = False
    array = np.ctypeslib.as_array(memory)
    array.flags.writeable = False
    return array
