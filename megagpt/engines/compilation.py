"""torch.compile: whether it is used, and on what. Each block is one graph; so are the embedding, the final LayerNorm
and the head's softmax. Nothing between them is compiled, because the sharding engines gather weights there."""

import os
import shutil
from functools import partial

import torch
from torch.utils._triton import has_triton

from megagpt.config import Config, compiles
from megagpt.console import say
from megagpt.errors import UserError
from megagpt.models.gpt import GPT
from megagpt.models.loss import softmax_cross_entropy_to_compile_


def is_compiled(config: Config, device: torch.device) -> bool:
    """Whether `train.compile` means yes on this device; auto: on a GPU that can. Raises UserError if the config says
    true, and a GPU's compiler is missing."""
    if not compiles(config.train.compile, device.type):
        return False
    problem = _problem() if device.type == "cuda" else None
    if problem and config.train.compile == "auto":
        say(f"train.compile auto: off, because {problem}; a step will take longer")
    elif problem:
        raise UserError(f"train.compile true: {problem}; or set train.compile=false")
    return problem is None


def _problem() -> str | None:
    """What keeps torch.compile from this machine's GPU."""
    if not has_triton():
        return "PyTorch finds no Triton that works with this GPU (pip install triton)"
    # Triton builds a small module in C for each kernel.
    names = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in names if name):
        return "there is no C compiler (install gcc, or set CC)"
    return None


def compile_model(model: GPT, device: torch.device) -> None:
    """Compile the model's parts, in place, for the device that it will run on. Shapes are static: all micro-batches
    have the same."""
    import torch._dynamo  # here, because it takes a second, and most runs on a CPU do without

    # Otherwise a block is cut where one of DDP's buckets ends, and results are written out at each cut.
    torch._dynamo.config.optimize_ddp = False
    compiled = partial(torch.compile, dynamic=False)
    for block in model.blocks:
        block.forward = compiled(block.forward)
    model.final_norm.forward = compiled(model.final_norm.forward)  # type: ignore[method-assign]
    model.softmax = compiled(softmax_cross_entropy_to_compile_)
    if device.type != "cpu":  # the compiler knows no sparse gradients
        model.embed = compiled(model.embed)
