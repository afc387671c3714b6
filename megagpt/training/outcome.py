"""How an incarnation of a run ends, and the record of its end."""

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


class Ending:
    """Records how this incarnation ended. The loop, an exception and the watchdog may all report an end: the first one
    is recorded. Every rank has one."""

    def __init__(self, incarnation: Incarnation, world: World, tokens: int) -> None:
        self._incarnation, self._world = incarnation, world
        self.reached = tokens
        """Tokens of the last position that the loop reached."""

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records an error in the block, and raises it. If a newer incarnation has taken the run over, that is the
        cause, whatever error this rank saw: the newer one removes files, and peers of this rank end."""
        try:
            yield
        except Exception as error:
            cause = error
            try:
                self._incarnation.check()
            except Superseded as newer:
                cause = newer
            except OSError:  # a disk that does not answer proves nothing
                pass
            found = failure(cause, self._world.rank)
            self._failed(found.reason, found.retry)
            if cause is not error:
                raise cause from None
            raise

    def outcome(self, outcome: Outcome) -> None:
        if self._world.is_main:
            self._incarnation.end(outcome.name, outcome.reason, self.reached)

    def hung(self, reason: str) -> None:
        """Called on the rank that noticed first."""
        self._failed(reason, retry=True)

    def _failed(self, reason: str, retry: bool) -> None:
        rank, host = self._world.rank, self._world.host
        self._incarnation.end("failed", reason, self.reached, rank=rank, host=host, retry=retry)
