"""A run's position: one frozen value that the loop passes on and a checkpoint stores."""

from dataclasses import dataclass, replace

from megagpt.config import Config


@dataclass(frozen=True)
class Position:
    """A place between two steps of a run. Everything that a step does is a function of it and the config."""

    sequences: int
    """Sequences seen so far: the data order continues with this number."""
    step: int
    """Optimizer steps taken so far."""
    context: int
    """Tokens in a sequence."""
    total: int
    """Sequences in the whole run."""

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.sequences * self.context

    @property
    def last(self) -> bool:
        """Whether the run is at its end."""
        return self.sequences >= self.total

    def after(self, sequences: int) -> "Position":
        """The position one step later, whose batch has that many sequences."""
        return replace(self, sequences=self.sequences + sequences, step=self.step + 1)


def position(config: Config, sequences: int, step: int) -> Position:
    """A position in the config's run."""
    return Position(sequences, step, config.model.context, config.total_sequences)
