"""Weights to and from the GPT-2 folders of `transformers`: config.json and the weight files."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from megagpt.errors import NonFiniteError, UserError
from megagpt.models.finite import check_finite
from megagpt.models.gpt import GPT
from megagpt.models.hf_files import TensorFiles, read_mapping
from megagpt.models.hf_layout import config_of, from_hf, hf_config, hf_name, hf_shape, to_hf
from megagpt.models.presets import ModelConfig

ReadWeights = Callable[[dict[str, tuple[int, ...]]], dict[str, Tensor]]
"""Our parameter name -> shape, to our parameter name -> values, fp32 on the CPU."""
EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HEAD = "lm_head.weight"
# Rows that are compared at a time, so that no copies of whole tables are made.
_ROWS = 4096
# Causal masks, which old versions of `transformers` stored with the weights.
_MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")


def export(
    folder: str | Path,
    config: ModelConfig,
    read: ReadWeights,
    files: Mapping[str, str] = MappingProxyType({}),
    shard_bytes: int = 5_000_000_000,
    dtype: str = "fp32",
) -> None:
    """Write config.json, safetensors of at most `shard_bytes` each, and further text `files` by name. `read` is called
    once per safetensors file, with the parameters of that file. `dtype`: a key of EXPORT_DTYPES. The folder gets its
    name when it is complete. Raises UserError if the folder exists and is not empty, and NonFiniteError if a weight is
    too large for `dtype`."""
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; nothing was written, choose another folder")
    format_of_weights = EXPORT_DTYPES[dtype]
    description = hf_config(config, str(format_of_weights).removeprefix("torch."))
    shapes = parameter_shapes(config)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.megagpt-export")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shards = _cut(shapes, shard_bytes, format_of_weights.itemsize)
        index: dict[str, str] = {}
        for i, names in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            weights = read({name: shapes[name] for name in names})
            theirs = {}
            for name in names:
                tensor = to_hf(name, weights.pop(name), config)
                theirs[f"transformer.{hf_name(name)}"] = _rounded(name, tensor, dtype)
            save_file(theirs, partial / file, metadata={"format": "pt"})
            index |= dict.fromkeys(theirs, file)
        if len(shards) > 1:
            metadata = {"total_size": format_of_weights.itemsize * config.parameters}
            text = json.dumps({"metadata": metadata, "weight_map": index}, indent=1)
            (partial / "model.safetensors.index.json").write_text(text + "\n")
        for name, text in {"config.json": json.dumps(description, indent=2) + "\n", **files}.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in partial.glob("*.safetensors"):  # save_file makes them readable by their owner only
            shutil.copymode(partial / "config.json", path)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _rounded(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in that format. Raises NonFiniteError if a value is too large for it."""
    if dtype == "fp32":
        return tensor
    rounded = tensor.to(EXPORT_DTYPES[dtype])
    if bad := tensor.numel() - int(torch.isfinite(rounded).sum()):
        limit, largest = torch.finfo(rounded.dtype).max, tensor.abs().max()
        values = f"{bad:,} of its {tensor.numel():,} values are larger than {dtype}'s largest, {limit:g}"
        fits_bf16 = dtype == "fp16" and torch.isfinite(largest.bfloat16())
        way = f"export with --dtype fp32{' or bf16' if fits_bf16 else ''}"
        raise NonFiniteError(f"--dtype {dtype}: tensor {name!r}: {values}; the largest is {float(largest):g}: {way}")
    return rounded


def _cut(shapes: dict[str, tuple[int, ...]], most: int, itemsize: int) -> list[list[str]]:
    """Names in order, in lists whose tensors take at most `most` bytes; a larger tensor is alone in its list."""
    lists: list[list[str]] = []
    size = 0
    for name, shape in shapes.items():
        size += itemsize * prod(shape)
        if size > most or not lists:
            lists.append([])
            size = itemsize * prod(shape)
        lists[-1].append(name)
    return lists


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model by our name, with its shape."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


def is_pretrained(folder: Path) -> bool:
    """Whether a folder looks like a `transformers` model."""
    return _config_json(folder).is_file()


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of a GPT-2 folder. Raises UserError if it is not the paper's model."""
    path = _config_json(Path(folder).expanduser())
    theirs = read_mapping(path)
    try:
        return config_of(theirs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _config_json(folder: Path) -> Path:
    return folder / "config.json"


def load_pretrained(folder: str | Path) -> GPT:
    """A model, fp32 on the CPU, with the weights of a GPT-2 folder. Raises UserError if a tensor does not fit, is not
    finite, or is none of this model's."""
    pretrained = Pretrained(folder)
    with torch.device("meta"):
        model = GPT(pretrained.config)
    model.load_state_dict({name: pretrained.read(name) for name in pretrained.shapes}, assign=True)
    return model


class Pretrained:
    """A GPT-2 folder, read one tensor at a time."""

    def __init__(self, folder: str | Path) -> None:
        """Checks everything but the values of the weights. Raises UserError if a tensor is missing, does not fit, or
        is none of this model's, which would compute something else without it."""
        self.folder = Path(folder).expanduser()
        self.config = read_config(self.folder)
        self.description = read_mapping(_config_json(self.folder))
        self.shapes = parameter_shapes(self.config)
        self._tensors = TensorFiles(self.folder)
        self._keys = {name: self._find(name) for name in self.shapes}
        self._check_rest()

    def _find(self, name: str) -> str:
        """The folder's key for one of our parameters."""
        theirs = hf_name(name)
        key = next((k for k in (f"transformer.{theirs}", theirs) if k in self._tensors.files), None)
        if key is None:
            raise UserError(f"{self.folder}: tensor {theirs!r} is missing")
        found, needed = self._tensors.shape(key), hf_shape(name, self.config, self.shapes[name])
        if found != needed:
            raise UserError(f"{self.folder}: tensor {key!r} has shape {found}, config.json needs {needed}")
        return key

    def _check_rest(self) -> None:
        rest = [key for key in self._tensors.files.keys() - self._keys.values() if not _MASK.fullmatch(key)]
        if _HEAD in rest:
            embedding = self._keys["token_embedding.weight"]
            if not _same_values(self._tensors.read(_HEAD), self._tensors.read(embedding)):
                reason = "this decoder's head is its embedding (tied), so the model would compute something else"
                raise UserError(f"{self.folder}: {_HEAD} differs from {embedding}: {reason}")
            rest.remove(_HEAD)
        if rest:
            first = ", ".join(map(repr, sorted(rest)[:3]))
            more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
            reason = f"no part of a GPT-2 of {self.config.layers} layers, so the model would compute something else"
            raise UserError(f"{self.folder}: tensor {first}{more}: {reason} without it")

    def digest(self) -> str:
        """A SHA-256 over the bytes of all files of weights. Raises UserError if one cannot be read."""
        return self._tensors.digest()

    def read(self, name: str) -> Tensor:
        """A parameter by our name, fp32 on the CPU, padded to our shape. Raises NonFiniteError."""
        key = self._keys[name]
        values = from_hf(name, self._tensors.read(key), self.shapes[name])
        return check_finite(values, key, self._tensors.files[key], "its model is broken, or the file is corrupt")


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for their dtypes. NaNs count as equal: `Pretrained.read` names those."""
    if a.shape != b.shape:
        return False
    pieces = zip(a.split(_ROWS), b.split(_ROWS), strict=True)
    return all(torch.equal(x.float().nan_to_num(), y.float().nan_to_num()) for x, y in pieces)
