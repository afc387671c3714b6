"""Text generation with a key/value cache."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagpt.data.tokenizer import END_OF_TEXT, VOCAB_SIZE
from megagpt.errors import NonFiniteError, UserError
from megagpt.models.attention import KeyValueCache
from megagpt.models.presets import ModelConfig

Decide = Callable[[Callable[[], Tensor]], Tensor]
"""Calls a function that draws tokens, on one rank or on all, and gives its result to all."""


@torch.no_grad()
def generate(
    model: nn.Module,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    first_row: int = 0,
    on_token: Callable[[int, int], None] = lambda row, token: None,
    is_over: Callable[[list[int]], bool] = lambda new: False,
    decide: Decide = lambda draw: draw(),
) -> list[list[int]]:
    """Continue each prompt by at most `max_tokens` tokens, ending before end-of-text; returns the new tokens only. A
    row's draws depend on the seed and the row's number alone, which counts from `first_row`, so other prompts do not
    change them. When a row fills the context, the window slides: the row continues from its last context // 2 tokens.
    `on_token(row, token)` is called for each new token. A row also ends if `is_over` is true of its new tokens. Ranks
    that generate together pass `World.from_main` as `decide`: all of them go on with the main rank's tokens, so they
    call a sharded model equally often, even if their logits differ by a bit. Raises UserError if a prompt is empty or
    too long, NonFiniteError if logits are not finite.
    """
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= config.context:
            has = f"prompt {first_row + row + 1} has {len(prompt)} tokens"
            raise UserError(f"{has}; the model takes 1 to {config.context}: change the prompt")
    device = next(model.parameters()).device
    rows = range(first_row, first_row + len(prompts))
    uniform = np.stack([np.random.default_rng([seed, row]).random(max_tokens) for row in rows])
    windows = [list(p) for p in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    alive = [True] * len(prompts)
    cache, tokens = _prefill(config, windows, device)
    for i in range(max_tokens):
        if cache.length + tokens.shape[1] > config.context:
            kept = max(1, config.context // 2)
            windows = [w[-kept:] if len(w) > config.context else w for w in windows]
            cache, tokens = _prefill(config, windows, device)
        with _attention_kernels(device):
            logits = model(tokens, cache=cache)[:, -1, :VOCAB_SIZE].float()  # (B, V)

        def next_tokens(logits: Tensor = logits, i: int = i) -> Tensor:
            _check_finite(logits, alive, i, first_row)
            return draw(logits, torch.from_numpy(uniform[:, i]), temperature, top_k, top_p)

        drawn = decide(next_tokens)
        for row, token in enumerate(drawn.tolist()):
            windows[row].append(token)
            alive[row] = alive[row] and token != END_OF_TEXT
            if alive[row]:
                new[row].append(token)
                on_token(row, token)
                alive[row] = not is_over(new[row])
        if not any(alive):
            break
        tokens = drawn[:, None].to(device)
    return new


def _attention_kernels(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a GPU, no cuDNN: it would plan each length of the cache by itself, for longer than the token takes."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _check_finite(logits: Tensor, alive: list[bool], i: int, first_row: int) -> None:
    """Raises NonFiniteError if a row that has not ended has a logit that is NaN or infinite."""
    finite = torch.isfinite(logits).all(1).tolist()
    for row, (is_alive, is_finite) in enumerate(zip(alive, finite, strict=True)):
        if is_alive and not is_finite:
            where = f"sample {first_row + row + 1}, new token {i + 1}"
            way = "the weights are too large or corrupt, so take an older checkpoint"
            raise NonFiniteError(f"{where}: the model's logits are NaN or infinite; {way}")


def _prefill(config: ModelConfig, windows: list[list[int]], device: torch.device) -> tuple[KeyValueCache, Tensor]:
    """A new cache, and the rows' tokens padded on the left to one length, int64 (B, longest)."""
    longest = max(map(len, windows))
    padding = torch.tensor([longest - len(w) for w in windows], device=device)
    tokens = torch.tensor([[0] * (longest - len(w)) + w for w in windows], device=device)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    return KeyValueCache(config, padding, dtype), tokens


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token per row: logits (B, V), uniform (B,) in [0, 1); int64 (B,) on the CPU. temperature 0 is greedy; top_k 0
    keeps all; top_p keeps the likeliest tokens up to and including the token that reaches it (Holtzman et al. 2020)."""
    logits = logits.cpu()
    if temperature == 0:
        return logits.argmax(1)
    k = min(top_k or logits.shape[1], logits.shape[1])
    best, ids = logits.topk(k, dim=1)
    probability = torch.softmax(best.double() / temperature, dim=1)
    before = probability.cumsum(1) - probability
    # A token is kept if the likelier ones have not reached top_p, so the likeliest always is.
    probability = probability.where(before < top_p, 0.0)
    reached = probability.cumsum(1)
    chosen = torch.searchsorted(reached, (uniform * reached[:, -1])[:, None], right=True).clamp_max(k - 1)
    return ids.gather(1, chosen)[:, 0]
