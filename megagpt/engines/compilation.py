"""torch.compile: whether it is used, and on what. Each block is one graph; so are the embedding, the final LayerNorm
and the head's softmax. Nothing between them is compiled, because the sharding engines gather weights there."""

from functools import partial
from typing import Any

import torch

from megagpt.config import Config, compiles
from megagpt.console import say
from megagpt.errors import UserError, first_line
from megagpt.models.gpt import GPT
from megagpt.models.loss import softmax_cross_entropy_to_compile_
from megagpt.world import World

# Largest number of graphs of one function, beyond which PyTorch runs it uncompiled: up to four kinds of blocks, with
# and without gradients, for the two sizes of micro-batches in each of 16 doublings.
_GRAPHS = 256


def is_compiled(config: Config, world: World) -> bool:
    """Whether `train.compile` means yes for this run, the same on every rank; auto: on GPUs that can. Every rank calls
    it. Raises UserError if the config says true, and a rank's GPU cannot run compiled code."""
    if not compiles(config.train.compile, world.device.type):
        return False
    problem = _problem(world.device) if world.device.type == "cuda" else ""
    problems = [f"{host}: {text}" for host, text in world.gather_objects((world.host, problem)) if text]
    if problems and config.train.compile == "auto":
        say(f"train.compile auto: off, and steps take longer: a compiled function does not run here ({problems[0]})")
    elif problems:
        reason = f"a compiled function does not run here ({problems[0]})"
        raise UserError(f"train.compile true: {reason}; repair that, or set train.compile=false")
    return not problems


def _problem(device: torch.device) -> str:
    """The reason why compiled code does not run on this GPU; empty if it does. Tried, because there are many: no
    Triton, no C compiler or none of Python's headers, a user without a name, a temporary folder that may not be
    written."""
    try:
        torch.compile(lambda x: torch.softmax(x, 1) + 1, dynamic=False)(torch.ones(2, 64, device=device)).sum().item()
    except Exception as error:
        return first_line(error)
    return ""


def compile_model(model: GPT, device: torch.device, options: dict[str, Any]) -> None:
    """Compile the model's parts, in place, for the device that it will run on, with these options for the blocks.
    Shapes are static: the model is compiled again for each size of micro-batches, of which there are few."""
    import torch._dynamo  # here, because it takes a second, and most runs on a CPU do without

    # Otherwise a block is cut where one of DDP's buckets ends, and results are written out at each cut.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = _GRAPHS
    compiled = partial(torch.compile, dynamic=False)
    for block in model.blocks:
        block.forward = compiled(block.forward, options=options or None)
    model.final_norm.forward = compiled(model.final_norm.forward)  # type: ignore[method-assign]
    if model.ranks.size == 1:  # the other one has a form of its own inside a compiler
        model.softmax = softmax_cross_entropy_to_compile_
    model.softmax = compiled(model.softmax)
    if device.type != "cpu":  # the compiler knows no sparse gradients
        model.embed = compiled(model.embed)
