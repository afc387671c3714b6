"""How fast a config's checkpoints are saved and loaded, beside what the disk does with the same bytes."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megagpt.checkpoints.compatibility import Allowed
from megagpt.checkpoints.folder import list_checkpoints
from megagpt.checkpoints.loading import resume
from megagpt.checkpoints.saving import Saver, describe
from megagpt.config import CheckpointConfig, Config
from megagpt.distributed import World
from megagpt.engines.engine import build_engine
from megagpt.errors import UserError

_PIECE = 2**24


def bench(config: Config, world: World, folder: Path, rounds: int) -> None:
    """Measure and print, on the main rank; every rank calls it. Raises UserError where the folder is not empty.

    Rounds take turns: the raw writes, a save that training waits for, one that it does not, the raw reads, a load.
    Every rank writes and reads its share of the bytes; files are dropped from the page cache before they are read.
    """
    if world.from_main(lambda: folder.exists() and any(folder.iterdir())):
        raise UserError(f"{folder}: is not empty; name a folder that the measurement may fill and remove")
    engine = build_engine(config, world)
    size = 12 * config.model.stored_parameters
    results: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], object]) -> None:
        world.barrier()
        start = time.perf_counter()
        function()
        world.barrier()
        results.setdefault(name, []).append(time.perf_counter() - start)

    try:
        for _ in range(rounds):
            world.from_main(lambda: shutil.rmtree(folder, ignore_errors=True))
            world.from_main(lambda: folder.mkdir(parents=True))
            raw = folder / f"raw.{world.rank}"
            data = memoryview(np.random.default_rng(0).bytes(size // world.size)).cast("B")
            timed("raw write", lambda raw=raw, data=data: _write(raw, data))  # type: ignore[misc]
            for name, asynchronous in (("save", False), ("save in the background", True)):
                saver = Saver(folder, CheckpointConfig(asynchronous=asynchronous), world)
                meta = describe(engine, 0, [], milestone=False)
                timed(
                    f"{name}: stall" if asynchronous else name,
                    lambda saver=saver, meta=meta: saver.save(engine.state(), engine.replica, meta, print),  # type: ignore[misc]
                )
                saved = saver.finish()
                assert saved is not None
                if asynchronous:
                    results.setdefault(name, []).append(saved.save_seconds)
            world.from_main(lambda: _forget(folder))
            timed("raw read", lambda raw=raw: _read(raw))  # type: ignore[misc]
            world.from_main(lambda: _forget(folder))
            timed("load", lambda: resume(folder, engine, [], Allowed(), print))
            world.from_main(lambda: list_checkpoints(folder)[-1].remove())
    finally:
        world.from_main(lambda: shutil.rmtree(folder, ignore_errors=True))
    if world.is_main:
        _print(config, world, size, {name: min(seconds) for name, seconds in results.items()})


def _print(config: Config, world: World, size: int, best: dict[str, float]) -> None:
    print(f"{config.run.name}, {config.engine.name} on {world.size} rank(s), {size / 1e9:.2f} GB, best of the rounds")
    raw = {"save": "raw write", "save in the background": "raw write", "load": "raw read"}
    for name, seconds in best.items():
        line = f"{name:24} {seconds:7.2f} s"
        if not name.endswith("stall"):
            line += f" {size / seconds / 1e6:8.0f} MB/s"
        if name in raw:
            line += f" = {best[raw[name]] / seconds:4.0%} of the {raw[name]}"
        print(line)
    share = best["save in the background: stall"] / best["save in the background"]
    print(f"training stands still for {share:.0%} of a save in the background")


def _write(path: Path, data: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), _PIECE):
            file.write(data[start : start + _PIECE])
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
