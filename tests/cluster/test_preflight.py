"""Which nodes are fit, judged by their reports; and nodes that report nothing, or print nonsense."""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.cluster import preflight as module
from megagpt.cluster.preflight import find_problems, preflight
from megagpt.errors import ExpectedError
from tests.runs import PATIENCE

PORT = 20123
GPUS = 8
Break = Callable[[dict[str, Any], dict[str, Any]], None]
BREAKS: dict[str, Break] = {
    "no name": lambda facts, collective: facts.update(head="gaierror: [Errno -2] Name or service not known"),
    "no port": lambda facts, collective: facts.update(port="OSError: [Errno 98] Address already in use"),
    "no folder": lambda facts, collective: facts.update(folder="PermissionError: [Errno 13] Permission denied"),
    "clock ahead": lambda facts, collective: facts.update(time=facts["time"] + 90),
    "clock behind": lambda facts, collective: facts.update(time=facts["time"] - 90),
    "too few GPUs": lambda facts, collective: facts["gpus"].update(count=7, used=[0] * 7),
    "broken GPU": lambda facts, collective: facts["gpus"].update(error="AcceleratorError: CUDA error: ECC"),
    "busy GPU": lambda facts, collective: facts["gpus"]["used"].__setitem__(5, 40_000),
    "collective failed": lambda facts, collective: (collective.clear(), collective.update(error="RuntimeError: x")),  # type: ignore[func-returns-value]
}
SAYS = {
    "no name": ["does not know the head node's name n0", "Name or service not known"],
    "no port": ["port 20123 is taken", "Address already in use", "MASTER_PORT"],
    "no folder": ["run's folder", "Permission denied", "shared"],
    "clock ahead": ["90 s ahead"],
    "clock behind": ["90 s behind"],
    "too few GPUs": ["7 GPU(s)", "has 8"],
    "broken GPU": ["a GPU does not answer", "CUDA error: ECC"],
    "busy GPU": ["GPU 5 (40000 MiB"],
    "collective failed": ["all-reduce failed", "RuntimeError: x"],
}


def names(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


def fit(nodes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts and collectives of fit nodes, with drivers on their GPUs."""
    facts = {
        node: {
            "head": "", "port": "", "folder": "", "versions": {"python": "3.11.9", "torch": "2.13.0"},
            "gpus": {"count": GPUS, "names": ["NVIDIA H100 80GB HBM3"], "used": [500] * GPUS},
            "time": 1000.0, "arrived": 1000.0,
        }
        for node in nodes
    }  # fmt: skip
    return facts, {node: {"seconds": 0.1, "bytes": 2**28} for node in nodes}


def problems_of(nodes: list[str], facts: dict[str, Any], collectives: dict[str, Any]) -> dict[str, str]:
    return find_problems(nodes, GPUS, PORT, facts, collectives)


@pytest.mark.parametrize("count", range(1, 7))
def test_fit_nodes_have_no_problem(count: int) -> None:
    assert problems_of(names(count), *fit(names(count))) == {}


def test_one_node_needs_no_collective() -> None:
    facts, _ = fit(["n0"])
    assert problems_of(["n0"], facts, {}) == {}


def test_nodes_without_gpus_are_fit_for_a_run_on_cpus() -> None:
    facts, collectives = fit(names(2))
    for found in facts.values():
        found["gpus"] = None
    assert find_problems(names(2), 0, PORT, facts, collectives) == {}


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize("count", range(2, 7))
def test_only_the_broken_node_is_named(kind: str, count: int) -> None:
    nodes = names(count)
    for node in nodes:
        facts, collectives = fit(nodes)
        BREAKS[kind](facts[node], collectives[node])
        problems = problems_of(nodes, facts, collectives)
        assert list(problems) == [node]
        for part in SAYS[kind]:
            assert part in problems[node]


@pytest.mark.parametrize("count", range(2, 7))
def test_only_the_node_that_does_not_answer_is_named(count: int) -> None:
    """Without it no collective ends."""
    nodes = names(count)
    for node in nodes:
        facts, _ = fit(nodes)
        del facts[node]
        assert problems_of(nodes, facts, {}) == {node: "no answer"}


@pytest.mark.parametrize("count", range(3, 7))
def test_only_the_node_with_another_version_is_named(count: int) -> None:
    nodes = names(count)
    for node in nodes:
        facts, collectives = fit(nodes)
        facts[node]["versions"] = {"python": "3.11.9", "torch": "2.12.1"}
        assert problems_of(nodes, facts, collectives) == {node: "torch 2.12.1 and other nodes have 2.13.0"}


@pytest.mark.parametrize("late", [-6.0, -4.0, 0.0, 4.0, 6.0])
def test_a_clock_may_be_five_seconds_off(late: float) -> None:
    facts, collectives = fit(names(2))
    facts["n1"]["time"] += late
    assert list(problems_of(names(2), facts, collectives)) == (["n1"] if abs(late) > 5 else [])


def test_without_a_majority_the_head_nodes_version_counts() -> None:
    """Repeated, because a choice by hashes is right half of the time."""
    for number in range(20):
        facts, collectives = fit(names(2))
        facts["n1"]["versions"] = {"python": "3.11.9", "torch": f"2.12.{number}"}
        assert list(problems_of(names(2), facts, collectives)) == ["n1"]


def test_only_the_node_whose_collective_never_ended_is_named() -> None:
    facts, collectives = fit(names(3))
    del collectives["n1"]
    assert problems_of(names(3), facts, collectives) == {"n1": "the all-reduce failed: did not end"}


def test_each_broken_node_is_named_with_its_own_reason() -> None:
    facts, collectives = fit(names(4))
    facts["n1"]["folder"] = "FileNotFoundError: x"
    facts["n3"]["gpus"]["count"] = 4
    del facts["n2"]
    problems = problems_of(names(4), facts, collectives)
    assert list(problems) == ["n1", "n2", "n3"]
    assert "FileNotFoundError" in problems["n1"]
    assert problems["n2"] == "no answer"
    assert "4 GPU(s)" in problems["n3"]


class Srun:
    """A fake srun that prints lines of nodes, each with its task's number, as with --label."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.folder, self.script = folder, folder / "bin" / "srun"
        self.logs = folder / "logs"
        self.script.parent.mkdir()
        self.lines = ["#!/bin/sh", f'echo "$@" > {folder / "arguments"}']
        monkeypatch.setenv("PATH", str(self.script.parent), prepend=":")
        self.said: list[str] = []

    def says(self, text: str, stream: int = 1) -> None:
        self.lines.append(f"printf '%s\\n' {shlex.quote(text)} >&{stream}")

    def node_says(self, node: str, text: str, stream: int = 1) -> None:
        self.says(f"{node.removeprefix('n')}: {text}", stream)

    def facts(self, node: str, mark: bool = True, **changes: Any) -> None:
        found, _ = fit([node])
        del found[node]["arrived"]
        self.node_says(node, json.dumps({"node": node, "facts": {**found[node], "time": time.time(), **changes}}))
        if mark:
            self.lines.append(f"touch {self.logs / f'preflight.{node}'}")

    def collective(self, node: str, **values: Any) -> None:
        speed = {"seconds": 0.5, "bytes": 2_000_000_000}
        self.node_says(node, json.dumps({"node": node, "collective": values or speed}))

    def ask(self, nodes: list[str], seconds: float = 30) -> None:
        self.script.write_text("\n".join(self.lines) + "\n")
        self.script.chmod(0o755)
        preflight(nodes, GPUS, self.logs, PORT, seconds)
        self.said = self.capsys.readouterr().out.splitlines()

    def refusal(self, nodes: list[str], seconds: float = 30) -> list[str]:
        """The lines that name nodes."""
        with pytest.raises(ExpectedError) as caught:
            self.ask(nodes, seconds)
        self.message = str(caught.value)
        return [line.strip() for line in self.message.splitlines() if line.startswith("  ")]


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Srun:
    return Srun(tmp_path, monkeypatch, capsys)


def test_fit_nodes_are_printed_with_the_slowest_speed(srun: Srun) -> None:
    for node in names(2):
        srun.facts(node)
    srun.collective("n0")
    srun.collective("n1", seconds=1.0, bytes=2_000_000_000)
    srun.ask(names(2))
    over = "one GPU of each (the others are not tried)"
    assert srun.said == [f"2 node(s) are fit: n0, n1; an all-reduce over {over} moves 2.00 GB/s"]
    assert list(srun.logs.iterdir()) == [], "the marks are gone"


def test_each_node_is_asked_once(srun: Srun) -> None:
    for node in names(2):
        srun.facts(node)
        srun.collective(node)
    srun.ask(names(2))
    arguments = (srun.folder / "arguments").read_text()
    for part in ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", f"launch node {srun.logs} --port {PORT} --gpu"):
        assert part in arguments


def test_one_node_alone_is_fit_without_a_collective(srun: Srun) -> None:
    srun.facts("n0")
    srun.ask(["n0"])
    assert srun.said == ["1 node(s) are fit: n0"]


def test_nodes_that_never_answer_are_named_after_the_timeout(srun: Srun) -> None:
    srun.facts("n0")
    srun.lines.append(f"exec sleep {PATIENCE:.0f}")
    began = time.monotonic()
    assert srun.refusal(names(3), seconds=2) == ["n1: no answer", "n2: no answer"]
    assert time.monotonic() - began < PATIENCE / 2
    assert srun.message.startswith("2 of 3 node(s) are not fit for this run:")
    assert "--exclude" in srun.message


def test_silent_nodes_are_named_at_once_when_srun_ends(srun: Srun) -> None:
    srun.says("slurm_load: note\nsrun: error: Task launch for StepId=7.0 failed on node n1: out of order", stream=2)
    srun.facts("n0")
    began = time.monotonic()
    assert srun.refusal(names(2), seconds=PATIENCE) == ["n1: no answer"]
    assert time.monotonic() - began < PATIENCE / 2
    assert "srun said: srun: error: Task launch for StepId=7.0 failed on node n1: out of order" in srun.message


def test_the_last_line_of_a_silent_node_is_printed(srun: Srun) -> None:
    srun.facts("n0")
    srun.node_says("n1", "Traceback (most recent call last):", stream=2)
    srun.node_says("n1", "ModuleNotFoundError: No module named 'torch'", stream=2)
    (line,) = srun.refusal(names(2))
    assert line == "n1: no answer; the last line of its stderr: ModuleNotFoundError: No module named 'torch'"


def test_more_than_ten_nodes_have_labels_of_one_width(srun: Srun) -> None:
    for i, node in enumerate(names(12)):
        srun.facts(node)
        srun.collective(node)
        srun.lines = [line.replace(f"'{i}: ", f"'{i:2d}: ") for line in srun.lines]
    srun.ask(names(12))
    assert srun.said[0].startswith("12 node(s) are fit: n0, n1, n2, n3, n4, n5, n6, n7, ...;")


def test_a_collective_that_fails_on_one_node_names_it(srun: Srun) -> None:
    for node in names(3):
        srun.facts(node)
    srun.collective("n0")
    srun.collective("n1", error="DistBackendError: NCCL error: unhandled system error")
    srun.collective("n2")
    assert srun.refusal(names(3)) == ["n1: the all-reduce failed: DistBackendError: NCCL error: unhandled system error"]


def test_an_endless_collective_is_named_after_its_timeout(srun: Srun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COLLECTIVE_SECONDS", 0.5)
    for node in names(2):
        srun.facts(node)
    srun.collective("n0")
    srun.lines.append("exec sleep 60")
    assert srun.refusal(names(2)) == ["n1: the all-reduce failed: did not end"]


GARBAGE = [
    "", "n1:99:99 [0] NCCL INFO Bootstrap : Using eth0", '{"node": "n1", "fac', "0", "null", '"text"', "[]",
    "{}", '{"node": "n1"}', '{"facts": {}}',
]  # fmt: skip


@pytest.mark.parametrize("line", GARBAGE, ids=repr)
def test_lines_of_other_programs_are_ignored(line: str, srun: Srun) -> None:
    """A prolog, a library or a shell's start-up file may print."""
    for node in names(2):
        srun.node_says(node, line)
        srun.facts(node)
        srun.collective(node)
    srun.ask(names(2))
    assert len(srun.said) == 1


def test_bytes_that_are_not_text_are_ignored(srun: Srun) -> None:
    for node in names(2):
        srun.lines.append(r"printf '0: \377\376\n'")
        srun.facts(node)
        srun.collective(node)
    srun.ask(names(2), seconds=2)
    assert len(srun.said) == 1


def test_a_flood_of_warnings_does_not_block_the_answers(srun: Srun) -> None:
    srun.lines.append("yes 'srun: a warning that is repeated' | head -n 20000 >&2")
    for node in names(2):
        srun.facts(node)
        srun.collective(node)
    srun.ask(names(2))
    assert len(srun.said) == 1


def test_a_node_with_another_disk_is_named(srun: Srun) -> None:
    """Its run folder is on a disk of its own, on which it can write and read."""
    for node in names(2):
        srun.facts(node, mark=node == "n0")
        srun.collective(node)
    (line,) = srun.refusal(names(2))
    assert line.startswith("n1: ")
    assert "run.folder must be shared by all nodes" in line


def test_clocks_are_compared_when_the_answer_arrives(srun: Srun) -> None:
    srun.facts("n0")
    srun.facts("n1", time=time.time() - 3600)
    (line,) = srun.refusal(names(2))
    assert line.startswith("n1: its clock is 36")
    assert line.endswith(" s behind the head node's")


def test_a_refusal_leaves_no_files(srun: Srun) -> None:
    srun.facts("n0")
    srun.facts("n1", port="OSError: taken")
    srun.refusal(names(2))
    assert list(srun.logs.iterdir()) == []
