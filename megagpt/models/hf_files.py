"""The weight files of a folder of `transformers`: safetensors or PyTorch's own format, one file or several with an
index. Tensors are read one at a time, except from PyTorch's format of before 1.6, of which a whole file is loaded."""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megagpt.errors import UserError, first_line
from megagpt.files import is_lfs_pointer

WEIGHTS_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""One file and the index of several, in the order in which `transformers` looks for them."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TensorFiles:
    """The tensors of a folder by key."""

    def __init__(self, folder: Path) -> None:
        """Finds out which file holds which tensor. Raises UserError if there is none that can be read."""
        self.folder = folder
        self._loaded: tuple[Path, dict[str, Tensor]] | None = None
        self.files = self._find()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises UserError if its file cannot be read or lacks it."""
        with self._file_of(key) as file:
            return tuple(file[key].shape if isinstance(file, dict) else file.get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        """A tensor as it is stored, on the CPU. Raises UserError if it cannot be read or holds no plain numbers."""
        with self._file_of(key) as file:
            tensor = file[key] if isinstance(file, dict) else file.get_tensor(key)
        if tensor.dtype not in _DTYPES:
            name = str(tensor.dtype).removeprefix("torch.")
            problem = f"tensor {key!r} has dtype {name}; only fp64, fp32, bf16 and fp16 are read"
            raise UserError(f"{self.files[key]}: {problem}")
        return tensor

    def digest(self) -> str:
        """A SHA-256 over the bytes of the files. Raises UserError if one cannot be read."""
        sums = []
        for path in sorted(set(self.files.values())):
            with readable(path), path.open("rb") as file:
                sums.append(hashlib.file_digest(file, "sha256").digest())
        return hashlib.sha256(b"".join(sums)).hexdigest()

    @contextlib.contextmanager
    def _file_of(self, key: str) -> Iterator[Any]:
        """The file that holds a tensor: open, or its tensors by name."""
        with readable(self.files[key]) as path:
            one = safe_open(path, framework="pt") if _is_safetensors(path) else contextlib.nullcontext(self._load(path))
            with one as file:
                if key not in file.keys():  # noqa: SIM118
                    way = "fetch the whole folder again"
                    raise UserError(f"{path}: has no tensor {key!r}, but the folder's index says that it does; {way}")
                yield file

    def _find(self) -> dict[str, Path]:
        """Key -> file."""
        for single, index in WEIGHTS_AND_INDEX:
            if (self.folder / single).exists():
                return dict.fromkeys(self._keys(self.folder / single), self.folder / single)
            if (self.folder / index).exists():
                with readable(self.folder / index) as path:
                    weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
                    return {key: self.folder / file for key, file in weight_map.items()}
        names = " or ".join(single for single, _ in WEIGHTS_AND_INDEX)
        raise UserError(f"{self.folder}: holds no {names}, nor an index of several: fetch or convert the weights")

    def _keys(self, path: Path) -> list[str]:
        with readable(path):
            if not _is_safetensors(path):
                return list(self._load(path))
            with safe_open(path, framework="pt") as file:
                return list(file.keys())

    def _load(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file in PyTorch's format. They stay on the disk until they are used, but those in the format
        of before 1.6, which is no zip file, are all in memory."""
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None
            # Only tensors are unpickled: a pickle can run any code.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not isinstance(found, dict):
                raise ValueError(f"it holds a {type(found).__name__}, not tensors by name")
            self._loaded = path, {key: value for key, value in found.items() if isinstance(value, Tensor)}
        return self._loaded[1]


@contextlib.contextmanager
def readable(path: Path) -> Iterator[Path]:
    """Turns whatever the reading of a file raises into a UserError that names it; the pointer that Git LFS leaves in
    place of a large file, too."""
    try:
        if is_lfs_pointer(path):
            ways = f"run `git lfs pull` in {path.parent}, or fetch the model with `hf download`"
            raise UserError(f"{path}: a Git LFS pointer, not the file itself: {ways}")
        yield path
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; fetch the whole folder, for instance with `hf download`") from None
    except PermissionError:
        raise UserError(f"{path}: this user may not read it; change its permissions, or copy the folder") from None
    except Exception as error:  # the libraries raise many kinds for a corrupt file
        way = "fetch it again" if _is_safetensors(path) or path.suffix == ".json" else "convert it to safetensors"
        raise UserError(f"{path}: cannot be read: {first_line(error)}; {way}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises UserError."""
    with readable(path):
        tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not a mapping")
    return tree


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"
