"""The fault drills in their short form; `python -m tests.checkpoints.drills` is the long one.

A drill checks the run after every fault, and its curve in the end; the counts say that every fault took place.
"""

import random
from pathlib import Path

import pytest

from tests.checkpoints.drills import Drill, uninterrupted

pytestmark = [pytest.mark.drill, pytest.mark.xdist_group("drills")]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("whole"), corpus, steps=60)


def test_kills_at_random_moments(tmp_path: Path, corpus: Path, whole: Path) -> None:
    drill = Drill(tmp_path, corpus, whole, steps=60)
    drill.kill(4, random.Random(1))
    assert drill.done.total() == 4


def test_the_kill_of_one_tensor_rank_loses_nothing(tmp_path: Path, corpus: Path, whole: Path) -> None:
    drill = Drill(tmp_path, corpus, whole, steps=30, tolerance=5e-6)
    drill.kill(2, random.Random(1), ["fsdp, tensor ranks"], one_of_all=1.0)
    assert sum(count for kind, count in drill.done.items() if "one rank" in kind) == 2


def test_signals_to_one_rank_stop_all(tmp_path: Path, corpus: Path, whole: Path) -> None:
    drill = Drill(tmp_path, corpus, whole, steps=45)
    drill.signals()
    assert drill.done.total() == 3


@pytest.mark.parametrize("kind", ["full_disk", "read_only"])
def test_a_disk_that_fails_leaves_the_last_checkpoint(kind: str, tmp_path: Path, corpus: Path, whole: Path) -> None:
    drill = Drill(tmp_path, corpus, whole, steps=15 if kind == "full_disk" else 30)
    try:
        getattr(drill, kind)()
    except PermissionError as error:
        pytest.skip(str(error))
    assert drill.done.total() == 1


def test_a_corrupt_file_is_found_named_and_survived(tmp_path: Path, corpus: Path, whole: Path) -> None:
    drill = Drill(tmp_path, corpus, whole, steps=15, tolerance=5e-6)
    drill.damage()
    assert drill.done.total() == 17
