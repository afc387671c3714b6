"""`megagpt bench --sweep`: which settings are measured, what ends a line of batches, and the advice at the end."""

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
SWEEP = ["bench", "gpt2-124m", *BENCH[2:-4], "--sweep"]
ON_GPU, ON_CPU = ["--device", "cuda"], ["--device", "cpu"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Setting]]:
    """Replaces processes by a machine with memory for a number of sequences, whose steps take the given seconds. Gives
    the settings in the order in which they are measured."""

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
            yield steps.Measured([seconds(*setting)], memory, 1e-3, None, "device", 1, torch.__version__)

        monkeypatch.setattr(bench, "run_ranks", run)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return tried

    return machine


def faster_compiled(batch: int, compiled: bool, recompute: Any) -> float:
    """A step of a fixed cost and one for each sequence."""
    return 1.0 + batch * (0.5 if compiled else 1.0) * (1.0 if recompute == "none" else 1.5)


def test_a_gpu_is_filled_along_every_line(
    measured: Callable[..., list[Setting]], capsys: pytest.CaptureFixture[str]
) -> None:
    tried = measured(faster_compiled, room=8)
    assert main([*SWEEP, *ON_GPU]) == 0
    modes = {"none": [2, 4, 8, 16], "selective": [2, 4, 8, 16], "full": [2, 4, 8, 16, 32]}
    assert tried == [(b, c, mode) for c in (False, True) for mode, batches in modes.items() for b in batches]
    out, err = capsys.readouterr()
    _, _, head, *rows, best = out.splitlines()
    assert head.split()[:5] == ["implementation", "precision", "batch", "compile", "recompute"]
    assert len(rows) == len(tried)
    assert rows[3].split() == ["megagpt", "bf16", "16", "off", "none", "out", "of", "memory"]
    assert "until memory is full; without and with torch.compile; activation checkpointing none, " in err
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


def test_a_step_keeps_its_tokens_while_batches_grow(measured: Callable[..., list[Setting]], tmp_path: Path) -> None:
    measured(faster_compiled, room=16)
    file = tmp_path / "sweep.json"
    assert main([*SWEEP, "batch", *ON_GPU, "--accumulation", "4", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(r["micro_batch"], r["accumulation"]) for r in rows] == [(2, 4), (4, 2), (8, 1), (16, 1), (32, 1)]
    assert [r["failure"] for r in rows] == [None] * 4 + ["out of memory"]
    assert rows[-1]["tokens_per_second"] is None


@pytest.mark.parametrize(
    ("axes", "arguments", "expected"),
    [
        ("batch", [], [(2, "none"), (4, "none"), (8, "none")]),
        ("compile", ["--rounds", "2"], [(2, "none")] * 4),
        ("recompute", [], [(2, "none"), (2, "selective"), (2, "full")]),
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
        (["recomputation"], ["--sweep 'recomputation'", "valid: batch, compile, recompute"]),
        ([","], ["--sweep ',' names no axis; valid: batch, compile, recompute"]),
        (["compile", "--compile"], ["--sweep compile tries every value: leave out --compile"]),
        (["recompute", "train.activation_checkpointing=full"], ["leave out the override of train.activation_check"]),
        (["batch", "--against", "plain"], ["--sweep measures megagpt in many settings: leave out --against"]),
    ],
)
def test_a_contradictory_sweep_is_refused(arguments: list[str], parts: list[str], refusal: Refusal) -> None:
    refusal([*SWEEP, *arguments, *ON_CPU], *parts)


def test_a_failure_ends_its_line_only(
    measured: Callable[..., list[Setting]], capsys: pytest.CaptureFixture[str]
) -> None:
    tried = measured(faster_compiled, room=2, full=UserError("[rank 0 of 1] CUDA error: too many threads"))
    assert main([*SWEEP, "batch,recompute", *ON_GPU, "--rounds", "2"]) == 0
    assert [batch for batch, *_ in tried] == [2, 4, 2, 4, 2, 4, 8, 2, 2, 2, 4]
    assert "CUDA error: too many threads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fastest", "free", "expected", "said"),
    [
        (1000, 40, [2, 4, 8, 16, 32], "64 is left out: it would take about 65.0 GiB, of which 40.0 are free"),
        (1000, 8, [2, 4], "8 is left out: it would take about 9.0 GiB, of which 8.0 are free"),
        (1000, 5, [2], "4 is left out: it would take about 6.0 GiB, of which 5.0 are free"),
        (4, 1000, [2, 4, 8], "4, 8, ... until one is no faster than half of it, or would not fit"),
    ],
)
def test_a_cpu_is_not_filled(
    fastest: int, free: int, expected: list[int], said: str, measured: Callable[..., list[Setting]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A row takes a GiB and one for each sequence; speed grows up to the fastest batch."""
    tried = measured(lambda batch, *_: float(max(batch, fastest)), room=1000)
    monkeypatch.setattr(sweep, "free_memory", lambda: free * GIB)
    assert main([*SWEEP, "batch", *ON_CPU]) == 0
    assert [batch for batch, *_ in tried] == expected
    assert said in capsys.readouterr().err
