"""How ranks meet: each wait is said and can be ended, and what makes a meeting impossible is one line."""

import itertools
import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megagpt import rendezvous, world
from megagpt.cli import main
from megagpt.errors import ExitCode, Interrupted, Reported, Stopped, TransientError, UserError
from megagpt.launchers import RankInfo
from megagpt.rendezvous import Missing, arrive, connect, count_in, never, raise_file_limit
from megagpt.world import join
from tests.conftest import Refusal, Tiny
from tests.processes import free_port, rank_environment, run_ranks, start_train
from tests.runs import PATIENCE, assert_one_error

HOST = "127.0.0.1"
BY = "by RANK and WORLD_SIZE in the environment"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that ranks say while they wait, which they do at once."""
    lines: list[str] = []
    monkeypatch.setattr(rendezvous, "warn", lines.append)
    monkeypatch.setattr(rendezvous, "_FIRST_NOTICE", 0.01)
    return lines


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which another program listens, which never answers."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


def until(said: list[str], name: str, count: int = 1, part: str = "") -> Callable[[], str | None]:
    """A signal that comes after that many lines with that part."""
    return lambda: name if sum(part in line for line in said) >= count else None


def ranks(size: int, work: Callable[[RankInfo], object], *numbers: int) -> list[object]:
    """Call `work` on some ranks of a world at the same time; what each returns or raises."""
    port, results = free_port(), {}

    def call(rank: int) -> None:
        try:
            results[rank] = work(RankInfo(rank, size, rank, HOST, port))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return [results[rank] for rank in numbers]


def meet(info: RankInfo, asked: Callable[[], str | None] = never, gpu: str = "") -> tuple[object, object]:
    stores = connect(info, asked)
    arrive(info, stores[0], asked, gpu)
    return stores  # which the others need until they have met


# --- waiting ---


def test_ranks_that_meet_in_time_say_nothing(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_FIRST_NOTICE", PATIENCE)
    assert all(isinstance(found, tuple) for found in ranks(3, meet, 2, 1, 0))
    assert said == []


def test_rank_0_says_for_whom_it_waits_and_where(said: list[str]) -> None:
    (error,) = ranks(8, lambda info: meet(info, until(said, "SIGINT", 2)), 0)
    line = re.escape("127.0.0.1:") + r"\d+" + re.escape(f", {BY}: ranks 1, 2, 3, 4, 5, 6, 7")
    assert re.fullmatch(f"rank 0 of 8 waits for 7 others at {line}", said[0])
    assert re.fullmatch(f"rank 0 of 8 has waited \\d\\d:\\d\\d for 7 others at {line}", said[1])
    assert isinstance(error, Interrupted)
    assert "stopped by SIGINT while this rank waited for 7 others" in str(error)


def test_the_missing_ranks_are_named_once_on_a_machine(said: list[str]) -> None:
    together = ranks(12, lambda info: meet(info, until(said, "SIGTERM", 2, "10 others")), 0, 2)
    for error in together:  # rank 0, with the store, may leave first
        assert re.fullmatch(
            rf"stopped by SIGTERM while this rank waited for 10 others at {HOST}:\d+, {BY}; nothing was begun"
            rf"|rank 0 at {HOST}:\d+ has ended before all 12 ranks had come",
            str(error),
        ), error
    lines = [line for line in said if "10 others at" in line]
    assert {line.split()[1] for line in lines} == {"0"}
    assert lines[-1].endswith(": ranks 1, 3, 4, 5, 6, 7, 8, 9, ...")


def test_other_ranks_say_that_rank_0_is_missing(said: list[str]) -> None:
    (error,) = ranks(8, lambda info: meet(info, until(said, "SIGUSR1")), 3)
    where = r"rank 0 at 127\.0\.0\.1:\d+ \(Connection refused\)"
    assert re.fullmatch(f"rank 3 of 8 waits for {where}, {BY}", said[0])
    assert isinstance(error, Stopped)
    assert (error.code, error.retry) == (ExitCode.STOPPED, True)


def test_a_foreign_listener_is_told_from_rank_0(said: list[str], taken: int) -> None:
    with pytest.raises(Interrupted):
        connect(RankInfo(1, 2, 1, HOST, taken), until(said, "SIGINT"))
    assert said == [f"rank 1 of 2 waits for rank 0 at {HOST}:{taken} (something else answers there), {BY}"]


def test_pauses_between_lines_grow(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(rendezvous, "_FIRST_NOTICE", 3.0)
    wait, times = rendezvous._Wait(RankInfo(0, 2, 0, HOST, 1), never, 1800), []
    for second in range(1800):
        clock[0], before = float(second), len(said)
        wait.look(lambda: Missing("1 other"))
        times += [second] * (len(said) - before)
    assert times[:5] == [4, 11, 24, 49, 98]
    assert max(b - a for a, b in itertools.pairwise(times)) <= 301


def test_a_wait_in_vain_ends_with_an_error_to_retry(said: list[str]) -> None:
    with pytest.raises(TransientError, match=rf"in vain for rank 0 at 127.0.0.1:\d+ \(Connection refused\), {BY}"):
        connect(RankInfo(1, 2, 1, HOST, free_port()), never, seconds=0)


def test_a_failure_ends_the_wait_of_peers() -> None:
    def work(info: RankInfo) -> object:
        stores = connect(info, never)
        if info.rank == 1:
            stores[0].add("megagpt/failures", 1)
            count_in(info, stores[0])
            return stores
        arrive(info, stores[0], never)
        return None

    assert isinstance(ranks(3, work, 0, 1)[0], Reported)


# --- what cannot meet ---


def test_a_taken_port_is_one_line(taken: int, refusal: Refusal, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_environment(0, 2, taken).items():
        monkeypatch.setenv(name, value)
    refusal(["train", str(tiny())], f"port {taken} is taken on this machine", "set MASTER_PORT to a free port")


UNKNOWN = [socket.EAI_AGAIN, socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL]


@pytest.mark.parametrize("number", UNKNOWN)
def test_an_unknown_host_is_one_line(
    number: int, refusal: Refusal, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(number, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(rendezvous, "_NAME_SECONDS", 0.0)
    for name, value in {**rank_environment(0, 2, free_port()), "MASTER_ADDR": "no.such"}.items():
        monkeypatch.setenv(name, value)
    refusal(["train", str(tiny())], "'no.such' (MASTER_ADDR) cannot be resolved", "not known", "set MASTER_ADDR")
    with pytest.raises(UserError if number == socket.EAI_FAIL else TransientError, match="cannot be resolved"):
        connect(RankInfo(1, 2, 1, "no.such", 1), never)


@pytest.mark.parametrize("number", UNKNOWN[:3])
def test_a_host_that_gets_its_name_late_is_waited_for(
    number: int, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0's pod does in a headless service of Kubernetes."""
    known, find = threading.Event(), socket.getaddrinfo

    def late(*names: Any) -> object:
        if not known.is_set():
            raise socket.gaierror(number, "Name or service not known")
        return find(*names)

    def tell(line: str) -> None:
        said.append(line)
        known.set()

    monkeypatch.setattr(socket, "getaddrinfo", late)
    monkeypatch.setattr(rendezvous, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(rendezvous, "warn", tell)
    assert len(connect(RankInfo(0, 2, 0, "localhost", free_port()), never)) == 2
    assert said[0] == f"rank 0 of 2 waits for an address of rank 0's host 'localhost' (MASTER_ADDR), {BY}"


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"RANK": "x"}, "RANK='x' is not a whole number"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "-1"}, "RANK=0 is not below WORLD_SIZE=-1"),
        ({"LOCAL_RANK": "1_0"}, "LOCAL_RANK='1_0' is not a whole number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below WORLD_SIZE=2"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is not a port"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port"),
        ({"MASTER_PORT": ""}, "not MASTER_PORT"),
    ],
    ids=str,
)
def test_nonsense_in_a_variable_is_one_line(
    variables: dict[str, str], part: str, refusal: Refusal, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**rank_environment(0, 2, free_port()), **variables}.items():
        monkeypatch.setenv(name, value)
    refusal(["train", str(tiny())], part)


def test_a_rank_that_two_processes_have_is_refused() -> None:
    def work(info: RankInfo) -> object:
        stores = connect(info, never)
        if info.rank == 1:
            count_in(info, stores[0])
        arrive(info, stores[0], never)
        return stores  # which the other still reads

    _, error = ranks(3, work, 0, 1)
    assert isinstance(error, UserError)
    assert str(error).startswith("RANK=1 is set for two processes of this job")


@pytest.mark.parametrize("call", ["set", "add", "get"])
def test_a_store_that_ends_under_a_rank_is_one_line(call: str) -> None:
    """Its rank 0 was killed; each call of the store may be the first to notice."""

    class Store:
        def __getattr__(self, name: str) -> Callable[..., object]:
            if name == call:
                raise torch.distributed.DistNetworkError("Failed to recv, got 0 bytes.")
            return {"set": lambda *_: None, "add": lambda *_: 1, "get": lambda *_: "2"}[name]

    with pytest.raises(TransientError, match=rf"^rank 0 at {HOST}:\d+ has ended before all 2 ranks had come$"):
        arrive(RankInfo(1, 2, 1, HOST, free_port()), Store(), never)  # type: ignore[arg-type]


def test_ranks_of_worlds_of_different_sizes_are_refused() -> None:
    def work(info: RankInfo) -> object:
        size = 3 if info.rank else 2
        return meet(RankInfo(info.rank, size, info.rank, HOST, info.port))

    _, error = ranks(2, work, 0, 1)
    assert isinstance(error, UserError)
    assert str(error) == "WORLD_SIZE=3 on rank 1, and 2 on rank 0: set it alike on all"


def test_ranks_that_share_a_gpu_are_refused() -> None:
    gpus = ["GPU-a", "GPU-b", "GPU-a"]
    found = ranks(3, lambda info: meet(info, gpu=gpus[info.rank]), 0, 1, 2)
    errors = [error for error in found if isinstance(error, Exception)]
    assert len(errors) == 1
    assert re.match(r"ranks (0 and 2|2 and 0) share one GPU of ", str(errors[0]))
    assert isinstance(found[1], tuple)


# --- a process ---


@pytest.mark.slow
def test_ctrl_c_ends_a_process_that_waits_for_peers(tiny: Tiny, tmp_path: Path) -> None:
    log, config = tmp_path / "rank.log", str(tiny())
    rank = start_train([config], tmp_path, log, rank_environment(0, 2, free_port()))
    deadline = time.monotonic() + PATIENCE
    while "rank 0 of 2 waits for 1 other at" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    rank.send_signal(signal.SIGINT)
    assert rank.wait(PATIENCE) == ExitCode.INTERRUPTED
    assert_one_error(log.read_text(), "stopped by SIGINT", "1 other", BY, "nothing was begun")


def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def refused(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refused)
    raise_file_limit()


@pytest.mark.slow
def test_commands_that_need_no_peers_wait_for_none(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever RANK and WORLD_SIZE an earlier job has left in the shell; and the first lines of a run."""
    config, run = str(tiny(sampling={"samples": 0}, validation={"tokens": 0})), str(tmp_path / "runs" / "tiny")
    assert main(["train", config]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = ["starting: loading PyTorch", "reading data", "building the model", "first step"]
    assert [line for line in lines if line in first] == first
    for name, value in rank_environment(0, 8, free_port()).items():
        monkeypatch.setenv(name, value)

    def no_peers(*_: object, **__: object) -> None:
        raise AssertionError("it looked for peers")

    monkeypatch.setattr(world, "connect", no_peers)
    for words in (
        ["sample", run, "--max-tokens", "2"], ["export", run, "--to", str(tmp_path / "out")], ["status", run],
        ["config", config], ["checkpoint", "verify", run], ["checkpoint", "list", run], ["models"],
    ):  # fmt: skip
        assert main(words) == 0
    with pytest.raises(AssertionError, match="looked for peers"):
        main(["train", "--resume", run])


def peers_after_join() -> list[int]:
    """Ports at the other ends of this rank's connections, but for the store's."""
    with join("cpu") as world:
        connections = psutil.Process().net_connections()
        ports = [c.raddr.port for c in connections if c.status == psutil.CONN_ESTABLISHED]
        # A rank that leaves meets the others in a collective, and connects to them for it.
        assert world.store is not None
        world.store.add("looked", 1)
        while world.store.add("looked", 0) < world.size:
            time.sleep(0.01)
        return [port for port in ports if port != int(os.environ["MASTER_PORT"])]


@pytest.mark.slow
def test_a_rank_connects_to_no_peer_before_it_needs_it() -> None:
    """A connection to each would need more sockets in a large job than a process may open."""
    assert run_ranks(3, peers_after_join)[1] == []
