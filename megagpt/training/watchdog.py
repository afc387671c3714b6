"""Notices a rank that makes no progress; writes the stacks and the last collectives of all ranks, and ends them.

A collective ends when the last rank joins it. If one rank never does, the others wait until the process group's
timeout, and nothing tells which rank is missing, or what it does instead."""

import contextlib
import faulthandler
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeVar

import torch.distributed as dist

from megagpt import console
from megagpt.errors import ExitCode
from megagpt.training.collectives import Collectives, flight_recorder, read_collectives, say_who_is_missing
from megagpt.world import World

# Keys in the store: each rank that notices a hang counts itself in the first, and writes its phase to the second, after
# its collectives to the third.
_HUNG, _SEEN, _COLLECTIVES = "megagpt/hung", "megagpt/hung/{rank}", "megagpt/hung/{rank}/collectives"
_LOOK_SECONDS = 1.0
# Time (s) that ranks get to write their stacks after one has noticed a hang.
_DUMP_SECONDS = 10.0
_A = TypeVar("_A")
_T = TypeVar("_T")


class Watchdog:
    """Watches one rank; every rank has one. `phase` names the rank's work and is a sign of life. If a rank gives no
    sign of life for `timeout` seconds, every rank writes its stacks (rank_3.txt) and PyTorch's flight recorder
    (flight_recorder_3, a pickle) to `folder`. Then the rank that noticed first calls `ending(reason)`, and all
    processes end with ExitCode.HUNG."""

    def __init__(self, world: World, folder: Path, timeout: float, ending: Callable[[str], None]) -> None:
        self._world, self._folder, self._timeout, self._ending = world, folder, timeout, ending
        self._phase, self._since, self._limit = "starting", time.monotonic(), timeout
        self._trace = b""
        self._left, self._others_noticed = threading.Event(), threading.Event()
        self._store = world.store if world.size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def phase(self, text: str) -> None:
        """This rank begins new work, which `text` names."""
        self._phase, self._since = text, time.monotonic()

    def progress(self) -> None:
        """A sign of life within the phase."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def patient(self, text: str) -> Iterator[None]:
        """No limit during the block, for work that may take long, such as a save to a slow disk."""
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
            threading.Thread(target=self._listen, args=(self._store,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._left.wait(_LOOK_SECONDS):
            # Time for which the whole process was suspended does not count.
            overslept = time.monotonic() - looked - 2 * _LOOK_SECONDS
            looked = time.monotonic()
            if overslept > 0:
                self._since += overslept
            silent = time.monotonic() - self._since
            if silent > self._limit or self._others_noticed.is_set():
                self._end(silent)

    def _listen(self, store: dist.Store) -> None:
        """In a thread of its own: the store does not answer while the process that holds it is stopped."""
        with contextlib.suppress(RuntimeError):  # rank 0 has exited; the watch on failed peers deals with that
            while not self._left.wait(_LOOK_SECONDS):
                if store.check([_HUNG]):
                    self._others_noticed.set()
                    return

    def _end(self, silent: float) -> None:
        _bounded(self._dump, silent)
        if reason := _bounded(self._tell, silent):
            _bounded(self._ending, reason)
            _bounded(console.warn, f"megagpt: error: [rank {self._world.rank} of {self._world.size}] {reason}")
        os._exit(ExitCode.HUNG)

    def _dump(self, silent: float) -> None:
        rank = self._world.rank
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{rank}.txt").open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"rank {rank} on {self._world.host}, in {self._phase} for {silent:.0f} s\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                self._trace = flight_recorder(self._world.device.type)
                if self._trace:
                    (self._folder / f"flight_recorder_{rank}").write_bytes(self._trace)
                else:
                    file.write("\nno flight recorder: this PyTorch has recorded no collective\n")

    def _tell(self, silent: float) -> str:
        """Tell the other ranks. Returns the error, which names the ranks without answer, on the first rank to notice;
        an empty text on the others."""
        others = ""
        if self._store is not None:
            rank, collectives = self._world.rank, _bounded(read_collectives, self._trace) or {}
            self._store.set(_COLLECTIVES.format(rank=rank), json.dumps(collectives))
            self._store.set(_SEEN.format(rank=rank), self._phase)
            if self._store.add(_HUNG, 1) != 1:
                # Stay: the rank that noticed first still collects the phases, and this rank may hold the store.
                time.sleep(_DUMP_SECONDS)
                return ""
            time.sleep(_DUMP_SECONDS)
            others = self._others()
        return f"no progress for {silent:.0f} s in {self._phase}{others}; every rank's stack is in {self._folder}"

    def _others(self) -> str:
        """The ranks that left no stack, those in another phase than this rank, and those that keep a collective."""
        assert self._store is not None
        silent, elsewhere, collectives = [], [], {}
        for rank in range(self._world.size):
            key = _SEEN.format(rank=rank)
            if not self._store.check([key]):
                silent.append(rank)
                continue
            if (phase := self._store.get(key).decode()) != self._phase:
                elsewhere.append(f"rank {rank} in {phase}")
            groups = json.loads(self._store.get(_COLLECTIVES.format(rank=rank)))
            collectives[rank] = {name: Collectives(*values) for name, values in groups.items()}
        text = "".join(f"; {', '.join(words[:8])}" for words in (elsewhere, say_who_is_missing(collectives)) if words)
        if silent:
            names = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
            text += f"; no answer from rank(s) {names}: stopped, or their host is gone"
        return text


def _bounded(work: Callable[[_A], _T], argument: _A) -> _T | None:
    """The result of the work; None if it fails or hangs itself: on the disk, on the store if the rank that holds it
    hangs, or on a stream that nobody reads."""
    results: list[_T] = []
    worker = threading.Thread(target=lambda: results.append(work(argument)), daemon=True)
    worker.start()
    worker.join(2 * _DUMP_SECONDS)
    return results[0] if results else None
