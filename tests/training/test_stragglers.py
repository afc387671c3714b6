"""Stragglers are found and named."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.cli import main
from megagpt.models.gpt import Block
from megagpt.run_log import Event
from megagpt.training.stragglers import compare
from tests.conftest import metrics, write_tiny
from tests.processes import run_ranks

HOSTS = ["a", "a", "b", "b"]
# Step, data wait, compute, communication wait.
USUAL = [1.0, 0.01, 0.50, 0.2]


def compared(changes: dict[int, list[float]], times: int, in_a_row: dict[int, int] | None = None) -> list[str]:
    ranks = [changes.get(rank, USUAL) for rank in range(4)]
    counts: dict[int, int] = {} if in_a_row is None else in_a_row
    return [compare(ranks, 1.2, HOSTS, counts) for _ in range(times)][-1].stragglers


def test_equal_ranks_are_not_slow() -> None:
    assert compared({}, 9) == []


def test_a_rank_is_named_the_third_time_in_a_row() -> None:
    slow = {2: [1.0, 0.01, 0.75, 0.0]}
    assert compared(slow, 2) == []
    (sentence,) = compared(slow, 3)
    assert sentence == "rank 2 on b is a straggler: it computes 1.50 times as long as the median of the ranks"


def test_a_rank_that_recovers_is_counted_from_zero() -> None:
    slow, counts = {2: [1.0, 0.01, 0.75, 0.0]}, dict[int, int]()
    assert compared(slow, 2, counts) == compared({}, 1, counts) == compared(slow, 2, counts) == []
    assert len(compared(slow, 1, counts)) == 1


def test_a_rank_below_the_threshold_is_not_slow() -> None:
    assert compared({2: [1.0, 0.01, 0.59, 0.0]}, 9) == []


def test_the_faster_of_two_ranks_is_the_reference() -> None:
    counts: dict[int, int] = {}
    slow = [compare([USUAL, [1.0, 0.01, 0.65, 0.0]], 1.2, ["a", "b"], counts).stragglers for _ in range(3)][-1]
    assert slow == ["rank 1 on b is a straggler: it computes 1.30 times as long as the median of the ranks"]


def test_a_rank_that_waits_for_its_disk_is_named() -> None:
    (sentence,) = compared({3: [1.0, 0.30, 0.50, 0.0]}, 3)
    assert sentence == "rank 3 on b is a straggler: it waits 300 ms a step for data, the median 10 ms"


def test_a_wait_that_is_short_beside_the_step_is_ignored() -> None:
    assert compared({3: [1.0, 0.05, 0.50, 0.0]}, 9) == []


def test_tensor_ranks_are_compared_by_groups() -> None:
    """All ranks of a group take as long as its slowest. A wait for data is each rank's own, and comes before."""
    slow, late = [1.0, 0.01, 0.75, 0.0], [1.0, 0.30, 0.50, 0.0]
    counts: dict[int, int] = {}
    for _ in range(3):
        found = compare([USUAL, late, slow, slow], 1.2, HOSTS, counts, group=2)
    assert (found.compute_median, found.compute_slowest, found.slowest_rank) == (0.5, 0.75, 2)
    assert found.stragglers == [
        "rank 1 on a is a straggler: it waits 300 ms a step for data, the median 10 ms",
        "one of tensor ranks 2 to 3 on b is a straggler: their group computes 1.50 times as long as the median of the"
        " groups",
    ]


def slow_last_rank(arguments: list[str]) -> int:
    usual = Block.forward

    def forward(self: Block, *inputs: Any) -> Any:
        time.sleep(0.02)
        return usual(self, *inputs)

    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        Block.forward = forward  # type: ignore[method-assign]
    return main(arguments)


@pytest.mark.timing
@pytest.mark.parametrize("engine", [["engine.name=fsdp"], ["engine.name=zero", "engine.stage=3"]], ids=["fsdp", "zero"])
def test_a_slow_rank_of_a_real_run_is_named(engine: list[str], tmp_path: Path, corpus: Path) -> None:
    """Both ranks end each step together: only what a rank does by itself tells them apart."""
    config = write_tiny(tmp_path, corpus, train={"micro_batch": 2})
    assert run_ranks(2, slow_last_rank, ["train", str(config), "log.straggler_every_steps=4", *engine]) == [0, 0]
    run = tmp_path / "runs" / "tiny"
    comparisons = metrics(run, Event.RANKS)
    assert [line["step"] for line in comparisons] == [4, 8, 12, 16, 20]
    assert {line["ranks_slowest_rank"] for line in comparisons} == {1}
    assert all(line["ranks_compute_slowest"] > 0.04 for line in comparisons), "two blocks that each sleep 20 ms"
    sentences = metrics(run, Event.STRAGGLER)
    assert [line["step"] for line in sentences] == [12, 16, 20]
    assert all(line["text"].startswith("rank 1 on ") for line in sentences)
    events = EventAccumulator(str(run))
    events.Reload()
    assert [e.value for e in events.Scalars("ranks/ranks_slowest_rank")] == [1.0] * 5
    assert "stragglers/text_summary" in events.Tags()["tensors"]


@pytest.mark.timing
def test_a_slow_tensor_rank_is_named_with_its_group(tmp_path: Path, corpus: Path) -> None:
    config = write_tiny(tmp_path, corpus, train={"micro_batch": 2})
    settings = ["engine.name=fsdp", "engine.tensor_ranks=2", "log.straggler_every_steps=4"]
    assert run_ranks(4, slow_last_rank, ["train", str(config), *settings]) == [0] * 4
    run = tmp_path / "runs" / "tiny"
    assert {line["ranks_slowest_rank"] for line in metrics(run, Event.RANKS)} == {2}
    sentences = metrics(run, Event.STRAGGLER)
    assert [line["step"] for line in sentences] == [12, 16, 20]
    assert all(line["text"].startswith("one of tensor ranks 2 to 3 on ") for line in sentences)
