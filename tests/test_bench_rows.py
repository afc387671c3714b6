"""One row of `megagpt bench`: its process, which may end or fail at any point, and the facts that it reports."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from megagpt import console
from megagpt.cli import main
from megagpt.config_file import build_config
from megagpt.engines import engine
from megagpt.errors import Killed, UserError
from megagpt.measure import bench, processes, steps
from megagpt.process_memory import is_out_of_memory
from megagpt.world import World
from tests.conftest import Refusal
from tests.test_bench import BENCH, found, untimed


def too_large(*arguments: Any, **more: Any) -> None:
    """Raises the real error of a CPU's allocator, as a compiler wraps it."""
    try:
        torch.empty(2**60)
    except RuntimeError as cause:
        raise BackendCompilerFailed(too_large, cause, None) from cause


def test_memory_that_runs_out_ends_a_row_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untimed(monkeypatch)
    monkeypatch.setattr(steps, "plain_step", too_large)
    assert main([*BENCH, "--against", "plain", "--rounds", "2"]) == 0
    out, err = capsys.readouterr()
    own, plain = out.splitlines()[-2:]
    assert own.split()[2] == "0.2500"
    assert plain.split() == ["plain", "fp32", "out", "of", "memory"]
    assert err.count("plain fp32 ...\n  out of memory\n") == 1, "not tried again"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (UserError("the file is full"), False),
    ],
)
def test_full_memory_is_told_from_other_errors(error: Exception, full: bool) -> None:
    assert is_out_of_memory(error) == full


def test_other_errors_are_not_taken_for_full_memory(monkeypatch: pytest.MonkeyPatch, refusal: Refusal) -> None:
    untimed(monkeypatch)
    monkeypatch.setattr(steps, "plain_step", lambda *arguments, **more: [][1])
    with pytest.raises(IndexError):
        main([*BENCH, "--against", "plain", "--rounds", "1"])


def killed_in_plain(row: steps.Row) -> Iterator[Any]:
    """Another process may do no more than this: it is found by its name."""
    if row.implementation == "plain":
        os.kill(os.getpid(), signal.SIGKILL)
    yield found([1.0])
    if row.steps == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_row_that_the_kernel_kills_is_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Linux kills a process that takes more memory than there is: in plain's steps, and after megagpt's."""
    monkeypatch.setattr(bench, "measure", killed_in_plain)
    monkeypatch.setattr(processes, "enter", lambda environment, *streams: os.environ.update(environment))
    fork = partial(processes.run_ranks, 1)
    monkeypatch.setattr(bench, "run_ranks", lambda ranks, *work, method: fork(*work, method="fork"))
    assert main([*BENCH, "--against", "plain", "--rounds", "1", "--steps", "1"]) == 0
    out, err = capsys.readouterr()
    own, plain = out.splitlines()[-2:]
    assert own.split()[2] == "1.0000"
    assert plain.split() == ["plain", "fp32", "out", "of", "memory"]
    assert err.count("  [rank 0 of 1] died of SIGKILL (out of memory, if nobody sent it)\n") == 2
    assert "  its matrix products were not timed: out of memory\n" in err


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    """Its last line is not the reason."""
    (tmp_path / "1").write_text("a warning\n")
    found = processes._error(tmp_path, [1, -signal.SIGKILL])
    assert isinstance(found, Killed)
    assert str(found) == "[rank 1 of 2] died of SIGKILL (out of memory, if nobody sent it)"
    assert str(processes._error(tmp_path, [0, 1])) == "a warning"


def test_steps_count_if_their_products_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untimed(monkeypatch)
    monkeypatch.setattr(steps, "matrix_seconds", too_large)
    assert main([*BENCH, "--rounds", "1", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["rows"]
    assert (row["seconds"], row["failure"], row["products_share"]) == ([[0.5, 0.25, 1.0]], None, None)
    assert row["matrix_seconds"] == []
    assert "  its matrix products were not timed: out of memory\n" in err
    assert "n/a" in err.splitlines()[-1]


def test_a_later_failure_is_in_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = iter([found([1.0]), "out of memory"])
    monkeypatch.setattr(bench, "run_ranks", lambda *arguments, method: iter([next(results)]))
    assert main([*BENCH, "--rounds", "3"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("megagpt")
    assert row.endswith("  then out of memory")


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.slow
def test_rows_say_whether_they_were_compiled(
    auto: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In a process that finds no compiler: megagpt's engine and the plain loop ask the same function."""
    untimed(monkeypatch)
    say_once = "train.compile auto: off, and steps take longer: no compiler"

    def asked(config: Any, world: Any) -> bool:
        console.say(say_once)
        return False

    monkeypatch.setattr(engine, "is_compiled", asked)
    monkeypatch.setattr(steps, "is_compiled", asked if auto else lambda config, world: True)
    monkeypatch.setattr(steps.torch, "compile", lambda function, dynamic: function)
    assert main([*BENCH, "--against", "plain", "--json", str(tmp_path / "found")]) == 0
    assert [row["compile"] for row in json.loads((tmp_path / "found").read_text())["rows"]] == [False, not auto]
    out, err = capsys.readouterr()
    assert err.splitlines().count(f"  {say_once}") == (2 if auto else 1), "once for each row, not for each round"
    title, _, head, own, plain = out.splitlines()[-5:]
    if auto:
        assert "compile off (the default here)" in title
        assert "compile" not in head
    else:
        assert "compile" not in title
        assert (own.split()[2], plain.split()[2]) == ("off", "on")


def test_rows_say_which_numerics_they_have(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And are measured in the precisions that allow them."""
    untimed(monkeypatch)
    command = [word for word in BENCH if word not in ("--precision", "fp32")]
    assert main([*command, "train.residual=bf16", "--rounds", "1", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["rows"]
    assert (row["residual"], row["float8"], row["overrides"][-1]) == ("bf16", "none", "train.residual=bf16")
    assert err.splitlines()[-4].endswith(" train.residual=bf16")


def test_float8_has_no_share_of_products_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where stand-ins take the step's place."""
    tree = {"model": {"layers": 1, "width": 32, "heads": 2, "context": 16, "vocab_size": 512}}
    train = {"tokens": 32, "batch_tokens": 32, "micro_batch": 2, "precision": "bf16"}
    monkeypatch.setattr(steps, "_step", lambda row, world: (lambda: None, True))
    monkeypatch.setattr(steps, "time_steps", lambda step, device, count: [1.0])
    monkeypatch.setattr(steps, "matrix_seconds", lambda *arguments: 0.5)
    for scaling, shares in (("none", [None, 0.5]), ("tensorwise", [None])):
        config = build_config({**tree, "train": {**train, "float8": scaling}}, "t")
        with monkeypatch.context() as patch:
            patch.setattr(steps, "join", lambda device, tune_allocator: contextlib.nullcontext(World.alone()))
            rows = list(steps.measure(steps.Row("megagpt", config, None, True)))
        assert [row.matrix_seconds for row in rows if isinstance(row, steps.Measured)] == shares
