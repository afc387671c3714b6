"""The ranks for which others wait are told from what each rank's flight recorder holds."""

import pickle
from typing import Any

import pytest

from megagpt.training.collectives import Collectives, read_collectives, say_who_is_missing

Ranks = dict[int, dict[str, Collectives]]


def at(joined: int, waits: int, ranks: list[int], name: str = "all_gather") -> Collectives:
    return Collectives(joined, waits, name if waits else "", ranks)


def grid() -> Ranks:
    """Four ranks in two groups of tensor ranks, all of whose collectives have ended."""
    return {
        rank: {"world": at(9, 0, [0, 1, 2, 3]), f"t{rank // 2}": at(40, 0, [rank // 2 * 2, rank // 2 * 2 + 1])}
        for rank in range(4)
    }


def test_the_rank_for_which_all_wait_is_the_cause() -> None:
    """Rank 3 stays away from its group; rank 2 waits for it there, and the others for these two in the world's sum."""
    ranks = grid()
    ranks[2]["t1"] = at(41, 41, [2, 3], "all_to_all")
    for rank in (0, 1):
        ranks[rank]["world"] = at(10, 10, [0, 1, 2, 3], "all_reduce")
    assert say_who_is_missing(ranks) == ["rank 3 has not joined all_to_all 41 of ranks 2, 3"]


def test_hosts_that_run_ahead_of_their_gpus_wait_for_the_first() -> None:
    ranks = grid()
    ranks[0]["world"] = at(17, 11, [0, 1, 2, 3])
    for rank in (1, 3):
        ranks[rank]["world"] = at(12, 11, [0, 1, 2, 3])
    ranks[2]["world"] = at(10, 0, [0, 1, 2, 3])
    assert say_who_is_missing(ranks) == ["rank 2 has not joined all_gather 11 of ranks 0, 1, 2, 3"]


def test_ranks_that_wait_for_each_other_are_both_named() -> None:
    ranks: Ranks = {
        0: {"a": at(5, 5, [0, 1]), "b": at(4, 0, [0, 1])},
        1: {"a": at(4, 0, [0, 1]), "b": at(5, 5, [0, 1])},
    }
    assert say_who_is_missing(ranks) == [
        "rank 0 has not joined all_gather 5 of ranks 0, 1",
        "rank 1 has not joined all_gather 5 of ranks 0, 1",
    ]


@pytest.mark.parametrize("case", ["all joined", "no answer", "first collective", "no records"])
def test_only_ranks_that_answered_are_named(case: str) -> None:
    ranks = grid()
    if case == "all joined":  # it hangs in the network, or on a GPU
        for groups in ranks.values():
            groups["world"] = at(10, 10, [0, 1, 2, 3])
    if case == "no answer":
        ranks[0]["world"] = at(10, 10, [0, 1])
        del ranks[1]
    if case == "first collective":
        ranks[0]["new"] = at(1, 1, [0, 3])
    if case == "no records":
        ranks = {0: {}, 1: {}}
    expected = ["rank 3 has not joined all_gather 1 of ranks 0, 3"] if case == "first collective" else []
    assert say_who_is_missing(ranks) == expected


def test_large_groups_and_many_ranks_are_cut_short() -> None:
    ranks: Ranks = {0: {"world": at(7, 7, list(range(100)))}, **{rank: {} for rank in range(1, 100)}}
    said = say_who_is_missing(ranks)
    assert len(said) == 8
    assert said[0] == "rank 1 has not joined all_gather 7 of ranks 0, 1, 2, 3, 4, 5, 6, 7, ..."


def entry(group: str, number: int, retired: bool = True, **more: Any) -> dict[str, Any]:
    names = {"process_group": (group, "saves" if group == "9" else "mesh_tensor"), "profiling_name": "gloo:all_gather"}
    return {**names, "collective_seq_id": number, "retired": retired, "is_p2p": False, **more}


def test_a_record_is_read_by_process_group() -> None:
    """As PyTorch 2.11 and 2.13 write it under gloo. Saves in the background and single sends are left out."""
    entries = [entry("0", 1), entry("4", 1), entry("4", 2, False), entry("4", 3, False), entry("9", 1, False)]
    entries.append(entry("0", 8, False, is_p2p=True))
    found = read_collectives(pickle.dumps({"entries": entries}))
    assert found == {"0": Collectives(1, 0, "", []), "4": Collectives(3, 2, "all_gather", [])}
    assert read_collectives(b"") == {}
