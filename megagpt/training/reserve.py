"""The time that a run needs to stop. The printed bound and the time limit use the same formula."""

from operator import itemgetter

from megagpt.checkpoints.saving import Saver
from megagpt.errors import ExitCode


class Reserve:
    """Upper bound on the seconds from a request to stop to the end of the process, from the longest of each part so
    far. A request is noticed at the end of a step, between batches of a validation and before samples, which cannot be
    interrupted, nor can the first batch of a validation that compiles. In the worst case it comes when the ranks of a
    step have just been asked, or as such work begins; then comes another step, and a save is in flight. During a batch
    ramp, that step may be one for which the model is compiled again."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._step = self._first_step = self._samples = self._compiling = 0.0
        self.validation_compiles = False
        """Whether the next validation compiles the model."""
        self.step_compiles = False
        """Whether a later step does."""

    def took(self, step: float = 0, samples: float = 0, first_step: float = 0, compiling: float = 0) -> None:
        """Record the seconds of a step, of all samples at one position, of the first step, which counts until there is
        another one, as it takes longer than the rest, or of a step that compiled the model."""
        self._step, self._samples = max(self._step, step), max(self._samples, samples)
        self._first_step, self._compiling = max(self._first_step, first_step), max(self._compiling, compiling)

    @property
    def seconds(self) -> float:
        """The rest of a step, samples or a validation that compiles; another step, the save in flight and the last."""
        return sum(seconds for seconds, _ in self._work) + 2 * self._saver.expected_seconds

    @property
    def _work(self) -> tuple[tuple[float, str], tuple[float, str]]:
        """The work that is not interrupted, and the steps and saves that follow it: seconds and name."""
        step = self._step or self._first_step, "one step"
        samples = self._samples, "samples"
        validation = self._compiling * self.validation_compiles, "a first validation, compiling included"
        again = self._compiling * self.step_compiles, "a step that compiles the model again"
        return max(step, samples, validation, key=itemgetter(0)), max(step, again, key=itemgetter(0))

    def sentence(self, checkpoint_bytes: int) -> str:
        """The bound and its parts, for people."""
        first, then = self._work
        work = f"two steps ({first[0]:.2f} s each)"
        if first[1] != then[1]:
            work = ", ".join(f"{name} ({seconds:.2f} s)" for seconds, name in (first, then))
        return (
            f"Ctrl-C, SIGTERM or SIGUSR1 ends this run within about {self.seconds:.1f} s: {work}, "
            f"a save in flight and a last save of {checkpoint_bytes / 1e9:.2f} GB "
            f"({self._saver.expected_seconds:.2f} s each); it exits with code {ExitCode.STOPPED}"
        )
