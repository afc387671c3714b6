"""`megagpt bench`: how many steps are timed, what they compute, and what is shown when; what `parity` refuses."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megagpt.cli import main
from megagpt.errors import UserError
from megagpt.measure import steps
from megagpt.measure.plain import PlainGPT, plain_optimizer, plain_step
from megagpt.models.presets import ModelConfig
from tests.conftest import Refusal

MODEL = ["model.layers=1", "model.width=32", "model.heads=2", "model.vocab_size=500"]
BENCH = ["bench", "gpt2-124m", *MODEL, "--batch", "2", "--context", "16", "--precision", "fp32", "--device", "cpu"]


@pytest.mark.parametrize(
    ("device", "asked", "all_steps", "measured"),
    [("cpu", None, 7, 5), ("cpu", 3, 5, 3), ("cuda", None, 60, 50), ("cuda", 3, 13, 3)],
)
def test_a_gpu_warms_up_longer(
    device: str, asked: int | None, all_steps: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, waited = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    seconds = steps._time(lambda: taken.append(1), torch.device(device), asked)
    assert (len(taken), len(seconds)) == (all_steps, measured)
    assert len(waited) == (all_steps if device == "cuda" else 0)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulated_micro_batches_are_one_step_of_the_whole_batch(micro_batches: int) -> None:
    config = ModelConfig(layers=1, width=32, heads=2, context=16, vocab_size=500)
    rows = torch.randint(500, (4, 17), generator=torch.Generator().manual_seed(1))
    found = []
    for count in (1, micro_batches):
        torch.manual_seed(0)
        model = PlainGPT(config)
        optimizer = plain_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
        curve = [plain_step(model, optimizer, rows[:, :-1], rows[:, 1:], 0.2, micro_batches=count) for _ in range(3)]
        found.append([value.item() for step in curve for value in step])
    assert found[1] == pytest.approx(found[0], rel=2e-5)


def here(ranks: int, function: Any, *arguments: Any, method: str) -> Iterator[Any]:
    """A rank in this process."""
    return function(*arguments)


def test_rows_are_shown_as_they_come(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The second row fails: the first one's numbers were shown."""

    def second_fails(ranks: int, function: Any, row: steps.Row, method: str) -> Iterator[Any]:
        if row.implementation == "plain":
            raise UserError("broken on purpose")
        return function(row)

    monkeypatch.setattr(steps, "run_ranks", second_fails)
    assert main([*BENCH, "--against", "plain", "--steps", "1", "--rounds", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "round 1 of 1: megagpt fp32 ..."
    assert " s/step, median " in lines[1]
    assert lines[2] == "round 1 of 1: plain fp32 ..."
    assert lines[3] == "megagpt: error: plain fp32: broken on purpose"


@pytest.mark.parametrize(
    ("override", "argument"),
    [("train.tokens=9e9", "--batch and --accumulation"), ("train.batch_tokens=64", "--batch and --accumulation"),
     ("train.micro_batch=1", "--batch"), ("train.precision=bf16", "--precision"), ("train.device=cpu", "--device"),
     ("train={compile: true}", "--compile"), ("model.context=8", "--context"), ("engine.name=zero", "--engine"),
     ("model.preset=gpt3-xl", "PRESET")],
)  # fmt: skip
def test_keys_that_an_argument_decides_are_refused(override: str, argument: str, refusal: Refusal) -> None:
    refusal([*BENCH, override], f"from {argument}", f"leave out the override {override}")


def test_parity_refuses_tables_that_it_cannot_measure(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    for tables in (",", ""):
        refusal(["parity", "--tables", tables], f"--tables {tables!r} names no table; valid: fp32, bf16, residual, memory")
    refusal(["parity", "--tables", "fp32,speed"], "--tables 'speed': valid: fp32, bf16, residual, memory, crossings")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("memory", "crossings"):
        command = ["parity", "--device", "cuda", "--tables", f"fp32,{name}"]
        refusal(command, f"--tables {name}: is measured on the CPU only", "--device cpu")


def test_a_step_is_all_its_micro_batches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(steps, "run_ranks", here)
    monkeypatch.setattr(steps, "_time", lambda step, device, count: [step() and 0.5, 0.25, 1.0])
    assert main([*BENCH, "--accumulation", "3", "--against", "plain", "--rounds", "1"]) == 0
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert "3 x 2 x 16 tokens a step" in title
    assert head.split()[:5] == ["implementation", "precision", "s/step", "median", "tok/s"]
    assert [row.split()[:5] for row in rows] == [
        [name, "fp32", "0.250", "0.500", "384"] for name in ("megagpt", "plain")
    ]
