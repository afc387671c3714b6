"""A run is sized to its devices: with stand-ins for a GPU's memory, and engines whose memory runs out."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megagpt.cli import main
from megagpt.config import Config
from megagpt.config_file import load_config, load_run
from megagpt.engines.engine import Engine, build_engine
from megagpt.engines.loss_scale import loss_scale
from megagpt.errors import UserError
from megagpt.training import sizing
from megagpt.training.sizing import Sizing, build_sized, size_run
from megagpt.world import World, join
from tests.conftest import Refusal, Tiny, metrics
from tests.processes import run_ranks
from tests.runs import LOSS, losses

H100 = "NVIDIA H100 80GB HBM3"
SMALL = 3e9
"""Bytes in which every micro-batch of the tiny run fits."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets this process's CPU pass for a GPU of that memory and name when a run is sized."""

    def be(memory: float, name: str = H100) -> None:
        monkeypatch.setattr(sizing, "gpu_memory", lambda device: memory)
        monkeypatch.setattr(sizing, "device_name", lambda device: name)
        monkeypatch.setattr("megagpt.hardware.device_name", lambda device: name)

    return be


class Trial:
    """Builds engines that hold at most `most` sequences, and notes the sizes."""

    def __init__(self, most: int) -> None:
        self.most, self.tried = most, list[int]()

    def __call__(self, config: Config, world: World) -> Any:
        def train_step(batch: Any, lr: float) -> None:
            engine.loss_scale.update(finite=False)
            (tokens, targets), *_ = batch.micro_batches
            assert tokens.shape == targets.shape == (config.micro_batch, config.model.context)
            self.tried.append(config.micro_batch)
            if len(tokens) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        engine = SimpleNamespace(config=config, initialize=list, train_step=train_step, loss_scale=loss_scale("fp16"))
        return engine


def sized(config: Config, *choices: int) -> Sizing:
    return Sizing(config, choices)


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory_goes_one_down(tiny: Tiny) -> None:
    config, trial = load_config(str(tiny()), ["train.micro_batch=auto"]), Trial(most=2)
    found, engine = build_sized(sized(config, 4, 2, 1), World.alone(), trial)
    assert (trial.tried, found.micro_batch) == ([4, 2], 2)
    assert engine.loss_scale == loss_scale("fp16"), "as if no step had been taken"
    with pytest.raises(
        UserError, match=r"memory runs out with micro-batches of 1, although .*; set engine\."
    ) as caught:
        build_sized(sized(config, 4, 2, 1), World.alone(), Trial(most=0))
    assert "train.micro_batch" not in str(caught.value).partition("; ")[2], "there is no smaller one"


def test_another_error_of_a_trial_is_no_lack_of_memory(tiny: Tiny) -> None:
    def build(config: Config, world: World) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        build_sized(sized(load_config(str(tiny()), ["train.micro_batch=auto"]), 4), World.alone(), build)


def two_ranks(config: str) -> list[Any]:
    """Memory runs out on both ranks, and then on one of them only."""
    sizing._PATIENCE_SECONDS = 1.0
    with join("cpu") as world:
        wanted = load_config(config, ["train.micro_batch=auto"])
        found, _ = build_sized(sized(wanted, 2, 1), world, Trial(most=1))
        time.sleep(0.5 * world.rank)
        try:
            sizing._some_failed(found, world, 9, failed=world.rank == 1)
        except UserError as error:
            problem = str(error)
        else:
            problem = ""
        return [found.micro_batch, problem]


def test_the_ranks_agree_and_a_rank_alone_ends_them(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, problem in run_ranks(2, two_ranks, str(tiny())):
        assert size == 1
        assert problem == ""


def stuck(config: str) -> str:
    """One rank runs out of memory; the other one waits for it in a collective, and so says nothing."""
    sizing._PATIENCE_SECONDS = 0.5
    with join("cpu") as world:
        if world.rank == 0:
            time.sleep(3)
            return ""
        with pytest.raises(UserError) as caught:
            sizing._some_failed(load_config(config), world, 0, failed=True)
        return str(caught.value)


def curves(config: str, engines: list[list[str]]) -> list[Any]:
    """Three steps of each engine, and of one that has taken a trial step before."""
    found = []
    with join("cpu") as world:
        for overrides in engines:
            wanted = load_config(config, ["train.micro_batch=2", *overrides])
            batch = sizing._batch(wanted, world)
            _, tried = build_sized(sized(wanted, 2), world)
            tried.initialize()
            found.append(
                [[e.train_step(batch, 1e-2)[:2] for _ in range(3)] for e in (build_engine(wanted, world), tried)]
            )
    return found


@pytest.mark.slow
def test_no_engine_remembers_a_trial(tiny: Tiny) -> None:
    engines = [["engine.name=ddp"], ["engine.name=fsdp"]]
    engines += [["engine.name=zero", f"engine.stage={stage}", f"train.precision={precision}"]
                for stage, precision in ((1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32"))]  # fmt: skip
    for fresh, tried in run_ranks(2, curves, str(tiny()), engines)[0]:
        assert tried == fresh
        assert len({loss for loss, _ in fresh}) == 3


def test_a_rank_that_ran_out_alone_does_not_wait_forever(tiny: Tiny) -> None:
    _, problem = run_ranks(2, stuck, str(tiny()))
    assert problem.startswith("1 of 2 ranks ran out of memory in the trial")
    assert problem.endswith("set train.micro_batch=2")


def test_a_run_that_cannot_fit_is_refused_before_it_begins(
    tiny: Tiny, tmp_path: Path, gpu: Callable[..., None], refusal: Refusal
) -> None:
    gpu(1e6)
    refusal(["train", str(tiny())], "tiny does not fit on 1 GPU(s) of 0.0 GB", H100, "take GPUs with more memory")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_auto_on_a_gpu_is_the_same_run(
    tiny: Tiny, tmp_path: Path, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A trial of 4 runs out of memory, one of 2 does not. The plan is shown beside what was measured."""
    assert main(["train", str(tiny()), "run.name=fixed"]) == 0
    gpu(SMALL)
    real, steps = Engine.train_step, list[int]()

    def train_step(engine: Engine, batch: Any, *arguments: Any) -> Any:
        steps.append(engine.config.micro_batch)
        if engine.config.micro_batch > 2:
            raise torch.OutOfMemoryError
        return real(engine, batch, *arguments)

    monkeypatch.setattr(Engine, "train_step", train_step)
    config, run = str(tiny()), tmp_path / "runs" / "tiny"
    assert main(["train", config, "train.micro_batch=auto", "checkpoint.every_tokens=1280"]) == 0
    assert steps == [4, *[2] * 21]
    printed = capsys.readouterr().out
    assert "a trial step with micro-batches of 4 runs out of memory" in printed
    assert losses(run) == pytest.approx(losses(run.parent / "fixed"), abs=LOSS)
    start = json.loads((run / "incarnations" / "000001.json").read_text())
    assert start["micro_batch"] == 2
    assert load_run(run).train.micro_batch == "auto"
    meta = json.loads((run / "checkpoints" / "000000000002560" / "meta.json").read_text())
    assert meta["config"]["train"]["micro_batch"] == 2

    tenth, last = metrics(run, "plan")
    assert (tenth["step"], last["step"]) == (10, 20)
    for line in (tenth, last):
        assert line["predicted_memory_bytes"] == start["plan"]["memory_bytes"]
        assert line["measured_memory_bytes"] > 0
        assert line["predicted_tokens_per_second_low"] < line["predicted_tokens_per_second"]
        assert line["measured_tokens_per_second"] > 0
    assert printed.count("\nplan: memory ") == 2
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "\nplan         memory " in shown
    assert ", micro-batches of 2, from 0 tokens" in shown
    assert main(["status", "--json", str(run)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["micro_batch"], found["plan"]["memory_bytes"]) == (2, tenth["predicted_memory_bytes"])

    # The resume takes the same without another trial.
    steps.clear()
    assert main(["train", "--resume", str(run), "--at", "1280"]) == 0
    assert steps == [2] * 10
    assert "2 micro-batch(es) of 2 per step and rank, as in this run's last inc" in capsys.readouterr().out


def last_of(config: Config, **facts: Any) -> dict[str, Any]:
    memory = sizing.peak_memory(sizing.with_micro_batch(config, 2), 1).total
    return {"world_size": 1, "device": H100, "micro_batch": 2, "plan": {"memory_bytes": memory}, **facts}


def test_a_resume_takes_the_same_micro_batch_or_a_smaller_one(tiny: Tiny, gpu: Callable[..., None]) -> None:
    gpu(SMALL)
    config, world = load_config(str(tiny()), ["train.micro_batch=auto"]), World.alone()

    def found(**facts: Any) -> tuple[int, tuple[int, ...]]:
        sizing = size_run(config, world, last_of(config, **facts))
        return sizing.config.micro_batch, sizing.choices

    assert found() == (2, ())
    assert found(ended={"outcome": "failed", "reason": "the disk is full"}) == (2, ())
    full = {"outcome": "failed", "reason": "CUDA out of memory. Tried to allocate 2.00 GiB."}
    assert found(ended=full) == (1, (1,))
    for changed in ({"world_size": 2}, {"device": "NVIDIA H200"}, {"plan": {"memory_bytes": 1.0}}, {"plan": None}):
        assert found(**changed) == (4, (4, 2, 1)), changed


def test_a_gpu_of_other_programs_has_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from megagpt.process_memory import gpu_memory

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2e9)
    for free, expected in ((82.5e9, 85e9), (60e9, 62e9)):  # CUDA's own context does not count
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 85e9))
        assert gpu_memory(device) == expected
    assert gpu_memory(torch.device("cpu")) is None
