"""The judgement on each step: whether its loss is a spike, and what a skipped update means for the run."""

import enum
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from megagpt.checkpoints.checkpoint import CheckpointMeta
from megagpt.config import TrainConfig
from megagpt.engines.engine import StepResult
from megagpt.engines.loss_scale import LossScale


class Judgement(enum.Enum):
    """The consequence of a step's outcome for the run."""

    FINE = enum.auto()
    SKIPPED = enum.auto()
    """The update was skipped; the run continues."""
    TOO_MANY = enum.auto()
    """It is the last of `train.nonfinite_limit` skipped updates in a row."""
    SPIKE_STOP = enum.auto()
    """The loss is a spike, and `train.spike` says stop."""


@dataclass(frozen=True)
class Spike:
    """A loss that lies above those before it by more than `train.spike` allows."""

    loss: float
    mean: float
    deviation: float
    """Standard deviation of the losses before it."""

    def __str__(self) -> str:
        far = f"{(self.loss - self.mean) / self.deviation:.1f} standard deviations" if self.deviation else "far"
        return f"loss {self.loss:.4f} is {far} above the mean {self.mean:.4f}"


@dataclass(frozen=True)
class SpikeLimit:
    """The value of `train.spike`."""

    deviations: float
    steps: int
    action: str


class Guard:
    """Judges every step's loss and outcome. Its counts are part of the run: a checkpoint stores them, so a resumed run
    counts and judges as the uninterrupted one. Every rank has one, and all judge alike."""

    def __init__(self, config: TrainConfig, meta: CheckpointMeta | None = None) -> None:
        """`meta`: the checkpoint that the run resumes from."""
        self._limit = config.nonfinite_limit
        self._spike_limit = SpikeLimit(**config.spike) if isinstance(config.spike, dict) else None
        self.skipped = meta.skipped_updates if meta else 0
        """Updates skipped so far, for whatever reason."""
        self.in_a_row = meta.skipped_in_a_row if meta else 0
        self.spikes = meta.spikes if meta else 0
        """Spikes so far."""
        self.spikes_in_a_row = meta.spikes_in_a_row if meta else 0
        """Spikes among the updates skipped in a row."""
        self.bad_since = meta.bad_since if meta else 0
        """Tokens before the first of the updates skipped in a row: the weights may be bad since then."""
        self._losses: deque[float] = deque(meta.recent_losses if meta else (), self._compared)
        self.spike: Spike | None = None
        """The last spike of this incarnation."""

    @property
    def _compared(self) -> int:
        return self._spike_limit.steps if self._spike_limit else 0

    @property
    def watches_spikes(self) -> bool:
        return self._spike_limit is not None

    def counters(self) -> dict[str, Any]:
        """The counts as a checkpoint stores them, by the fields of CheckpointMeta."""
        return {
            "skipped_updates": self.skipped, "skipped_in_a_row": self.in_a_row, "spikes": self.spikes,
            "spikes_in_a_row": self.spikes_in_a_row, "bad_since": self.bad_since, "recent_losses": list(self._losses),
        }  # fmt: skip

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss exceeds the mean of the last `steps` losses by more than `deviations` of their standard
        deviations. Losses whose update was skipped are not among these. False until there are as many."""
        if self._spike_limit is None or len(self._losses) < self._compared or not math.isfinite(loss):
            return False
        mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        if loss <= mean + self._spike_limit.deviations * deviation:
            return False
        self.spike = Spike(loss, mean, deviation)
        return True

    def judge(self, result: StepResult, tokens: int) -> Judgement:
        """Count the outcome of the step from position `tokens`."""
        if result.updated:
            self.in_a_row = self.spikes_in_a_row = 0
            self._losses.append(result.loss)
            return Judgement.FINE
        if not self.in_a_row:
            self.bad_since = tokens
        self.skipped += 1
        self.in_a_row += 1
        self.spikes += result.spiked
        self.spikes_in_a_row += result.spiked
        if result.spiked and self._spike_limit is not None and self._spike_limit.action == "stop":
            return Judgement.SPIKE_STOP
        return Judgement.TOO_MANY if self.in_a_row >= self._limit else Judgement.SKIPPED

    def suspicious(self, scale: LossScale) -> bool:
        """Whether the last update was skipped for a reason that fp16's search for its loss scale does not explain: the
        weights may be bad."""
        searching = scale.dynamic and scale.value > 1 and not self.spikes_in_a_row
        return self.in_a_row > 0 and not searching
