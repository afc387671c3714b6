"""Weights to and from the GPT-2 layout of `transformers`: a folder with config.json and safetensors."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.errors import UserError, first_line
from megagpt.models.gpt import GPT
from megagpt.models.presets import ModelConfig

# GPT-2's release keeps its linear weights as (in, out); torch.nn.Linear has (out, in).
_TRANSPOSED = ("qkv.weight", "out.weight", "up.weight", "down.weight")
_BLOCK = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_OUTER = {"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"}
# What a GPT-2 config may say about arithmetic, and what it must say to be the paper's model.
_FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "n_inner": None,
}


def their_name(name: str) -> str:
    """Our parameter name -> GPT-2's, without the `transformer.` in front."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"h.{layer}.{_BLOCK[part]}.{kind}"


def to_theirs(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """One parameter in their layout: transposed where theirs is, the vocabulary's padding cut off."""
    if name == "token_embedding.weight":
        tensor = tensor[: config.vocab_size].clone()  # a view would be saved with the padding behind it
    return tensor.T.contiguous() if name.endswith(_TRANSPOSED) else tensor.contiguous()


def their_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a GPT-2 of this shape."""
    if config.attention != "dense":
        raise UserError(
            "transformers' GPT-2 has dense attention only; a model with model.attention banded has no form there"
        )
    return {
        **_FIXED,
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_positions": config.context,
        "vocab_size": config.vocab_size,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "initializer_range": 0.02,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        "torch_dtype": "float32",
    }


def export(model: GPT, folder: str | Path) -> None:
    """Write config.json and safetensors that `transformers` loads. Raises UserError rather than overwrite."""
    from huggingface_hub import save_torch_state_dict

    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; nothing was written, choose another folder")
    description = their_config(model.config)
    state = {
        f"transformer.{their_name(name)}": to_theirs(name, parameter.detach().cpu(), model.config)
        for name, parameter in model.named_parameters()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, folder)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def is_pretrained(folder: Path) -> bool:
    """Whether a folder looks like a `transformers` model."""
    return (folder / "config.json").is_file()


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of a GPT-2 folder; raises UserError where it is not the paper's model."""
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
            raise UserError(f"{path}: {key} is {given!r}; this decoder computes {value!r}")
    try:
        return ModelConfig(
            layers=theirs["n_layer"],
            width=theirs["n_embd"],
            heads=theirs["n_head"],
            context=theirs["n_positions"] if "n_positions" in theirs else theirs["n_ctx"],
            vocab_size=theirs["vocab_size"],
        )
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing") from None
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise UserError(f"{path}: not a GPT-2 shape: {'; '.join(problems)}") from None


def load_pretrained(folder: str | Path) -> GPT:
    """A model, fp32 on the CPU, with the weights of a GPT-2 folder. Raises UserError where a tensor does not fit."""
    folder = Path(folder).expanduser()
    config = read_config(folder)
    where = _tensor_files(folder)
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        theirs = their_name(name)
        key = next((k for k in (f"transformer.{theirs}", theirs) if k in where), None)
        if key is None:
            raise UserError(f"{folder}: tensor {theirs!r} is missing")
        try:
            with safe_open(where[key], framework="pt") as file:
                tensor = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{where[key]}: cannot be read: {first_line(error)}") from None
        tensor = tensor.T if name.endswith(_TRANSPOSED) else tensor
        rows = config.vocab_size if name == "token_embedding.weight" else parameter.shape[0]
        needed = (rows, *parameter.shape[1:])
        if tensor.shape != needed:
            raise UserError(f"{folder}: tensor {key!r} has shape {tuple(tensor.shape)}, config.json needs {needed}")
        with torch.no_grad():
            parameter.zero_()  # the vocabulary's padding
            parameter[:rows].copy_(tensor)
    return model


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    try:
        if index.exists():
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable model.safetensors: {first_line(error)}") from None
