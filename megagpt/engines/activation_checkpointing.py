"""Activation checkpointing (Chen et al. 2016): a block's backward pass computes activations again.

All engines share one policy, which replaces the block's `forward` on the instance, inside the wrappers of
`torch.compile` and the sharding engines. So parameter names stay, compiled graphs contain the policy, and one gather of
the weights serves both the recomputation and the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megagpt.config_types import ActivationCheckpointing
from megagpt.models.attention import KeyValueCache
from megagpt.models.gpt import GPT
from megagpt.models.packing import Packing
from megagpt.models.presets import ModelConfig

_aten = torch.ops.aten
# Operators whose outputs `selective` keeps: matrix products and attention's kernels. All others are cheap to repeat.
_PRODUCTS = [_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default]
# Float8's products, and the largest value of a tensor, by which it is scaled: one number for a pass over the tensor.
_FLOAT8 = [_aten._scaled_mm.default, _aten.max.default]
_ATTENTION = [
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]

Forward = Callable[[Tensor, KeyValueCache | Packing | None], Tensor]


def checkpoint_activations(model: GPT, mode: ActivationCheckpointing) -> None:
    """Apply `train.activation_checkpointing` to the model's blocks, in place."""
    if mode == "none":
        return
    every = mode["every"] if isinstance(mode, dict) else 1
    dropout = model.config.dropout > 0
    # Dropout must draw the same numbers again; without dropout there is no generator state to keep.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if mode == "selective":
        policy = selective_policy(model.config, model.ranks.size)
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    for layer, block in enumerate(model.blocks):
        if layer % every == 0:
            block.forward = _checkpointed(block.forward, settings)


def selective_policy(config: ModelConfig, tensor_ranks: int = 1) -> Callable[..., CheckpointPolicy]:
    """The rule of `selective`: (context, operator, *arguments) -> whether the operator's output is kept."""
    dropout = config.dropout > 0
    # A kernel that draws its own dropout must run again; otherwise all later draws would differ from the forward pass.
    kept = frozenset([*_PRODUCTS, *_FLOAT8, *([] if dropout else _ATTENTION)])
    # Dropout reads the output of the block's last product, and must draw in its turn.
    last = None if dropout else (_aten.addmm.default, 1) if tensor_ranks == 1 else (_aten.mm.default, 0)
    return functools.partial(_policy, kept, last, 4 * config.width // tensor_ranks)


def _policy(
    kept: frozenset[Any],
    last: tuple[Any, int] | None,
    inner: int,
    context: Any,
    operator: Any,
    *arguments: Any,
    **_: Any,
) -> Any:
    """Whether to keep an operator's output. `last`: the operator of the block's last product, whose output nobody reads
    again, and the place of its input among the arguments; `inner`: the input's width. None: somebody reads it."""
    # In float8 it is no addmm: operators behind it run again, so without its output the product would, too.
    ends_block = last is not None and operator is last[0] and arguments[last[1]].shape[1] == inner
    return CheckpointPolicy.MUST_SAVE if operator in kept and not ends_block else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Forward, settings: dict[str, Any]) -> Forward:
    @functools.wraps(forward)
    def checkpointed(x: Tensor, cache: KeyValueCache | Packing | None = None) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return forward(x, cache)
        return checkpoint(forward, x, None, **settings)

    return checkpointed
