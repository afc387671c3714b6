"""Progress of a preparation: a bar on a terminal, plain lines in a log."""

import sys
import time
from typing import Any, Self

from tqdm import tqdm

_PLAIN_SECONDS = 10.0  # between two lines of a log


class PrepareProgress:
    """Shows documents, tokens/s and, if the source's size is known, the share done and the time left."""

    def __enter__(self) -> Self:
        self.start = self.last_line = time.monotonic()
        self.first: tuple[int, float] | None = None
        self.bar: tqdm[Any] | None = None
        return self

    def report(self, documents: int, tokens: int, fraction: float | None) -> None:
        """Called after each batch; `fraction` is the share of the source that is done, None if its size is unknown."""
        now = time.monotonic()
        if self.first is None:
            # The rate leaves out the work of an earlier, interrupted preparation.
            self.first = (tokens, fraction or 0.0)
            self.start = now
            return
        seconds = max(now - self.start, 1e-9)
        rate = (tokens - self.first[0]) / seconds
        left = "?"
        if fraction is not None and fraction > self.first[1]:
            left = tqdm.format_interval((1.0 - fraction) * seconds / (fraction - self.first[1]))
        share = "" if fraction is None else f"{fraction:.0%} | "
        text = f"{share}{documents:,} documents | {tokens:,} tokens | {rate:,.0f} tok/s | ETA {left}"
        if sys.stderr.isatty():
            if self.bar is None:
                self.bar = tqdm(bar_format="{desc}", leave=False)
            self.bar.set_description_str(text)
        elif now - self.last_line > _PLAIN_SECONDS:
            self.last_line = now
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
