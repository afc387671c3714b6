"""Float8 products (Micikevicius et al. 2022) in the blocks' linear layers, by torchao: `train.float8`.

A linear layer has three products: its output, and the gradients of its input and of its weight. Each product rounds
both operands to 8 bits, after scaling them so that the largest value of a tensor (tensorwise) or of a row (rowwise) is
the largest of the format. Everything else is as in bf16: results, attention, embeddings, the head, stored weights."""

import dataclasses
import logging
from types import ModuleType
from typing import Any

import torch
from torch import nn

from megagpt.cards import FLOAT8_CAPABILITIES
from megagpt.config import Config
from megagpt.console import say
from megagpt.errors import UserError, first_line
from megagpt.extras import install_extra
from megagpt.hardware import device_name
from megagpt.models.gpt import GPT

_CARDS = {"tensorwise": "such as L40S, RTX 4090, H100, B200", "rowwise": "such as H100, B200"}

emulated = False
"""Whether products are computed in fp32 from rounded operands, as every device can. Tests set it; no config can."""


def check_float8(config: Config, device: torch.device) -> None:
    """Raises UserError if `train.float8` asks for products that this rank's device or its libraries cannot do."""
    scaling = config.train.float8
    if scaling == "none":
        return
    if emulated:
        _load(scaling)
        return
    place, advice = f"train.float8 {scaling}", "use train.float8=none"
    if device.type != "cuda":
        raise UserError(f"{place} needs a GPU, and this rank runs on {device.type}; {advice}")
    # On AMD's cards these numbers mean something else; the trial decides.
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < FLOAT8_CAPABILITIES[scaling]:
        has = f"{device_name(device)} has compute capability {capability[0]}.{capability[1]}"
        least, cards = ".".join(map(str, FLOAT8_CAPABILITIES[scaling])), _CARDS[scaling]
        raise UserError(f"{place}: {has}, and it needs {least} or higher ({cards}); {advice}, or another GPU")
    float8 = _load(scaling)
    try:
        _try(float8, scaling, device)
    except Exception as error:
        failed = f"PyTorch {torch.__version__} cannot do such a product on {device_name(device)}"
        raise UserError(f"{place}: {failed}: {first_line(error)}; {advice}") from None


def convert_linears(model: GPT, config: Config, device: torch.device, compiled: bool) -> None:
    """Let the blocks' linear layers compute as `train.float8` says. The parameters stay the same objects under the same
    names, on any device, meta included. Raises UserError as `check_float8` does."""
    scaling = config.train.float8
    if scaling == "none":
        return
    check_float8(config, device)
    if not compiled:
        slow = "each product's rounding then takes passes of its own over memory"
        say(f"train.float8 {scaling} is slow without compiled blocks: {slow}; set train.compile=true")
    _convert(model.blocks, _load(scaling), scaling)


def compile_options(config: Config) -> dict[str, Any]:
    """Options of torch.compile. Without this one, a compiled backward pass, which computes some operands again, may not
    round them as the forward pass did: then their scales do not fit, as torchtitan found (pytorch/pytorch#150859)."""
    return {"emulate_precision_casts": True} if config.train.float8 == "rowwise" else {}


def _load(scaling: str) -> ModuleType:
    # At its import it warns of kernels for other purposes that it cannot load, and of its own use of PyTorch.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import torchao.float8
    except Exception as error:  # it also raises types of its own, for a PyTorch that it finds unfit
        way = f"install it ({install_extra('float8')}), or use train.float8=none"
        raise UserError(f"train.float8 {scaling}: torchao cannot be imported: {first_line(error)}; {way}") from None
    return torchao.float8


def _convert(modules: nn.Module, float8: ModuleType, scaling: str) -> None:
    recipe = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(scaling), emulate=emulated)
    float8.convert_to_float8_training(modules, config=recipe)


def _try(float8: ModuleType, scaling: str, device: torch.device) -> None:
    """One small layer's three products."""
    layer = nn.Sequential(nn.utils.skip_init(nn.Linear, 32, 16, device=device, dtype=torch.bfloat16))
    nn.init.ones_(layer[0].weight)  # type: ignore[arg-type]
    _convert(layer, float8, scaling)
    layer(torch.ones(16, 32, device=device, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    torch.cuda.synchronize(device)
