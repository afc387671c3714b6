"""Checkpoints: a folder per save, complete only when its marker exists.

RUN/checkpoints/000000524288/   named by tokens seen
    *.distcp, .metadata         fp32 weights and both Adam moments by name, PyTorch's distributed checkpoint format
    meta.json                   position, config, engine, world size, versions, data fingerprint
    COMPLETE                    every file's size; written last, removed first
"""

import contextlib
import dataclasses
import errno
import json
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

import megagpt
from megagpt.config import Config
from megagpt.data.shards import write_atomic
from megagpt.distributed import World
from megagpt.engines.engine import Engine
from megagpt.errors import UserError, first_line

MARKER = "COMPLETE"
META = "meta.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A saved position of a run."""

    path: Path

    @property
    def tokens(self) -> int:
        return int(self.path.name)

    def problem(self) -> str | None:
        """Why this checkpoint is not whole; None where it is."""
        try:
            sizes = dict(json.loads((self.path / MARKER).read_text()))
        except FileNotFoundError:
            return "its marker is missing: the save was cut off"
        except (OSError, ValueError, TypeError) as error:
            return f"its marker is not readable ({first_line(error)})"
        for name, size in sizes.items():
            file = self.path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
        return None

    def meta(self) -> dict[str, Any]:
        try:
            meta: dict[str, Any] = json.loads((self.path / META).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / META}: not readable ({first_line(error)})") from None
        if meta.get("format") != FORMAT:
            raise UserError(f"{self.path}: checkpoint format {meta.get('format')}, this version reads {FORMAT}")
        return meta


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """All of a run's checkpoints, whole or not, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((Checkpoint(p) for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda c: c.tokens)


def newest_whole(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; each newer one that is not whole is said, and why."""
    for checkpoint in reversed(list_checkpoints(run)):
        problem = checkpoint.problem()
        if problem is None:
            return checkpoint
        say(f"skipping {checkpoint.path}: {problem}")
    return None


def save(
    run: Path, engine: Engine, samples_seen: int, fingerprints: list[str], milestone: bool, world: World
) -> Checkpoint:
    """Write a whole checkpoint, or none. Every rank calls it. Raises UserError where the disk does not take it."""
    config = engine.config
    tokens = samples_seen * config.model.context
    checkpoint = Checkpoint(run / "checkpoints" / f"{tokens:015d}")
    path = checkpoint.path
    meta = {
        "format": FORMAT,
        "tokens_seen": tokens,
        "samples_seen": samples_seen,
        "updates": engine.updates,
        "loss_scale": {"value": engine.loss_scale.value, "good_steps": engine.loss_scale.good_steps},
        "milestone": milestone,
        "engine": config.engine.name,
        "world_size": world.size,
        "config": dataclasses.asdict(config),
        "data": fingerprints,
        "versions": {"megagpt": megagpt.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    try:
        if world.is_main:
            _remove(checkpoint)
            path.mkdir(parents=True)
        world.barrier()
        # FileSystemWriter flushes each file to disk before it reports it written.
        with _quiet():
            dcp.save(engine.state(), storage_writer=dcp.FileSystemWriter(path), no_dist=world.size == 1)
        if world.is_main:
            write_atomic(path / META, json.dumps(meta, indent=1).encode())
            sizes = {p.name: p.stat().st_size for p in sorted(path.iterdir())}
            write_atomic(path / MARKER, json.dumps(sizes, indent=1).encode())
    except (OSError, CheckpointException) as error:
        if world.is_main:
            shutil.rmtree(path, ignore_errors=True)
        raise UserError(f"{path}: the checkpoint could not be written: {_disk_reason(error)}") from None
    world.barrier()
    return checkpoint


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warning that a process alone saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        yield


def _disk_reason(error: BaseException) -> str:
    causes = [error]
    if isinstance(error, CheckpointException):
        causes += [failure[0] for failure in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return "disk full; free some space and resume"
    text = " ".join(str(c) for c in causes)
    # PyTorch's writer reports a full disk as a failed write of its zip container, without the error number.
    if "No space left" in text or "PytorchStreamWriter" in text or "unexpected pos" in text:
        return "disk full; free some space and resume"
    return first_line(causes[-1])


def _remove(checkpoint: Checkpoint) -> None:
    # Marker first: a removal that is cut off leaves no checkpoint that looks whole.
    (checkpoint.path / MARKER).unlink(missing_ok=True)
    if checkpoint.path.exists():
        shutil.rmtree(checkpoint.path)


def rotate(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints and the milestones. The newest whole one always stays."""
    whole = [c for c in list_checkpoints(run) if c.problem() is None]
    for checkpoint in whole[:-keep]:
        if not checkpoint.meta()["milestone"]:
            _remove(checkpoint)


def load(checkpoint: Checkpoint, engine: Engine, fingerprints: list[str]) -> int:
    """Fill the engine from a checkpoint; returns the samples seen. Every rank calls it.

    Raises UserError, naming the difference, where the checkpoint is of another model or of other data.
    """
    meta = checkpoint.meta()
    check_model(checkpoint, meta, engine.config)
    _check_order(checkpoint, meta, engine.config)
    if meta["data"] != fingerprints:
        raise UserError(
            f"{checkpoint.path}: was trained on other data than data.sources names now (fingerprint "
            f"{meta['data']}, now {fingerprints}); restore the shards it was trained on"
        )
    state = engine.state()
    try:
        with _quiet():
            dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint.path), no_dist=engine.world.size == 1)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: damaged: {first_line(error)}") from None
    engine.state_loaded(meta["updates"])
    if engine.loss_scale.dynamic and meta["config"]["train"]["precision"] == engine.config.train.precision:
        engine.loss_scale = dataclasses.replace(engine.loss_scale, **meta["loss_scale"])
    return int(meta["samples_seen"])


def check_model(checkpoint: Checkpoint, meta: dict[str, Any], config: Config) -> None:
    """Raises UserError where a checkpoint's model has another shape than the config's."""
    saved, wanted = meta["config"]["model"], dataclasses.asdict(config.model)
    ignored = {"preset", "dropout"}  # neither shapes a tensor
    differing = [
        f"model.{k} {saved.get(k)} there, {v} here" for k, v in wanted.items() if k not in ignored and saved.get(k) != v
    ]
    if differing:
        raise UserError(f"{checkpoint.path}: a checkpoint of another model ({'; '.join(differing)})")


def _check_order(checkpoint: Checkpoint, meta: dict[str, Any], config: Config) -> None:
    """Raises UserError where the samples after the checkpoint would not be those that the run had before it."""

    def order(tree: Any) -> dict[str, Any]:
        train = {f"train.{k}": tree["train"][k] for k in ("batch_tokens", "batch_ramp_start", "batch_ramp_tokens")}
        weights = [source["weight"] for source in tree["data"]["sources"]]
        return {"run.seed": tree["run"]["seed"], "data.sources weights": weights, **train}

    saved, wanted = order(meta["config"]), order(dataclasses.asdict(config))
    differing = [f"{key} {saved[key]} there, {wanted[key]} here" for key in wanted if saved[key] != wanted[key]]
    if differing:
        raise UserError(
            f"{checkpoint.path}: resuming would change the order of the data ({'; '.join(differing)}); "
            "leave that as it was, or start another run"
        )


def load_weights(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Fill a plain model's parameters from a checkpoint, without the optimizer's moments."""
    state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    try:
        with _quiet():
            dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint.path), no_dist=True)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: damaged: {first_line(error)}") from None
