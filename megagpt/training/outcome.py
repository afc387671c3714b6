"""How a run's incarnation ends, and the record that it leaves of that."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.errors import ExitCode
from megagpt.failures import failure
from megagpt.incarnations import Incarnation, Superseded
from megagpt.world import World


@dataclass(frozen=True)
class Outcome:
    """The end of the loop, if nothing failed."""

    name: str
    """ "finished" or "stopped"."""
    reason: str
    """The signal or the limit that stopped it."""
    code: ExitCode


FINISHED = Outcome("finished", "the last token", ExitCode.DONE)


def stopped(reason: str) -> Outcome:
    return Outcome("stopped", reason, ExitCode.STOPPED)


class Ending:
    """Records how this incarnation ended. The loop, an exception and the watchdog may all come to it: the first counts.
    Every rank has one."""

    def __init__(self, incarnation: Incarnation, world: World, tokens: int) -> None:
        self._incarnation, self._world = incarnation, world
        self.reached = tokens
        """Tokens of the last position that the loop reached."""

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records an error in the block, and raises its cause."""
        try:
            yield
        except Exception as error:
            cause = self._failed(error)
            if cause is error:
                raise
            raise cause from None

    def outcome(self, outcome: Outcome) -> None:
        if self._world.is_main:
            self._incarnation.end(outcome.name, outcome.reason, self.reached)

    def hung(self, reason: str) -> None:
        """Called on the rank that noticed first."""
        self._incarnation.end("failed", reason, self.reached, rank=self._world.rank, host=self._world.host, retry=True)

    def _failed(self, error: Exception) -> Exception:
        """Record the failure; returns the error to raise. If a newer incarnation has taken the run over, that is the
        cause, whatever this rank saw: the newer one removes files and the ranks' peers end."""
        with contextlib.suppress(OSError):
            try:
                self._incarnation.check()
            except Superseded as newer:
                error = newer
        found = failure(error, self._world.rank)
        self._incarnation.end("failed", found.reason, self.reached, rank=found.rank, host=found.host, retry=found.retry)
        return error
