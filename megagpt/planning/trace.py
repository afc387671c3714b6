"""One step of a run on pretend ranks: its peak memory, measured without a GPU, with the trainer's own build."""

from dataclasses import dataclass

from megagpt.config import Config


@dataclass(frozen=True)
class Trace:
    """Measured bytes of one rank, counted on fake tensors."""

    peak: float
    """Most bytes at a time."""
    state: float
    """Bytes between steps, gradients included."""
    moment: str
    """The operator at the peak."""
    seconds: float
    """Time that the trace took."""


def trace(config: Config, ranks: int) -> Trace:
    """Build the run's engine on `ranks` pretend ranks and take one step of it with fake tensors."""
    raise NotImplementedError
