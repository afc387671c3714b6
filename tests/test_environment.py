"""A process's place among its peers, by the environment that its launcher has set."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import UserError
from megagpt.launchers import RankInfo, find_rank, first_host, slurm_gpus, torchrun_attempt

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}


def task(rank: int, job: int = 4711, step: int = 0) -> dict[str, str]:
    """The variables of one of eight tasks, four on each of two nodes, as Slurm sets them."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": str(step),
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "n[07-08]",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 4),
    }


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def refusal(variables: dict[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        find_rank(variables)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_launcher_sets_the_rank() -> None:
    assert find_rank(TORCHRUN) == RankInfo(5, 8, 1, "10.0.0.7", 29500)


def test_attempts_count_if_they_share_torchruns_store() -> None:
    attempt = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert torchrun_attempt({**attempt, "TORCHELASTIC_USE_AGENT_STORE": "True"}) == "2"
    assert torchrun_attempt({**attempt, "TORCHELASTIC_USE_AGENT_STORE": "False"}) is None
    assert torchrun_attempt({}) is None


def test_a_nodes_gpus_are_a_number_or_one_line() -> None:
    assert [slurm_gpus({"SLURM_GPUS_ON_NODE": text}) for text in ("8", "")] == [8, 0]
    assert slurm_gpus({}) == 0
    for text in ("gpu:8", "-1", "1.5"):
        with pytest.raises(UserError, match=f"SLURM_GPUS_ON_NODE is '{text}', not a number"):
            slurm_gpus({"SLURM_GPUS_ON_NODE": text})


def test_without_a_launcher_a_process_is_alone() -> None:
    alone = find_rank({})
    assert (alone.rank, alone.size, alone.local_rank) == (0, 1, 0)
    assert find_rank({"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1", "LOCAL_RANK": "3"}) == alone


def test_a_batch_script_and_a_step_of_one_task_are_alone() -> None:
    """In a batch script SLURM_NTASKS and SLURM_PROCID are those of the job, and no peer comes."""
    alone = find_rank({})
    assert find_rank(without(task(0), "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")) == alone
    assert find_rank({**task(0), "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}) == alone


def test_all_tasks_of_a_step_find_one_meeting_point() -> None:
    places = [find_rank(task(rank)) for rank in range(8)]
    assert [(p.rank, p.size, p.local_rank) for p in places] == [(rank, 8, rank % 4) for rank in range(8)]
    assert {p.address for p in places} == {"n07"}
    assert len({p.port for p in places}) == 1


@given(st.integers(1, 2**26), st.integers(0, 10_000))
def test_steps_meet_at_an_unprivileged_port_of_their_own(job: int, step: int) -> None:
    here, next_step, next_job = (find_rank(task(0, job + i, step + j)).port for i, j in ((0, 0), (0, 1), (1, 0)))
    assert 1024 < here < 65536
    assert here not in (next_step, next_job)


def test_the_meeting_point_of_a_step_can_be_given() -> None:
    given_address = find_rank({**task(3), "MASTER_ADDR": "10.0.0.9"})
    assert (given_address.address, given_address.port) == ("10.0.0.9", find_rank(task(3)).port)
    given_port = find_rank({**task(3), "MASTER_PORT": "1234"})
    assert (given_port.address, given_port.port) == ("n07", 1234)


def test_torchrun_under_srun_is_torchruns_world() -> None:
    assert find_rank({**task(1), **TORCHRUN}) == find_rank(TORCHRUN)
    assert "LOCAL_RANK" in refusal({**task(1), **without(TORCHRUN, "LOCAL_RANK")})


@pytest.mark.parametrize("name", TORCHRUN)
@pytest.mark.parametrize("empty", [False, True], ids=["absent", "empty"])
def test_a_missing_variable_of_a_launcher_is_named(name: str, empty: bool) -> None:
    text = refusal({**TORCHRUN, name: ""} if empty else without(TORCHRUN, name))
    assert f"looked for {', '.join(TORCHRUN)}" in text
    assert f"found {', '.join(n for n in TORCHRUN if n != name)}, not {name}: " in text
    assert "torchrun" in text


SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


@pytest.mark.parametrize("name", SLURM)
def test_a_missing_variable_of_a_step_is_named(name: str) -> None:
    text = refusal(without(task(0), name))
    assert f"looked for {', '.join(SLURM)}" in text
    assert f"not {name}: " in text
    assert "srun" in text


def test_all_missing_variables_are_named_at_once() -> None:
    assert "found WORLD_SIZE, not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: " in refusal({"WORLD_SIZE": "2"})
    assert f"found none, not {', '.join(SLURM)}: " in refusal({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"})


@pytest.mark.parametrize("value", ["two", "1.5", "0x1", "-"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_word_in_place_of_a_number_is_refused(name: str, value: str) -> None:
    assert f"{name}={value!r} is not a whole number" in refusal({**TORCHRUN, name: value})


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "MASTER_PORT"])
def test_a_word_in_place_of_a_steps_number_is_refused(name: str) -> None:
    assert f"{name}='one' is not a whole number" in refusal({**task(0), name: "one"})


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("9", "8"), ("-1", "8"), ("0", "0"), ("0", "-2")])
def test_a_rank_outside_its_world_is_refused(rank: str, size: str) -> None:
    assert f"RANK={rank} is not below WORLD_SIZE={size}" in refusal({**TORCHRUN, "RANK": rank, "WORLD_SIZE": size})
    text = refusal({**task(0), "SLURM_PROCID": rank, "SLURM_NTASKS": size})
    assert f"SLURM_PROCID={rank} is not below SLURM_NTASKS={size}" in text


# --- Slurm's node lists ---


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("login,n1", "login"),
        ("n1.example.org,n2.example.org", "n1.example.org"),
        ("gpu-a-12", "gpu-a-12"),
        ("n[3]", "n3"),
        ("n[3-5]", "n3"),
        ("n[007-012,020]", "n007"),
        ("n[9,1-3]", "n9"),
        ("n[007-012,020]-ib,login", "n007-ib"),
        ("login,n[007-012,020]-ib", "login"),
        ("a[1-2],b[3-4]", "a1"),
        ("rack[2-3]node[08-10]", "rack2node08"),
        ("rack[2-3]node[08,10]-ib,x", "rack2node08-ib"),
    ],
)
def test_the_first_host_of_a_node_list_is_found(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


# A range is a first number, how many follow it, and the width to which they are padded.
RANGES = st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=3)
WORDS = st.from_regex(r"[a-z][a-z0-9.-]{0,5}", fullmatch=True)


def written(part: str | list[tuple[int, int, int]]) -> str:
    if isinstance(part, str):
        return part
    texts = [f"{a:0{width}}-{a + more:0{width}}" if more else f"{a:0{width}}" for a, more, width in part]
    return f"[{','.join(texts)}]"


def meant(part: str | list[tuple[int, int, int]]) -> list[str]:
    return (
        [part] if isinstance(part, str) else [f"{a + i:0{width}}" for a, more, width in part for i in range(more + 1)]
    )


@given(st.lists(st.tuples(WORDS, st.lists(st.one_of(RANGES, WORDS), max_size=3)), min_size=1, max_size=3))
def test_the_first_host_begins_the_expanded_list(groups: list[tuple[str, list[str | list]]]) -> None:
    nodes = ",".join("".join(written(part) for part in [word, *parts]) for word, parts in groups)
    hosts = [
        "".join(choice) for word, parts in groups for choice in itertools.product(*(meant(p) for p in [word, *parts]))
    ]
    assert first_host(nodes) == hosts[0]
