"""Notices a rank that makes no progress: leaves the stacks and the last collectives of all ranks, and ends them.

A collective ends when the last rank joins it. If one never does, the others wait for as long as the process group lets
them, and nothing says who is missing, or what it does instead.
"""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from megagpt.errors import ExitCode
from megagpt.world import World

# Where the first rank to notice says so, and where each rank says what it was doing.
_HUNG, _SEEN = "megagpt/hung", "megagpt/hung/{rank}"
_LOOK_SECONDS = 1.0
# What ranks get to leave their stacks in, once one has noticed.
_DUMP_SECONDS = 10.0


class Watchdog:
    """Watches over one rank; every rank has one. `phase` says what the rank does now, and that it has moved on.

    Where a rank has not moved on for `timeout` seconds, every rank leaves in `folder` its stacks (rank_3.txt) and
    PyTorch's flight recorder (flight_recorder_3, a pickle); `ending(reason)` is called on the one that noticed first,
    and the processes end with ExitCode.HUNG.
    """

    def __init__(self, world: World, folder: Path, timeout: float, ending: Callable[[str], None]) -> None:
        self._world, self._folder, self._timeout, self._ending = world, folder, timeout, ending
        self._phase, self._since, self._limit = "starting", time.monotonic(), timeout
        self._left, self._others_noticed = threading.Event(), threading.Event()
        self._store = world.store.clone() if world.store is not None and world.size > 1 else None  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def phase(self, text: str) -> None:
        """This rank moves on to something new."""
        self._phase, self._since = text, time.monotonic()

    def progress(self) -> None:
        """This rank has moved on within the phase."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def patient(self, text: str) -> Iterator[None]:
        """For what may rightly take longer, such as waiting for a slow disk."""
        self._limit = math.inf
        self.phase(text)
        try:
            yield
        finally:
            self.phase(f"after {text}")
            self._limit = self._timeout

    def __enter__(self) -> Self:
        self.phase(self._phase)
        self._thread.start()
        if self._store is not None:
            threading.Thread(target=self._listen, args=(self._store.clone(),), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._left.wait(_LOOK_SECONDS):
            # Who was suspended with the whole process has missed nothing.
            overslept = time.monotonic() - looked - 2 * _LOOK_SECONDS
            looked = time.monotonic()
            if overslept > 0:
                self._since += overslept
            silent = time.monotonic() - self._since
            if silent > self._limit or self._others_noticed.is_set():
                self._end(silent)

    def _listen(self, store: dist.Store) -> None:
        """In a thread of its own: the store does not answer while the process that holds it is stopped."""
        with contextlib.suppress(RuntimeError):  # its holder has gone: that is another matter
            while not self._left.wait(_LOOK_SECONDS):
                if store.check([_HUNG]):
                    self._others_noticed.set()
                    return

    def _end(self, silent: float) -> None:
        # Either may hang itself: the disk, or the store where the rank that holds it does.
        for work in (self._dump, self._tell):
            worker = threading.Thread(target=work, args=(silent,), daemon=True)
            worker.start()
            worker.join(2 * _DUMP_SECONDS)
        os._exit(ExitCode.HUNG)

    def _dump(self, silent: float) -> None:
        rank = self._world.rank
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{rank}.txt").open("w") as file:
                file.write(f"rank {rank} on {self._world.host}, in {self._phase} for {silent:.0f} s\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            trace = _flight_recorder(self._world)
            if trace:
                (self._folder / f"flight_recorder_{rank}").write_bytes(trace)

    def _tell(self, silent: float) -> None:
        """Tell the others; the first to notice also says it to people, with who was missing."""
        others = ""
        if self._store is not None:
            self._store.set(_SEEN.format(rank=self._world.rank), self._phase)
            if self._store.add(_HUNG, 1) != 1:
                time.sleep(_DUMP_SECONDS)  # the first one looks for what the last one says, and holds the store perhaps
                return
            time.sleep(_DUMP_SECONDS)
            others = self._others()
        reason = f"no progress for {silent:.0f} s in {self._phase}{others}; every rank's stack is in {self._folder}"
        print(f"megagpt: error: [rank {self._world.rank} of {self._world.size}] {reason}", file=sys.stderr, flush=True)
        self._ending(reason)

    def _others(self) -> str:
        """Who left no stack, and who was elsewhere than this rank."""
        assert self._store is not None
        silent, elsewhere = [], []
        for rank in range(self._world.size):
            key = _SEEN.format(rank=rank)
            if not self._store.check([key]):
                silent.append(rank)
            elif (phase := self._store.get(key).decode()) != self._phase:
                elsewhere.append(f"rank {rank} in {phase}")
        text = f"; {', '.join(elsewhere[:8])}" if elsewhere else ""
        if silent:
            names = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
            text += f"; no answer from rank(s) {names}: stopped, or their host is gone"
        return text


def _flight_recorder(world: World) -> bytes:
    """The last collectives of this process, pickled; empty where PyTorch kept none."""
    if not dist.is_initialized():
        return b""
    name = "_dump_nccl_trace" if world.device.type == "cuda" else "_dump_fr_trace"
    dump = getattr(c10d, name, None)
    return bytes(dump()) if dump is not None else b""
