"""Tensor ranks are on one machine: layouts that are refused, and the ways out that the refusals print."""

import itertools
import platform
import re
from dataclasses import asdict

import pytest
import torch

from megagpt.checkpoints.checkpoint import CheckpointMeta
from megagpt.checkpoints.loading import _dropout_changes
from megagpt.cli import main
from megagpt.config import Config
from megagpt.config_file import load_config
from megagpt.errors import UserError
from megagpt.placement import check_placement, layout
from megagpt.training.sizing import size_run
from megagpt.world import World, join
from tests.conftest import Tiny
from tests.processes import run_ranks


def wide(size: int, *overrides: str) -> Config:
    """GPT-2 124M, whose 12 heads allow 1, 2 and 4 tensor ranks, with `size` of them."""
    return load_config("gpt2_124m.yaml", ["engine.name=fsdp", f"engine.tensor_ranks={size}", *overrides])


def machines(text: str) -> list[str]:
    """`a4 b2`: four neighbouring ranks on a, then two on b."""
    return [word[0] for word in text.split() for _ in range(int(word[1:]))]


@pytest.mark.parametrize("hosts", ["a8", "a4 b4", "a8 b4", "a2 b2 a2 b2", "a1 b1 a1 b1"])
def test_groups_of_one_machine_may_start(hosts: str) -> None:
    neighbours = min(len(list(run)) for _, run in itertools.groupby(machines(hosts)))
    for size in (size for size in (1, 2, 4) if neighbours % size == 0):
        check_placement(wide(size, "train.batch_tokens=393216", "train.micro_batch=1"), machines(hosts))


@pytest.mark.parametrize(
    ("size", "hosts", "where", "nearest", "start"),
    [
        (4, "a2 b2", "ranks 0 to 3 are on a and b", 2, "a multiple of 4 ranks on each machine"),
        (4, "a4 b2 c2", "ranks 4 to 7 are on b and c", 2, "a multiple of 4 ranks on each machine"),
        (2, "a3 b1", "ranks 2 to 3 are on a and b", 1, "a multiple of 2 ranks on each machine"),
        (4, "a1 b1 c1 d1", "ranks 0 to 3 are on a, b, c and d", 1, "a multiple of 4 ranks on each machine"),
        (2, "a1 b1 a1 b1", "ranks 0 to 1 are on a and b", 1, "srun with --distribution=block"),
        (4, "a2 b2 a2 b2", "ranks 0 to 3 are on a and b", 2, "srun with --distribution=block"),
        (2, "a1 b1 a1 c1", "ranks 0 to 1 are on a and b", 1, "each machine and number the ranks machine by machine"),
    ],
)
def test_a_group_on_two_machines_is_refused_with_ways_out(
    size: int, hosts: str, where: str, nearest: int, start: str
) -> None:
    config = wide(size, "train.batch_tokens=524288", "train.micro_batch=1")
    with pytest.raises(UserError) as caught:
        check_placement(config, machines(hosts))
    line = str(caught.value)
    assert line.startswith(f"engine.tensor_ranks {size}: {where}, ")
    assert start in line
    assert re.findall(r"set engine\.tensor_ranks=(\d+)", line) == [str(nearest)]
    check_placement(wide(nearest), machines(hosts))
    by_machine = sorted(machines(hosts)) if "block" in start else [host for host in "ab" for _ in range(size)]
    check_placement(config, by_machine)


def test_a_way_out_that_the_batch_rules_out_is_not_named() -> None:
    """Two groups of four ranks can share two sequences, but four groups of two cannot."""
    config = wide(4, "train.batch_tokens=2048", "train.micro_batch=1")
    with pytest.raises(UserError) as caught:
        check_placement(config, machines("a6 b2"))
    assert "tensor_ranks=" not in str(caught.value)


def test_a_way_out_names_the_micro_batch_that_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """On nodes of 4, groups of 4 take 6 sequences each, which the config's 12 do not divide."""
    command = ["launch", "slurm", "gpt3_175b", "--nodes", "256", "--gpus-per-node", "4"]
    assert main(command) == 2
    (way,) = re.findall(r"set (engine\.tensor_ranks=4 train\.micro_batch=6),", capsys.readouterr().err)
    assert main([*command, *way.split()]) == 0
    # Placement comes first: with the micro-batch that the batch needs, this would be refused again.
    assert main(["launch", "slurm", "gpt3_175b", "--nodes", "128", "--gpus-per-node", "12"]) == 2
    assert "ranks 8 to 15 are on node 1 and node 2" in capsys.readouterr().err


def test_a_batch_is_not_answered_with_groups_larger_than_a_node() -> None:
    for overrides in ([], ["engine.shard_ranks=8"]):
        with pytest.raises(UserError, match="do not divide") as caught:
            load_config("gpt3_175b.yaml", overrides).check_ranks(2048)
        assert "engine.tensor_ranks" not in str(caught.value)
    with pytest.raises(UserError, match=r"or engine\.tensor_ranks 4"):
        load_config("gpt3_175b.yaml", ["engine.tensor_ranks=1", "train.micro_batch=1"]).check_ranks(1536 * 4)


def test_an_import_was_saved_by_one_rank() -> None:
    """Whatever the tensor ranks of the config that it is for."""
    saved = CheckpointMeta(0, 0, 0, "import", 1, asdict(wide(4)), None, {})
    assert saved.layout == "1 rank"


def test_ranks_are_put_into_words() -> None:
    assert [layout(1, 1), layout(8, 1)] == ["1 rank", "8 ranks"]
    assert layout(8, 8) == "8 ranks in 1 group of 8 tensor ranks"
    assert layout(1024, 8) == "1024 ranks in 128 groups of 8 tensor ranks"


def test_dropout_says_that_the_layout_has_changed() -> None:
    """The same number of ranks in other groups drops other elements, too."""

    def changes(before: tuple[int, int], now: tuple[int, int]) -> list[str]:
        ranks, size = before
        saved = CheckpointMeta(1024, 1, 1, "fsdp", ranks, asdict(wide(size)), None, {})
        return _dropout_changes(saved, wide(now[1]), World(0, now[0], 0, torch.device("cpu")))

    assert changes((8, 4), (8, 4)) == changes((8, 1), (8, 1)) == []
    assert changes((8, 1), (4, 1)) == ["on 4 ranks instead of 8 ranks"]
    assert changes((8, 1), (8, 2)) == ["on 8 ranks in 4 groups of 2 tensor ranks instead of 8 ranks"]


def at_the_start(config: str, layouts: list[str]) -> list[str]:
    """The refusal of each layout of machines when this rank's run is sized; empty if it may start."""
    found = []
    with join("cpu") as world:
        for hosts in layouts:
            platform.node = lambda hosts=hosts: machines(hosts)[world.rank]  # type: ignore[misc]
            try:
                size_run(load_config(config, ["engine.name=fsdp", "engine.tensor_ranks=2"]), world)
                found.append("")
            except UserError as error:
                found.append(str(error))
    return found


def test_every_rank_of_a_starting_run_sees_the_same_refusal(tiny: Tiny) -> None:
    ranks = run_ranks(4, at_the_start, str(tiny(train={"micro_batch": 1})), ["a4", "a2 b2", "a1 b1 a1 b1", "a3 b1"])
    assert all(found == ranks[0] for found in ranks)
    alone, by_machine, in_turn, uneven = ranks[0]
    assert alone == by_machine == ""
    assert "ranks 0 to 1 are on a and b" in in_turn
    assert "ranks 2 to 3 are on a and b" in uneven
