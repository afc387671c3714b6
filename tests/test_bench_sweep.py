"""`megagpt bench --sweep`: the settings that are measured, the end of a line of batches, and the advice at the end."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.cli import main
from megagpt.config import compiles
from megagpt.config_file import load_config
from megagpt.errors import UserError
from megagpt.measure import bench, steps, sweep
from tests.conftest import Refusal
from tests.test_bench import BENCH

Setting = tuple[int, bool, Any]
Times = Callable[[int, bool, Any], float]
GIB = 2**30
SWEEP = ["bench", "gpt2-124m", *BENCH[2:-4], "--accumulation", "16", "--sweep"]
ON_GPU, ON_CPU = ["--device", "cuda"], ["--device", "cpu"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Setting]]:
    """A pretended machine, instead of processes. It has memory for `room` sequences, and a micro-batch takes `seconds`.
    Gives the settings in the order in which they are measured."""

    def machine(seconds: Times, room: int, full: str | Exception = "out of memory") -> list[Setting]:
        tried: list[Setting] = []

        def run(ranks: int, function: Any, row: steps.Row, method: str) -> Iterator[Any]:
            train = row.config.train
            setting = (train.micro_batch, compiles(row.config.train.compile, "cuda"), train.activation_checkpointing)
            tried.append(setting)
            if train.micro_batch > room * (2 if train.activation_checkpointing == "full" else 1):
                if isinstance(full, Exception):
                    raise full
                yield full
                return
            memory = GIB * (1 + train.micro_batch)
            step = seconds(*setting) * row.config.accumulation(1)
            yield steps.Measured([step], memory, setting[1], 1e-3, None, "device", 1, torch.__version__)

        monkeypatch.setattr(bench, "run_ranks", run)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return tried

    return machine


def faster_compiled(batch: int, compiled: bool, recompute: Any) -> float:
    """A micro-batch of a fixed cost and one for each sequence."""
    return 1.0 + batch * (0.5 if compiled else 1.0) * (1.0 if recompute == "none" else 1.5)


def test_a_gpu_is_filled_along_every_line(
    measured: Callable[..., list[Setting]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = measured(faster_compiled, room=8)
    ticks = iter([100.0, 170.0])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(ticks, 0.0))
    assert main([*SWEEP, *ON_GPU]) == 0
    modes = {"none": [2, 4, 8, 16], "selective": [2, 4, 8, 16], "full": [2, 4, 8, 16, 32]}
    assert tried == [(b, c, mode) for c in (False, True) for mode, batches in modes.items() for b in batches]
    out, err = capsys.readouterr()
    _, _, head, *rows, best = out.splitlines()
    assert head.split()[:6] == ["implementation", "precision", "batch", "compile", "activation", "checkpointing"]
    assert len(rows) == len(tried)
    assert rows[3].split() == ["megagpt", "bf16", "2", "x", "16", "off", "none", "out", "of", "memory"]
    assert "batches of 2, 4, 8, 16, 32 in steps of the same tokens, or until memory is full; without and" in err
    assert "with torch.compile; activation checkpointing none, selective, full" in err
    estimate = "this row took 01:10; at most 30 rows like it take 35:00, and the compiler's time comes on top"
    assert err.count(estimate) == err.count("this row took") == 1
    assert best.startswith(f"best: {8 * 16 / 5:.0f} tok/s with train.micro_batch=8 ")


def test_the_best_setting_goes_into_a_config(
    measured: Callable[..., list[Setting]], capsys: pytest.CaptureFixture[str]
) -> None:
    measured(lambda batch, compiled, recompute: 9.0 if (compiled, recompute) != (True, "selective") else 1.0, room=8)
    assert main([*SWEEP, *ON_GPU, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    overrides = err.splitlines()[-1].partition(" with ")[2].split()
    assert overrides == json.loads(out)["best_overrides"]
    train = load_config("gpt2_124m.yaml", overrides).train
    assert (train.micro_batch, train.compile, train.activation_checkpointing) == (8, True, "selective")


@pytest.mark.parametrize(
    ("accumulation", "expected"),
    [
        ("4", [(2, 4), (4, 2), (8, 1)]),
        ("6", [(2, 6), (4, 3)]),
        ("64", [(2, 64), (4, 32), (8, 16), (16, 8), (32, 4)]),
        (None, [(2, 8), (4, 4), (8, 2), (16, 1)]),
    ],
)
def test_a_step_keeps_its_tokens_along_a_line(
    accumulation: str | None, expected: list[Any], measured: Callable[..., list[Setting]], tmp_path: Path
) -> None:
    measured(faster_compiled, room=16)
    file = tmp_path / "sweep.json"
    command = [*SWEEP[:-3], "--sweep", "batch", *ON_GPU, "--json", str(file)]
    assert main([*command, *(["--accumulation", accumulation] if accumulation else [])]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(r["micro_batch"], r["accumulation"]) for r in rows] == expected
    assert len({r["tokens_per_step"] for r in rows}) == 1
    full = expected[-1][0] == 32
    assert [r["failure"] for r in rows] == [None] * (len(rows) - full) + ["out of memory"] * full
    assert (rows[-1]["tokens_per_second"] is None) == full


@pytest.mark.parametrize(
    ("axes", "arguments", "expected"),
    [
        ("batch", [], [(2, "none"), (4, "none"), (8, "none")]),
        ("compile", ["--rounds", "2"], [(2, "none")] * 4),
        ("activation_checkpointing", [], [(2, "none"), (2, "selective"), (2, "full")]),
        ("", ["--no-compile", "train.activation_checkpointing={every: 2}"], [(b, {"every": 2}) for b in (2, 4, 8)]),
        ("batch", ["--precision", "fp32", "--precision", "fp16"], [(b, "none") for b in (2, 4, 8)] * 2),
    ],
)
def test_axes_are_chosen_by_name_and_by_what_is_free(
    axes: str, arguments: list[str], expected: list[Any], measured: Callable[..., list[Setting]]
) -> None:
    tried = measured(faster_compiled, room=4)
    assert main([*SWEEP, *([axes] if axes else []), *ON_GPU, *arguments]) == 0
    assert [(batch, mode) for batch, _, mode in tried] == expected
    compiled = [setting[1] for setting in tried]
    assert compiled == ([False, True] * 2 if axes == "compile" else [compiled[0]] * len(tried))


def test_words_after_sweep_are_no_axes(measured: Callable[..., list[Setting]]) -> None:
    for words in (["bench", "--sweep", "gpt2-124m"], ["bench", "gpt2-124m", "--sweep", "train.spike=none"]):
        tried = measured(faster_compiled, room=4)
        assert main([*words, "--batch", "4", *ON_GPU]) == 0
        assert tried[:2] == [(4, False, "none"), (8, False, "none")]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["recomputation"], ["--sweep 'recomputation'", "valid: batch, compile, activation_checkpointing"]),
        ([","], ["--sweep ',' names no axis; valid: batch, compile, activation_checkpointing"]),
        (["compile", "--compile"], ["--sweep compile tries every value: leave out --compile"]),
        (
            ["activation_checkpointing", "train.activation_checkpointing=full"],
            ["leave out the override of train."],
        ),
        (
            ["batch", "--accumulation", "3"],
            ["--accumulation 3: a step of 3 micro-batches", "go from 2 to 16; or"],
        ),
        (["batch", "--against", "plain"], ["--sweep measures megagpt in many settings: leave out --against"]),
    ],
)
def test_a_contradictory_sweep_is_refused(arguments: list[str], parts: list[str], refusal: Refusal) -> None:
    refusal([*SWEEP, *arguments, *ON_CPU], *parts)


def test_a_failure_ends_its_line_only(
    measured: Callable[..., list[Setting]], capsys: pytest.CaptureFixture[str]
) -> None:
    tried = measured(faster_compiled, room=2, full=UserError("[rank 0 of 1] CUDA error: too many threads"))
    assert main([*SWEEP, "batch,activation_checkpointing", *ON_GPU, "--rounds", "2"]) == 0
    assert [batch for batch, *_ in tried] == [2, 4, 2, 4, 2, 4, 8, 2, 2, 2, 4]
    assert "CUDA error: too many threads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fastest", "free", "expected", "said"),
    [
        (1000, 40, [2, 4, 8, 16, 32], "64 is left out: it would take about 65.0 GiB, of which 40.0 are free"),
        (1000, 8, [2, 4], "8 is left out: it would take about 9.0 GiB, of which 8.0 are free"),
        (1000, 5, [2], "4 is left out: it would take about 6.0 GiB, of which 5.0 are free"),
        (4, 1000, [2, 4, 8], "8, 16, 32, 64 in steps of the same tokens, or until one is no faster than half of it"),
    ],
)
def test_a_cpu_is_not_filled(
    fastest: int, free: int, expected: list[int], said: str, measured: Callable[..., list[Setting]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A row takes a GiB and one for each sequence; speed grows up to the fastest batch."""
    tried = measured(lambda batch, *_: float(max(batch, fastest)), room=1000)
    monkeypatch.setattr(sweep, "free_memory", lambda: free * GIB)
    assert main([*SWEEP, "batch", *ON_CPU, "--accumulation", "32"]) == 0
    assert [batch for batch, *_ in tried] == expected
    assert said in capsys.readouterr().err
