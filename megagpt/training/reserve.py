"""The time that a run needs to stop. The printed bound and the time limit use the same formula."""

from megagpt.checkpoints.saving import Saver
from megagpt.errors import ExitCode


class Reserve:
    """Upper bound on the seconds from a request to stop to the end of the process, from the longest of each part so
    far. A request is noticed at the end of a step, between batches of a validation and before samples, which cannot be
    interrupted, nor can the first batch of a validation that compiles. In the worst case it comes when the ranks of a
    step have just been asked, or as such work begins; then comes another step, and a save is in flight."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._step = self._first_step = self._samples = self._compiling = 0.0

    def took(self, step: float = 0, samples: float = 0, first_step: float = 0) -> None:
        """Record the seconds of a step, of all samples at one position, or of the first step, which counts until there
        is another one: it takes longer than the rest."""
        self._step, self._samples = max(self._step, step), max(self._samples, samples)
        self._first_step = max(self._first_step, first_step)

    def compiling(self, seconds: float) -> None:
        """Expect the next validation to compile for as long; 0: it does not."""
        self._compiling = seconds

    @property
    def seconds(self) -> float:
        """The rest of a step, samples or compiling, another step, the save in flight and the last save."""
        longest = max(self._samples, self._compiling, self._a_step)
        return longest + self._a_step + 2 * self._saver.expected_seconds

    @property
    def _a_step(self) -> float:
        return self._step or self._first_step

    def sentence(self, checkpoint_bytes: int) -> str:
        """The bound and its parts, for people."""
        work = f"two steps ({self._a_step:.2f} s each)"
        longest, name = max((self._samples, "samples"), (self._compiling, "a first validation, compiling included"))
        if longest > self._a_step:
            work = f"{name} ({longest:.2f} s), one step ({self._a_step:.2f} s)"
        return (
            f"Ctrl-C, SIGTERM or SIGUSR1 ends this run within about {self.seconds:.1f} s: {work}, "
            f"a save in flight and a last save of {checkpoint_bytes / 1e9:.2f} GB "
            f"({self._saver.expected_seconds:.2f} s each); it exits with code {ExitCode.STOPPED}"
        )
