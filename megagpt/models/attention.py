"""Causal self-attention, dense or locally banded, and the key/value cache of generation."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagpt.models.presets import ModelConfig

# A GPU's kernels in the order in which they are tried.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Kernels that take a mask. cuDNN's backward pass gave NaN with one (pytorch/pytorch#196678).
_MASKED_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Major compute capabilities on which cuDNN's kernel is the fastest, and the first version of it that is right for every
# length (pytorch/pytorch#169849). PyTorch's own choice has the same bounds.
_CUDNN_CAPABILITIES, _CUDNN_VERSION = (9, 10), 91501


def attention_kernels(device: torch.device, dropout: float) -> contextlib.AbstractContextManager[Any]:
    """Inside, dense attention on this device takes the fastest kernel that is right. It must be the same one in a
    forward pass and in its recomputation."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    # cuDNN may round the rate of dropout to a multiple of 1/16 (pytorch/pytorch#174245).
    fast = not dropout and torch.version.hip is None and (torch.backends.cudnn.version() or 0) >= _CUDNN_VERSION
    fast = fast and torch.cuda.get_device_capability(device)[0] in _CUDNN_CAPABILITIES
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *_KERNELS] if fast else _KERNELS, set_priority=True)


def attention_kernel(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel that dense attention takes in a training step, such as "cudnn"."""
    q = torch.empty(1, config.heads, config.context, config.head_width, device=device, dtype=dtype, requires_grad=True)
    with attention_kernels(device, config.dropout):
        choice = torch._fused_sdp_choice(q, q, q, dropout_p=config.dropout, is_causal=True)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


class KeyValueCache:
    """Keys and values of the tokens seen so far, for a batch whose rows are aligned at their last token. Rows shorter
    than the longest are padded on the left; `padding[b]` is the number of padded positions of row b."""

    def __init__(self, config: ModelConfig, padding: Tensor, dtype: torch.dtype) -> None:
        self._context, self._dtype = config.context, dtype
        self.keys: dict[int, Tensor] = {}
        """Of each layer that has run, (B, H, context, D)."""
        self.values: dict[int, Tensor] = {}
        self.padding = padding  # (B,)
        self.length = 0

    def positions(self, new: int) -> Tensor:
        """Position of each of the next `new` tokens in its own row, (B, new); padding counts as position 0."""
        index = torch.arange(self.length, self.length + new, device=self.padding.device)
        return (index - self.padding[:, None]).clamp_min(0)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, each (B, H, new, D); returns all so far, each (B, H, length + new, D)."""
        if layer not in self.keys:  # of several tensor ranks, each has keys of its own heads only
            shape = (*k.shape[:2], self._context, k.shape[3])
            self.keys[layer], self.values[layer] = (k.new_empty(shape, dtype=self._dtype) for _ in "kv")
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def mask(self, new: int, window: int | None) -> Tensor:
        """True if a query among the next `new` may see a key, bool (B, 1, new, length + new)."""
        key = torch.arange(self.length + new, device=self.padding.device)
        query = key[self.length :, None]
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        alive = key >= self.padding[:, None]
        # A padding query may see itself: a row of the softmax without any key would be NaN.
        return (seen & alive[:, None, None, :]) | (key == query)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attention of each query to its past and itself; all (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of each query to the keys that the mask, bool (B, 1, T, T), lets it see; q, k, v: (B, H, T, D)."""
    # cuDNN would plan each shape by itself.
    kernels = contextlib.nullcontext() if q.device.type == "cpu" else sdpa_kernel(_MASKED_KERNELS)
    with kernels:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float) -> Tensor:
    """Attention of each query i to keys i - window < j <= i; all (B, H, T, D). Queries are cut into blocks of `window`;
    each sees its own block and the one before: O(T window), not O(T^2). Heads count as rows of the batch and blocks as
    heads, because fused kernels take four dimensions; on a GPU, PyTorch would otherwise compute in fp32 and keep all
    probabilities."""
    B, H, T, D = q.shape
    if window >= T:
        return causal_attention(q, k, v, dropout)
    tail = -T % window
    blocks = (T + tail) // window
    q = F.pad(q, (0, 0, 0, tail)).reshape(B * H, blocks, window, D)
    # One block in front of the first, so that every block has a predecessor.
    k, v = (F.pad(x, (0, 0, window, tail)).reshape(B * H, -1, D) for x in (k, v))
    k, v = (x.unfold(1, 2 * window, window).transpose(-1, -2) for x in (k, v))  # (B H, blocks, 2 window, D)
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device) - window
    band = (j <= i) & (i - j < window)  # (window, 2 window)
    mask = band.expand(1, blocks, -1, -1).clone()
    mask[:, 0] &= j >= 0
    # Padded queries of the last block may see padding; their output is cut off.
    # On a CPU, the kernel of earlier versions, so that their curves keep their digits.
    with sdpa_kernel(SDPBackend.MATH if q.device.type == "cpu" else _MASKED_KERNELS):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # (B H, blocks, window, D)
    return y.reshape(B, H, blocks * window, D)[:, :, :T]
