"""GPT-2 folders of `transformers` with random weights, changed by tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from megagpt.errors import UserError
from megagpt.models.gpt import GPT
from megagpt.models.huggingface import export
from megagpt.models.presets import ModelConfig

CONFIG = ModelConfig(layers=2, width=32, heads=4, context=16, vocab_size=131)


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)


def their_model(**changes: Any) -> GPT2LMHeadModel:
    fields = {"vocab_size": 131, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4} | changes
    model = GPT2LMHeadModel(GPT2Config(**fields, attn_implementation="eager")).eval()
    randomize(model)
    return model


def our_model(config: ModelConfig = CONFIG) -> GPT:
    model = GPT(config).eval()
    randomize(model)
    return model


def export_model(model: GPT, folder: Path, **options: Any) -> None:
    parameters = dict(model.named_parameters())
    export(folder, model.config, lambda shapes: {name: parameters[name].detach() for name in shapes}, **options)


def random_tokens() -> Tensor:
    return torch.randint(131, (3, 16), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours: GPT, theirs: GPT2LMHeadModel) -> None:
    with torch.no_grad():
        a, b = ours.eval()(random_tokens()), theirs.eval()(random_tokens()).logits
    assert a.shape == b.shape == (3, 16, 131)
    assert b.std() > 0.5
    assert (a - b).abs().max() <= 1e-5


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
