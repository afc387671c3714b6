"""The GPT-2 layout of `transformers`: names, shapes and config.json. No I/O."""

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megagpt.errors import UserError
from megagpt.models.presets import ModelConfig

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
# Other keys that would change the arithmetic or the weights: heads that were removed, code of the model's own, weights
# that are not what they are named.
_ABSENT = ("pruned_heads", "auto_map", "quantization_config", "compression_config")
# Other names in `transformers` of the same function, the tanh approximation of GELU.
_GELU_NAMES = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
# Our field of the shape -> the key of a GPT-2 config, and the other names under which `transformers` reads it.
_SHAPE = {
    "layers": ("n_layer", "num_hidden_layers"),
    "width": ("n_embd", "hidden_size"),
    "heads": ("n_head", "num_attention_heads"),
    "context": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
}
# Id of GPT-2's end-of-text, the last token of its vocabulary: rows behind it are padding.
_END_OF_TEXT = 50256


def hf_name(name: str) -> str:
    """Our parameter name -> the name in `transformers`, without the `transformer.` in front."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"h.{layer}.{_BLOCK[part]}.{kind}"


def hf_shape(name: str, config: ModelConfig, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in `transformers` of our parameter of that shape."""
    if name == "token_embedding.weight":
        shape = (config.vocab_size, *shape[1:])
    return shape[::-1] if name.endswith(_TRANSPOSED) else shape


def to_hf(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """One parameter in the layout of `transformers`: linear weights transposed, the vocabulary's padding cut off."""
    if name == "token_embedding.weight":
        tensor = tensor[: config.vocab_size].clone()  # safetensors would save the padding behind a view
    return tensor.T.contiguous() if name.endswith(_TRANSPOSED) else tensor.contiguous()


def from_hf(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of `transformers` as our parameter of that shape, fp32, the vocabulary padded with rows of zeros."""
    tensor = tensor.T if name.endswith(_TRANSPOSED) else tensor
    padded = torch.zeros(shape)
    padded[: len(tensor)] = tensor
    return padded


def hf_config(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a GPT-2 of this shape. Raises UserError if `transformers` has no such model."""
    if config.attention != "dense":
        reason = "transformers' GPT-2 has dense attention only, so this model cannot be exported"
        raise UserError(f"model.attention banded: {reason}")
    end = end_of_text(config)
    return {
        **_FIXED,
        "architectures": ["GPT2LMHeadModel"],
        **{keys[0]: getattr(config, ours) for ours, keys in _SHAPE.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "initializer_range": 0.02,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
        "torch_dtype": dtype,
    }


def end_of_text(config: ModelConfig) -> int:
    """The id of end-of-text, whatever the vocabulary's padding; of a smaller vocabulary, its last id."""
    return min(_END_OF_TEXT, config.vocab_size - 1)


def config_of(theirs: dict[str, Any]) -> ModelConfig:
    """The shape that a config.json describes. Raises UserError, without the file's name, if it is not the paper's
    model."""
    shape = {ours: _shape_value(theirs, keys) for ours, keys in _SHAPE.items()}
    if shape["context"] is None:
        shape["context"] = theirs.get("n_ctx")  # its name in GPT-2's release; not read beside the others
    width = shape["width"] if isinstance(shape["width"], int) else 0
    accepted = {"activation_function": _GELU_NAMES, "n_inner": (None, 4 * width)}
    for key, value in _FIXED.items():
        given = theirs.get(key, value)
        if given not in accepted.get(key, (value,)):
            only = f"4 x n_embd = {4 * width}" if key == "n_inner" else repr(value)
            raise UserError(f"{key} is {given!r}; this decoder computes {only} only")
    for key in _ABSENT:
        if theirs.get(key):
            raise UserError(f"{key} is {theirs[key]!r}; only GPT-2's own code with all of its plain weights is read")
    for ours, keys in _SHAPE.items():
        if shape[ours] is None:
            raise UserError(f"key {keys[0]!r} is missing")
    try:
        return ModelConfig(**shape)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise UserError(f"not a GPT-2 shape: {'; '.join(problems)}") from None


def _shape_value(theirs: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value under the first of the keys that is there, None if none is. Raises UserError if two contradict."""
    given = {key: theirs[key] for key in keys if key in theirs}
    values = list(given.values())
    if any(value != values[0] for value in values):
        both = " and ".join(f"{key} {value!r}" for key, value in given.items())
        raise UserError(f"{both} contradict each other")
    return values[0] if values else None
