"""Several sequences with a common beginning as one row of a batch: the beginning once, then each sequence's tail."""

import torch
from torch import Tensor


class Packing:
    """The layout of a batch of packed rows. Positions start again behind the common beginning in each tail, so a token
    has the position that it has in its own sequence."""

    def __init__(self, positions: Tensor, segments: Tensor, places: Tensor) -> None:
        """positions: int64 (B, T). segments: int64 (B, T), 0 for the common beginning, another number for each tail and
        for padding. places: int64 (N,), of the tokens whose successors are scored, b * T + t."""
        self.positions, self.segments, self.places = positions, segments, places
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """Whether a query may see a key, bool (B, 1, T, T): keys before it and itself, of the common beginning or of
        its own tail; with a `window`, only keys less than that many positions away."""
        if window not in self._masks:
            index = torch.arange(self.segments.shape[1], device=self.segments.device)
            seen = (self.segments[:, None, :] == 0) | (self.segments[:, :, None] == self.segments[:, None, :])
            seen &= index[:, None] >= index
            if window is not None:  # by position: places in the row lie further apart
                seen &= self.positions[:, :, None] - self.positions[:, None, :] < window
            self._masks[window] = seen[:, None]
        return self._masks[window]
