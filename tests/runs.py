"""Reads the files that runs leave behind, and waits for a run's steps."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as ServedAccumulator

from megagpt.checkpoints.saving import Saver, meta_of
from megagpt.config_file import load_config
from megagpt.config_occasions import CheckpointConfig
from megagpt.engines.engine import build_engine
from megagpt.incarnations import list_incarnations
from megagpt.models.gpt import GPT
from megagpt.position import position
from megagpt.training.run_folder import run_folder
from megagpt.world import World
from tests.conftest import metrics
from tests.processes import Process

# How long ranks may take to start, to make progress, to notice that a peer is gone: generous, to find what hangs.
PATIENCE = 240.0
STEP_TOKENS = 128
"""Of conftest's tiny run."""
LOSS, NORM = 5e-6, 2e-5
"""Largest differences of loss and gradient norm between two ways to compute the same fp32 run."""
Started = Process | subprocess.Popen[bytes]


def shrunk(corpus: Path) -> list[str]:
    """Overrides that make any config file a run of three steps of four sequences."""
    return [
        "model.layers=2", "model.width=32", "model.heads=2", "model.context=16",
        "train.tokens=192", "train.batch_tokens=64", "train.batch_ramp_start=0", "train.batch_ramp_tokens=0",
        "train.device=cpu", "train.precision=fp32", "schedule.warmup_tokens=64", "optimizer.lr=1e-2",
        f"data.sources=[{{path: {corpus}}}]", "validation.tokens=64", "sampling.samples=1", "sampling.max_tokens=2",
        "evaluation.tasks=[]",
    ]  # fmt: skip


def save_run(config: str, change: Callable[[GPT], None]) -> Path:
    """A run that has a checkpoint at token 0 and nothing else, with weights that `change` has set; its folder."""
    engine = build_engine(load_config(config), World.alone())
    with torch.no_grad():
        change(engine.model)
    run = run_folder(engine.config)
    saver = Saver(run, CheckpointConfig(asynchronous=False), World.alone())
    saver.save(engine.state(), engine.replica, meta_of(engine, position(engine.config, 0, 0), [], False))
    saver.finish()
    return run


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def assert_same_curve(run: Path, expected: Path | Sequence[tuple[float, float]], tolerance: float = LOSS) -> None:
    """The same steps with the same losses and gradient norms as another run, or as (loss, norm) of each step."""
    steps = metrics(run)
    if isinstance(expected, Path):
        assert [line["step"] for line in steps] == [line["step"] for line in metrics(expected)]
        expected = [(line["loss"], line["gradient_norm"]) for line in metrics(expected)]
    assert [line["step"] for line in steps] == list(range(1, len(expected) + 1))
    for line, (loss, norm) in zip(steps, expected, strict=True):
        assert line["loss"] == pytest.approx(loss, abs=tolerance)
        assert line["gradient_norm"] == pytest.approx(norm, abs=NORM)


def charts(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of each tag in TensorBoard's events of a folder, the same by each of TensorBoard's loaders."""
    events, served = EventAccumulator(str(folder), {"scalars": 0}), ServedAccumulator(str(folder), {"tensors": 0})
    events.Reload()
    served.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag, points in found.items():
        assert [e.step for e in served.Tensors(tag)] == [step for step, _ in points], tag
    return found


def wait_for_steps(
    run: Path, count: int, ranks: Sequence[Process | subprocess.Popen[bytes]] = (), incarnation: int = 1
) -> None:
    """Until the incarnation of that number, or a later one, has taken `count` steps; fails if a rank ends before.
    `run`: a run's folder, FOLDER/runs/NAME; its ranks' logs are FOLDER/*.log."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            newest = list_incarnations(run)[-1]
            begin = newest.start()["from_tokens"]
            if newest.number >= incarnation and metrics(run)[-1]["tokens_seen"] >= begin + count * STEP_TOKENS:
                return
        assert all(rank.poll() is None for rank in ranks), f"a rank has ended:\n{logs(run.parent.parent)}"
        time.sleep(0.02)
    raise AssertionError(f"no progress:\n{logs(run.parent.parent)}")


def logs(folder: Path) -> str:
    """The output of ranks and jobs in the folder's *.log and *.out files."""
    files = sorted([*folder.glob("*.log"), *folder.glob("*.out")])
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in files)


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "megagpt: error:" in line]


def assert_one_error(text: str, *parts: str) -> None:
    """One error in what a job has printed, in one line that has all the parts."""
    lines = error_lines(text)
    assert len(lines) == 1, text
    for part in parts:
        assert part in lines[0]
