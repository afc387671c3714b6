"""The time that a run needs to stop. The printed bound and the time limit use the same formula."""

from megagpt.checkpoints.saving import Saver
from megagpt.errors import ExitCode


class Reserve:
    """Upper bound on the seconds from a request to stop to the end of the process, from the longest of each part so
    far. A request is noticed at the end of a step and between batches of a validation. The worst case: it comes when
    the ranks of a step have just been asked, samples follow, which cannot be interrupted, a save is in flight, and
    another step follows before the request is noticed."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._step = self._samples = 0.0

    def took(self, step: float = 0, samples: float = 0) -> None:
        """Record the seconds of a step, or of all samples at one position."""
        self._step, self._samples = max(self._step, step), max(self._samples, samples)

    @property
    def seconds(self) -> float:
        """The rest of a step, samples, another step, the save in flight and the last save."""
        return self._samples + 2 * self._step + 2 * self._saver.expected_seconds

    def sentence(self, checkpoint_bytes: int) -> str:
        """The bound and its parts, for people."""
        samples = f"samples ({self._samples:.2f} s), " if self._samples else ""
        return (
            f"Ctrl-C, SIGTERM or SIGUSR1 ends this run within about {self.seconds:.1f} s: {samples}two steps "
            f"({self._step:.2f} s each), a save in flight and a last save of {checkpoint_bytes / 1e9:.2f} GB "
            f"({self._saver.expected_seconds:.2f} s each); it exits with code {ExitCode.STOPPED}"
        )
