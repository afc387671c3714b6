"""Weights to and from the GPT-2 layout of `transformers`: a folder with config.json and safetensors."""

import json
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megagpt.errors import UserError, first_line
from megagpt.models.gpt import GPT
from megagpt.models.presets import ModelConfig

ReadWeights = Callable[[dict[str, tuple[int, ...]]], dict[str, Tensor]]
"""Our parameter name -> shape, to our parameter name -> values, fp32 on the CPU."""
_INDEX = "model.safetensors.index.json"
# Linear weights: GPT-2's release keeps them as (in, out), torch.nn.Linear as (out, in).
_TRANSPOSED = ("qkv.weight", "out.weight", "up.weight", "down.weight")
_BLOCK = {
    "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_OUTER = {"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"}
# Keys of a GPT-2 config that decide the arithmetic, with the values of the paper's model.
_FIXED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "add_cross_attention": False, "tie_word_embeddings": True, "n_inner": None,
}  # fmt: skip
# Our field of the shape -> the key of a GPT-2 config; the vocabulary's size has one name in both.
_SHAPE = {"layers": "n_layer", "width": "n_embd", "heads": "n_head", "context": "n_positions"}


def hf_name(name: str) -> str:
    """Our parameter name -> the name in `transformers`, without the `transformer.` in front."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"h.{layer}.{_BLOCK[part]}.{kind}"


def to_hf(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """One parameter in the layout of `transformers`: linear weights transposed, the vocabulary's padding cut off."""
    if name == "token_embedding.weight":
        tensor = tensor[: config.vocab_size].clone()  # safetensors would save the padding behind a view
    return tensor.T.contiguous() if name.endswith(_TRANSPOSED) else tensor.contiguous()


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a GPT-2 of this shape. Raises UserError if `transformers` has no such model."""
    if config.attention != "dense":
        reason = "transformers' GPT-2 has dense attention only, so this model cannot be exported"
        raise UserError(f"model.attention banded: {reason}")
    return {
        **_FIXED,
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()},
        "vocab_size": config.vocab_size,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "initializer_range": 0.02,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1),
        "torch_dtype": "float32",
    }


def export(
    folder: str | Path,
    config: ModelConfig,
    read: ReadWeights,
    files: Mapping[str, str] = MappingProxyType({}),
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, safetensors of at most `shard_bytes` each, and further text `files` by name. `read` is called
    once per safetensors file, with the parameters of that file. The folder gets its name when it is complete. Raises
    UserError if the folder exists and is not empty."""
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; nothing was written, choose another folder")
    description = hf_config(config)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.megagpt-export")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = _cut(shapes, shard_bytes)
    index: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weights = read({name: shapes[name] for name in names})
        theirs = {f"transformer.{hf_name(name)}": to_hf(name, weights.pop(name), config) for name in names}
        save_file(theirs, partial / file, metadata={"format": "pt"})
        index |= dict.fromkeys(theirs, file)
    if len(shards) > 1:
        metadata = {"total_size": 4 * config.parameters}
        text = json.dumps({"metadata": metadata, "weight_map": index}, indent=1)
        (partial / _INDEX).write_text(text + "\n")
    for name, text in {"config.json": json.dumps(description, indent=2) + "\n", **files}.items():
        (partial / name).write_text(text, encoding="utf-8")
    for path in partial.glob("*.safetensors"):  # save_file makes them readable by their owner only
        shutil.copymode(partial / "config.json", path)
    partial.rename(folder)


def _cut(shapes: dict[str, tuple[int, ...]], most: int) -> list[list[str]]:
    """Names in order, in lists whose fp32 tensors take at most `most` bytes; a larger tensor is alone in its list."""
    lists: list[list[str]] = []
    size = 0
    for name, shape in shapes.items():
        size += 4 * prod(shape)
        if size > most or not lists:
            lists.append([])
            size = 4 * prod(shape)
        lists[-1].append(name)
    return lists


def is_pretrained(folder: Path) -> bool:
    """Whether a folder looks like a `transformers` model."""
    return (folder / "config.json").is_file()


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of a GPT-2 folder. Raises UserError if it is not the paper's model."""
    path = Path(folder).expanduser() / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if not isinstance(theirs, dict):
        raise UserError(f"{path}: holds a {type(theirs).__name__}, not a model's description")
    for key, value in _FIXED.items():
        given = theirs.get(key, value)
        if given != value and not (key == "n_inner" and given == 4 * theirs.get("n_embd", 0)):
            raise UserError(f"{path}: {key} is {given!r}; this decoder computes {value!r} only")
    try:
        keys = _SHAPE if "n_positions" in theirs else {**_SHAPE, "context": "n_ctx"}
        return ModelConfig(**{ours: theirs[key] for ours, key in keys.items()}, vocab_size=theirs["vocab_size"])
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing") from None
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise UserError(f"{path}: not a GPT-2 shape: {'; '.join(problems)}") from None


def load_pretrained(folder: str | Path) -> GPT:
    """A model, fp32 on the CPU, with the weights of a GPT-2 folder. Raises UserError if a tensor does not fit."""
    pretrained = Pretrained(folder)
    with torch.device("meta"):
        model = GPT(pretrained.config)
    weights = {name: pretrained.read(name, tuple(p.shape)) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model


class Pretrained:
    """A GPT-2 folder, read one tensor at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.config = read_config(self.folder)
        self._files = _tensor_files(self.folder)

    def find(self, name: str, shape: tuple[int, ...]) -> str:
        """The folder's key for one of our parameters. Raises UserError if it is missing or does not fit."""
        theirs = hf_name(name)
        key = next((k for k in (f"transformer.{theirs}", theirs) if k in self._files), None)
        if key is None:
            raise UserError(f"{self.folder}: tensor {theirs!r} is missing")
        try:
            with safe_open(self._files[key], framework="pt") as file:
                found = tuple(file.get_slice(key).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._files[key]}: cannot be read: {first_line(error)}") from None
        needed = (self._rows(name, shape), *shape[1:])
        needed = needed[::-1] if name.endswith(_TRANSPOSED) else needed
        if found != needed:
            raise UserError(f"{self.folder}: tensor {key!r} has shape {found}, config.json needs {needed}")
        return key

    def _rows(self, name: str, shape: tuple[int, ...]) -> int:
        """Rows of a parameter without the vocabulary's padding."""
        return self.config.vocab_size if name == "token_embedding.weight" else shape[0]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter by our name, fp32 on the CPU, padded to our shape. Raises UserError if it does not fit."""
        key = self.find(name, shape)
        with safe_open(self._files[key], framework="pt") as file:
            tensor = file.get_tensor(key)
        padded = torch.zeros(shape)
        padded[: self._rows(name, shape)] = tensor.T if name.endswith(_TRANSPOSED) else tensor
        return padded


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = folder / _INDEX
    single = folder / "model.safetensors"
    try:
        if index.exists():
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable model.safetensors: {first_line(error)}") from None
