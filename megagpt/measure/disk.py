"""How fast a config's checkpoints are saved and loaded, beside what the disk does with the same bytes."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megagpt.checkpoints.compatibility import Allowed
from megagpt.checkpoints.loading import resume
from megagpt.checkpoints.saving import Saver, describe
from megagpt.config import CheckpointConfig, Config
from megagpt.engines.engine import build_engine
from megagpt.errors import UserError
from megagpt.world import World

_PIECE = 2**24


def bench(config: Config, world: World, folder: Path, rounds: int) -> None:
    """Measure and print, on the main rank; every rank calls it. Raises UserError where the folder is not empty.

    Every rank writes and reads its share of the bytes, and what was written is dropped from the page cache before it is
    read, and removed before the next is written: each finds the same free memory.
    """
    if world.from_main(lambda: folder.exists() and any(folder.iterdir())):
        raise UserError(f"{folder}: is not empty; name a folder that the measurement may fill and remove")
    engine = build_engine(config, world)
    size = config.model.checkpoint_bytes
    raw = folder / f"raw.{world.rank}"
    data = memoryview(np.random.default_rng(world.rank).bytes(min(_PIECE, size // world.size)))
    results: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], object]) -> None:
        world.barrier()
        start = time.perf_counter()
        function()
        world.barrier()
        results.setdefault(name, []).append(time.perf_counter() - start)

    def saver(asynchronous: bool) -> Saver:
        return Saver(folder, CheckpointConfig(asynchronous=asynchronous), world)

    def save(saver: Saver) -> None:
        saver.save(engine.state(), engine.replica, describe(engine, 0, [], milestone=False), print)

    def load() -> None:
        resume(folder, engine, [], Allowed(), print)

    try:
        for _ in range(rounds):
            _empty(folder, world)
            timed("raw write", lambda: _write(raw, data, size // world.size))
            world.from_main(lambda: _forget(folder))
            timed("raw read", lambda: _read(raw))

            _empty(folder, world)
            waiting = saver(asynchronous=False)
            timed("save", lambda: save(waiting))  # noqa: B023
            waiting.finish()
            world.from_main(lambda: _forget(folder))
            timed("load", load)

            _empty(folder, world)
            background = saver(asynchronous=True)
            timed("save in the background: stall", lambda: save(background))  # noqa: B023
            timed("save in the background: the rest", background.finish)
    finally:
        if world.is_main:  # alone: a rank that failed joins in nothing more
            shutil.rmtree(folder, ignore_errors=True)
    if world.is_main:
        _print(config, world, size, {name: min(seconds) for name, seconds in results.items()})


def _empty(folder: Path, world: World) -> None:
    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    world.from_main(begin)


def _print(config: Config, world: World, size: int, best: dict[str, float]) -> None:
    print(f"{config.run.name}, {config.engine.name} on {world.size} rank(s), {size / 1e9:.2f} GB, best of the rounds")
    raw = {"save": "raw write", "load": "raw read"}
    for name, seconds in best.items():
        line = f"{name:33} {seconds:6.2f} s"
        if "background" not in name:
            line += f" {size / seconds / 1e6:6.0f} MB/s"
        if name in raw:
            line += f" = {best[raw[name]] / seconds:.0%} of the {raw[name]}"
        print(line)
    stall, rest = (best[f"save in the background: {part}"] for part in ("stall", "the rest"))
    print(f"training stands still for {stall / (stall + rest):.0%} of a save in the background")


def _write(path: Path, data: memoryview, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(data)):
            file.write(data[: size - start])
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    buffer = bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
