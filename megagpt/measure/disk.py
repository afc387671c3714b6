"""Measures how fast a config's checkpoints are saved and loaded, compared with raw writes and reads of the bytes."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megagpt.checkpoints.saving import Saver
from megagpt.config import Config
from megagpt.config_occasions import CheckpointConfig
from megagpt.console import warn
from megagpt.engines.engine import build_engine
from megagpt.errors import UserError
from megagpt.measure.worker import resume, save
from megagpt.placement import check_placement, layout
from megagpt.world import World

_PIECE = 2**24


def bench(config: Config, world: World, folder: Path, rounds: int) -> None:
    """Measure; the main rank prints. Every rank calls it, and writes and reads its share of the bytes. The bytes are
    dropped from the page cache before they are read, and removed before the next ones are written, so that each
    measurement finds the same free memory. Raises UserError if the folder is not empty, or if the engine cannot start
    on these ranks."""
    if world.from_main(lambda: folder.exists() and any(folder.iterdir())):
        raise UserError(f"{folder}: is not empty; name a folder that the measurement may fill and remove")
    config.sharing_ranks(world.size)
    check_placement(config, world.hosts())
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
        if world.is_main:
            warn(f"round {len(results[name])} of {rounds}: {name} {results[name][-1]:.2f} s")

    def begin_save(name: str, asynchronous: bool) -> Saver:
        saver = Saver(folder, CheckpointConfig(asynchronous=asynchronous), world)
        timed(name, lambda: save(saver, engine, 0))
        return saver

    try:
        for _ in range(rounds):
            world.from_main(lambda: _empty(folder))
            timed("raw write", lambda: _write(raw, data, size // world.size))
            world.from_main(lambda: _forget(folder))
            timed("raw read", lambda: _read(raw))

            world.from_main(lambda: _empty(folder))
            begin_save("save", asynchronous=False).finish()
            world.from_main(lambda: _forget(folder))
            timed("load", lambda: resume(folder, engine))

            world.from_main(lambda: _empty(folder))
            background = begin_save("save in the background: stall", asynchronous=True)
            timed("save in the background: the rest", background.finish)
    finally:
        if world.is_main:  # no collective here: a rank that failed would not join it
            shutil.rmtree(folder, ignore_errors=True)
    if not world.is_main:
        return
    run = f"{config.run.name}, {config.engine.name} on {layout(world.size, config.engine.tensor_ranks)}"
    print(f"{run}, {size / 1e9:.2f} GB, best of the rounds")
    best = {name: min(seconds) for name, seconds in results.items()}
    disk = {"save": "raw write", "load": "raw read"}
    for name, seconds in best.items():
        rate = "" if "background" in name else f" {size / seconds / 1e6:6.0f} MB/s"
        ratio = f" = {best[disk[name]] / seconds:.0%} of the {disk[name]}" if name in disk else ""
        print(f"{name:33} {seconds:6.2f} s{rate}{ratio}")
    stall, rest = (best[f"save in the background: {part}"] for part in ("stall", "the rest"))
    print(f"training waits for {stall / (stall + rest):.0%} of a save in the background")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


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
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
