"""A rank that stops: the others leave their stacks, say who is missing, and end."""

import itertools
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from torch.distributed import TCPStore

from megagpt import console
from megagpt.cli import main
from megagpt.errors import ExitCode
from megagpt.incarnations import list_incarnations
from megagpt.measure.processes import free_port, rank_environment
from megagpt.models.gpt import MLP
from megagpt.training import watchdog
from megagpt.training.watchdog import Watchdog
from megagpt.world import World
from tests.conftest import metrics, write_tiny
from tests.processes import Process, megagpt, start_ranks
from tests.runs import PATIENCE, error_lines, logs, wait_for_steps

TIMEOUT = 4


def hang(tmp_path: Path, corpus: Path, stopped: int, wakes: bool) -> tuple[list[int], str]:
    """A run whose rank `stopped` is halted on the way, until the other has noticed or for ever; exit codes and what the
    ranks printed."""
    config = write_tiny(tmp_path, corpus, train={"tokens": 128 * 100_000, "micro_batch": 2})
    run = tmp_path / "runs" / "tiny"
    ranks = start_ranks(2, [str(config), f"train.hang_timeout={TIMEOUT}", "checkpoint.every_tokens=640"], tmp_path)
    wait_for_steps(run, 12, ranks)
    ranks[stopped].send_signal(signal.SIGSTOP)
    if wakes:
        noticed, deadline = run / "hangs" / "000001" / f"flight_recorder_{1 - stopped}", time.monotonic() + PATIENCE
        while not noticed.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks[stopped].send_signal(signal.SIGCONT)
    codes = [ranks[1 - stopped].wait(PATIENCE)]
    ranks[stopped].send_signal(signal.SIGCONT)
    codes.insert(stopped, ranks[stopped].wait(PATIENCE))
    return codes, logs(tmp_path)


@pytest.mark.timing
def test_every_rank_leaves_stacks_and_last_collectives(tmp_path: Path, corpus: Path) -> None:
    codes, output = hang(tmp_path, corpus, stopped=1, wakes=True)
    run = tmp_path / "runs" / "tiny"
    assert codes[0] == ExitCode.HUNG
    (line,) = [line for line in output.splitlines() if "megagpt: error:" in line]
    assert "no progress for" in line
    assert f"every rank's stack is in {run / 'hangs' / '000001'}" in line
    assert "no answer" not in line
    for rank in range(2):
        text = (run / "hangs" / "000001" / f"rank_{rank}.txt").read_text()
        assert text.startswith(f"rank {rank} on ")
        assert "in train_step" in text or "in loop" in text
        trace = pickle.loads((run / "hangs" / "000001" / f"flight_recorder_{rank}").read_bytes())
        assert any("all_reduce" in entry["profiling_name"] for entry in trace["entries"])
    end = list_incarnations(run)[0].ended()
    assert (end["outcome"], end["reason"][:11]) == ("failed", "no progress")
    assert end["retry"]

    total = metrics(run)[-1]["tokens_seen"] + 256
    done = megagpt("train", "--resume", str(run), f"train.tokens={total}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [step["step"] for step in metrics(run)] == list(range(1, total // 128 + 1))


def stuck_in_a_block(arguments: list[str]) -> int:
    """A run whose last rank stays in its second block in the third step."""
    usual, calls = MLP.forward, itertools.count(1)

    def forward(self: MLP, *inputs: Any, **named: Any) -> Any:
        if next(calls) == 2 * 4 + 2:  # two blocks and two micro-batches in each step
            time.sleep(PATIENCE)
        return usual(self, *inputs, **named)

    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        MLP.forward = forward  # type: ignore[assignment, method-assign]
    return main(arguments)


@pytest.mark.timing
def test_the_tensor_rank_that_keeps_the_others_is_named(tmp_path: Path, corpus: Path) -> None:
    """All ranks are in the same step, and wait for each other: only the one for which all wait is the cause."""
    config = write_tiny(tmp_path, corpus, train={"micro_batch": 1})
    command = ["train", str(config), "engine.name=fsdp", "engine.tensor_ranks=2", f"train.hang_timeout={TIMEOUT}"]
    port = free_port()
    ranks = []
    for rank in range(4):
        log, place = tmp_path / f"rank_{rank}.log", rank_environment(rank, 4, port)
        ranks.append(Process(stuck_in_a_block, command, cwd=tmp_path, stdout=log, stderr=log, variables=place))
    assert [rank.wait(PATIENCE) for rank in ranks] == [ExitCode.HUNG] * 4
    (line,) = error_lines(logs(tmp_path))
    said = r" in step 3; rank 3 has not joined all_gather \d+ of ranks [12], 3; every rank's stack"
    assert re.search(said, line), line
    stacks = [(tmp_path / "runs" / "tiny" / "hangs" / "000001" / f"rank_{rank}.txt").read_text() for rank in (2, 3)]
    assert ["in _all_gather\n" in stack for stack in stacks] == [True, False]


@pytest.mark.timing
def test_a_rank_that_never_answers_delays_nobody(tmp_path: Path, corpus: Path) -> None:
    """Not even the one that holds the store, by which ranks tell each other."""
    codes, _ = hang(tmp_path, corpus, stopped=0, wakes=False)
    assert codes[1] == ExitCode.HUNG
    assert (tmp_path / "runs" / "tiny" / "hangs" / "000001" / "rank_1.txt").exists()


def test_missing_ranks_and_their_phases_are_named(tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    one = Watchdog(World(0, 4, 0, torch.device("cpu"), store), tmp_path, 60, print)
    one.phase("step 7")
    for rank, phase in ((0, "step 7"), (1, "step 6, waiting for data"), (3, "step 7")):
        store.set(f"megagpt/hung/{rank}/collectives", "{}")
        store.set(f"megagpt/hung/{rank}", phase)
    assert store.get("megagpt/hung/3") == b"step 7"  # so the other connection sees them, too
    expected = "; rank 1 in step 6, waiting for data; no answer from rank(s) 2: stopped, or their host is gone"
    assert one._others() == expected


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("has", [("_dump_nccl_trace",), ("_dump_fr_trace",), ()], ids=str)
def test_the_flight_recorder_is_written_or_its_absence_is(
    device: str, has: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds differ in the functions that they have, and in which of them records."""
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        entries = [{"profiling_name": "all_reduce"}] if name in has else []
        trace = pickle.dumps({"entries": entries}) if has else b""
        monkeypatch.setattr(c10d, name, lambda trace=trace: trace, raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    Watchdog(World(3, 1, 3, torch.device(device)), tmp_path, 60, print)._dump(61)
    text = (tmp_path / "rank_3.txt").read_text()
    assert text.startswith("rank 3 on ")
    assert "_dump" in text, "no stack"
    assert ("no flight recorder" in text) == (not has)
    assert (tmp_path / "flight_recorder_3").exists() == bool(has)


@pytest.mark.parametrize("stuck", ["disk", "stderr"])
def test_a_stuck_disk_or_stream_keeps_nothing_else_back(
    stuck: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is recorded although nobody reads stderr, and the error is printed although the disk hangs."""
    done: list[str] = []
    test_ends = threading.Event()

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(watchdog, "_DUMP_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", leave)
    works = {"disk": done.append, "stderr": done.append} | {stuck: lambda _: test_ends.wait(PATIENCE)}
    monkeypatch.setattr(console, "warn", works["stderr"])
    with pytest.raises(SystemExit) as left:
        Watchdog(World.alone(), tmp_path, 60, works["disk"])._end(61)
    test_ends.set()
    assert left.value.code == ExitCode.HUNG
    reason = f"no progress for 61 s in starting; every rank's stack is in {tmp_path}"
    assert done == [reason if stuck == "stderr" else f"megagpt: error: [rank 0 of 1] {reason}"]


def test_patient_work_may_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the looks move on: at each of them, the rank's work goes on to its next `yield`."""
    now, ended = 0.0, []
    monkeypatch.setattr("megagpt.training.watchdog.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Watchdog, "_end", lambda self, silent: ended.append(silent))
    watchdog = Watchdog(World.alone(), tmp_path, 3.0, print)

    def work() -> Iterator[None]:
        with watchdog.patient("a save"):
            for _ in range(9):
                yield
        for _ in range(4):
            watchdog.phase("step")
            yield
            yield
            yield
        assert ended == []
        yield  # 3 s after the last phase began, which is the limit
        yield

    def wait(seconds: float) -> bool:
        nonlocal now
        now += seconds
        return next(looks, "over") == "over"

    looks = work()
    monkeypatch.setattr(watchdog, "_left", SimpleNamespace(wait=wait))
    watchdog._watch()
    assert ended == [4.0]
