"""Saving: a thread writes a copy of this rank's share of the state while training continues."""

import contextlib
import datetime
import math
import os
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from megagpt.checkpoints.checkpoint import SHARE, UNPROVEN, Checkpoint, CheckpointMeta
from megagpt.checkpoints.folder import Rotation, at_tokens, checkpoints_folder, remove_unfinished, saving_folder
from megagpt.checkpoints.storage import Writer
from megagpt.config_occasions import CheckpointConfig
from megagpt.console import say
from megagpt.engines.engine import Engine, Replica
from megagpt.engines.flat_shard import FlatShard
from megagpt.errors import UserError, disk_error, disk_reason
from megagpt.incarnations import Incarnation
from megagpt.position import Position
from megagpt.process_memory import free_memory
from megagpt.world import World

SAVES = "saves"
"""Description of the process group in which ranks agree on saves, in the background."""
# Longest time that ranks wait for the slowest writer of a save.
_TIMEOUT = datetime.timedelta(hours=3)
# Bytes that each rank writes once at the start, to learn how fast the disk is.
_PROBE_BYTES = 2**24
# Share of the free memory that a copy of the state may take.
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    checkpoint: Checkpoint
    meta: CheckpointMeta
    stall_seconds: float
    """Time that training waited for it, and for the end of the save before it."""
    save_seconds: float
    """Time from its begin to its marker."""


class Saver:
    """Saves of one run, one at a time. Every rank has one and calls it in the same steps. `save` returns as soon as the
    state is copied; `poll` and `finish` return the checkpoint. If the disk refuses it, `failed` is set on all ranks."""

    def __init__(
        self, run: Path, config: CheckpointConfig, world: World, incarnation: Incarnation | None = None
    ) -> None:
        """`incarnation`: once a newer one has begun, saves raise Superseded and change nothing on the disk."""
        self._run, self._config, self._world, self._incarnation = run, config, world, incarnation
        # A group of its own: collectives of a step and of a save in the background must not mix. gloo connects
        # lazily, so this group needs sockets only between the ranks that a save connects.
        several = world.size > 1
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT, group_desc=SAVES) if several else None
        self._ranks_here = world.hosts().count(world.host)
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        self.expected_seconds = 0.0
        """Duration of the next save: the longest one so far; before the first, an estimate from the disk's speed."""
        self._measured = False
        self._room: bool | None = None
        self._new: list[Saved] = []
        """Complete, and not yet known to the rotation."""
        self._unproven: float = 0
        """Tokens of the newest complete checkpoint, until it is proven; then infinite. At first those on the disk are
        to be looked at."""
        self._finite_from = -1
        """The newest position from which a step was finite."""
        self._rotation: Rotation | None = None
        # One thread rotates, because removing a checkpoint may take long.
        self._rotating = ThreadPoolExecutor(1, thread_name_prefix="rotation")
        self._rotated: Future[None] | None = None

    def probe(self, size: int) -> None:
        """Write a little into the checkpoints' folder, to learn whether that works and how long a checkpoint of `size`
        bytes will take. Raises UserError if the folder cannot be written or is not shared by all ranks."""
        self._world.from_main(self._clear)
        share = size // self._world.size
        data = memoryview(bytearray(os.urandom(min(share, _PROBE_BYTES) or 1)))
        folder = checkpoints_folder(self._run)
        path = folder / f"probe.{self._world.rank}"
        start = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            seconds = time.monotonic() - start
        except OSError as error:
            raise UserError(f"{folder}: checkpoints cannot be written there: {disk_reason(error)}") from None
        self.expected_seconds = self._world.max(seconds * share / len(data))  # and waits for all ranks' files

        def see_all() -> None:
            for other in (folder / f"probe.{rank}" for rank in range(self._world.size)):
                if not other.exists():
                    raise UserError(f"{other} was written, but the main rank does not see it: {SHARE}")
                other.unlink()

        self._world.from_main(see_all)

    def proved(self, tokens: int) -> None:
        """A step from position `tokens` was finite, which proves the checkpoints up to it: rotate them."""
        self._finite_from = tokens
        self._rotate_if_proven()

    def _rotate_if_proven(self) -> None:
        if self._world.is_main and self._unproven <= self._finite_from:
            self._unproven = math.inf
            new, self._new = self._new, []
            self._rotated = self._rotating.submit(self._rotate, new, self._finite_from)

    def _rotate(self, new: list[Saved], tokens: int) -> None:
        with contextlib.suppress(OSError):  # what it leaves is rotated the next time
            self._fence()
            if self._rotation is None:
                self._rotation = Rotation(self._run, self._config.keep_last)
            for saved in new:
                self._rotation.saved(saved.checkpoint, saved.meta.milestone)
            self._rotation.proved(tokens)

    def save(self, state: dict[str, FlatShard], replica: Replica, meta: CheckpointMeta) -> Saved | None:
        """Wait for the save before this one, then begin this one. Returns what the earlier save saved, or raises its
        error. `replica`: the copy of the state that this rank holds; each copy writes its share."""
        called = time.monotonic()
        previous = self._collect()
        begin = time.monotonic()
        state = share_of(state, replica)
        copied = self._config.asynchronous and self._room_for(state)
        if copied:
            state = {key: _copy(shard) for key, shard in state.items()}
            if self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)
        checkpoint = at_tokens(self._run, meta.tokens_seen)
        stall = time.monotonic() - called

        def work() -> None:
            try:
                self._write(state, checkpoint, meta)
                seconds = time.monotonic() - begin
                self._outcome = Saved(checkpoint, meta, stall if copied else stall + seconds, seconds)
            except (Exception, CheckpointException) as error:  # which is no Exception
                self._outcome = error

        if copied:
            self._thread = threading.Thread(target=work, name="save", daemon=True)
            self._thread.start()
        else:
            work()
        return previous

    @property
    def failed(self) -> bool:
        """Whether a save has failed on this rank; `finish` then raises the error."""
        return isinstance(self._outcome, BaseException)

    def poll(self) -> Saved | None:
        """The checkpoint that was completed since the last call, if there is one; never waits."""
        return self._collect() if isinstance(self._outcome, Saved) else None

    def finish(self) -> Saved | None:
        """Wait for the save in flight and for rotation; return the checkpoint, unless it was returned before. Raises
        the error of either."""
        saved = self._collect()
        if self._rotated is not None:
            self._rotated.result()
        return saved

    def _collect(self) -> Saved | None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Saved):
            # The first real save tells more than the probe.
            self.expected_seconds = max(outcome.save_seconds, self.expected_seconds if self._measured else 0.0)
            self._measured = True
            self._new.append(outcome)
            self._unproven = outcome.checkpoint.tokens
            self._rotate_if_proven()
        if outcome is None or isinstance(outcome, Saved):
            return outcome
        # The errors of the ranks, which PyTorch wraps in one.
        of_ranks = [f[0] for f in outcome.failures.values()] if isinstance(outcome, CheckpointException) else [outcome]
        if of_disk := [cause for cause in of_ranks if isinstance(cause, OSError)]:
            text = f"{checkpoints_folder(self._run)}: the checkpoint could not be written: {disk_reason(*of_disk)}"
            raise disk_error(text, *of_disk) from None
        raise outcome

    def _room_for(self, state: dict[str, FlatShard]) -> bool:
        """Whether every rank has free memory for a copy. Checked once: a copy's memory is kept for the next one."""
        if self._room is not None:
            return self._room
        sizes = [s.flat.nbytes for s in state.values()]
        if self._world.device.type == "cuda":
            sizes = [1 << (size - 1).bit_length() for size in sizes if size]  # as PyTorch allocates pinned memory
        on_host, free = self._world.max(sum(sizes) * self._ranks_here), -self._world.max(-float(free_memory()))
        self._room = on_host <= _MEMORY_SHARE * free
        if not self._room:
            need = f"takes {on_host / 2**30:.1f} GiB of a host, and {free / 2**30:.1f} GiB are free"
            say(f"training waits for its saves: a copy of the state {need}")
        return self._room

    def _write(self, state: dict[str, FlatShard], checkpoint: Checkpoint, meta: CheckpointMeta) -> None:
        saving = saving_folder(checkpoint, self._number)

        def begin() -> None:
            self._clear()  # remove what a failed save left
            saving.mkdir(parents=True)

        self._world.from_main(begin, self._group)
        writer = Writer(saving)
        hush()
        dcp.save(dict(state), storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        gathered = [writer.sums] * self._world.size  # every rank's, on the main rank
        if self._group is not None:
            dist.gather_object(writer.sums, gathered if self._world.is_main else None, dst=0, group=self._group)

        def complete() -> None:
            sums = {name: s for sums in gathered for name, s in sums.items()}
            (saving / UNPROVEN).touch()
            checkpoint.complete(saving, meta, sums, self._fence)

        self._world.from_main(complete, self._group)

    @property
    def _number(self) -> int:
        return self._incarnation.number if self._incarnation else 0

    def _fence(self) -> None:
        if self._incarnation:
            self._incarnation.check()

    def _clear(self) -> None:
        self._fence()
        remove_unfinished(self._run, self._number)


def meta_of(engine: Engine, at: Position, data: list[str], milestone: bool, **counters: Any) -> CheckpointMeta:
    """The meta.json of an engine's save. `counters`: those of CheckpointMeta that are not 0."""
    return CheckpointMeta(
        tokens_seen=at.tokens, sequences_seen=at.sequences, step=at.step, engine=engine.config.engine.name,
        world_size=engine.world.size, config=asdict(engine.config), data=data,
        scalars=engine.scalars(), compiled=engine.compiled, milestone=milestone, **counters,
    )  # fmt: skip


def share_of(state: dict[str, FlatShard], replica: Replica) -> dict[str, FlatShard]:
    """The share of the state that one of several equal copies writes. The tensors are laid end to end and cut into
    equal ranges, so that most tensors are written in one piece."""
    if replica.count == 1:
        return state
    total = sum(s.flat.numel() for s in state.values())
    first, last = total * replica.index // replica.count, total * (replica.index + 1) // replica.count
    share, position = {}, 0
    for key, shard in state.items():
        count = shard.flat.numel()
        start, stop = max(first - position, 0), min(last - position, count)
        if start < stop:
            share[key] = shard.range(start, stop)
        position += count
    return share


def _copy(shard: FlatShard) -> FlatShard:
    """A copy in CPU memory; from a GPU, the copying goes on after the return."""
    on_gpu = shard.flat.device.type == "cuda"
    copy = torch.empty(shard.flat.shape, dtype=shard.flat.dtype, pin_memory=on_gpu)
    copy.copy_(shard.flat, non_blocking=on_gpu)
    return FlatShard(copy, tuple(shard.shape), shard.start, shard.parts)


def hush() -> None:
    """Turn off PyTorch's warning that a single process saves and loads without peers."""
    warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
