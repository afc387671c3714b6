"""Activation checkpointing (Chen et al. 2016): what a block's backward pass computes again instead of keeping it.

One policy for all engines. The block's `forward` is replaced on the instance, inside what `torch.compile` and the
sharding engines wrap, so parameter names stay, compiled graphs see the policy, and weights are gathered once for both.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megagpt.models.attention import KeyValueCache
from megagpt.models.gpt import GPT

_aten = torch.ops.aten
# What `selective` keeps: the outputs of matrix products and of attention's kernels. Everything else is cheap to redo.
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}

Mode = str | dict[str, int]
Forward = Callable[[Tensor, KeyValueCache | None], Tensor]


def checkpoint_activations(model: GPT, mode: Mode) -> None:
    """Apply `train.activation_checkpointing` to the model's blocks, in place."""
    if mode == "none":
        return
    every = mode["every"] if isinstance(mode, dict) else 1
    dropout = model.config.dropout > 0
    # A kernel that draws dropout itself runs again, or what is drawn after it would differ from the forward pass.
    kept = _PRODUCTS if dropout else _PRODUCTS | _ATTENTION
    context = functools.partial(_keep, kept) if mode == "selective" else None
    for layer, block in enumerate(model.blocks):
        if layer % every == 0:
            block.forward = _recomputing(block.forward, context, dropout)


def _recomputing(forward: Forward, context: Callable[[], Any] | None, dropout: bool) -> Forward:
    # Dropout must draw the same numbers again; without it, nothing is drawn and nothing need be remembered.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if context is not None:
        settings["context_fn"] = context

    @functools.wraps(forward)
    def recomputing(x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return forward(x, cache)
        y: Tensor = checkpoint(forward, x, None, **settings)
        return y

    return recomputing


def _keep(kept: set[Any]) -> Any:
    return create_selective_checkpoint_contexts(functools.partial(_policy, kept))


def _policy(kept: set[Any], context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE
