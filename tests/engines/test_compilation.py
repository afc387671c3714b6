"""torch.compile: when it is used, and that each kind of block is one graph, traced once."""

import dataclasses
import platform
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from megagpt.config import TrainConfig, compiles
from megagpt.config_file import build_config
from megagpt.data.loader import Batch
from megagpt.engines import compilation
from megagpt.engines.compilation import is_compiled
from megagpt.engines.engine import build_engine
from megagpt.errors import UserError, first_line
from megagpt.world import World, join
from tests.processes import run_ranks

MODEL = {"layers": 2, "width": 32, "heads": 2, "context": 16, "vocab_size": 100}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"}, "fsdp": {"name": "fsdp"},
    "zero-1": {"name": "zero", "stage": 1}, "zero-2": {"name": "zero", "stage": 2},
    "zero-3": {"name": "zero", "stage": 3},
}  # fmt: skip
MODES: tuple[Any, ...] = ("none", "full", "selective", {"every": 2})
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [("auto", "cpu", False), ("auto", "cuda", True), (True, "cpu", True), (True, "cuda", True), (False, "cuda", False)],
)
def test_auto_compiles_on_a_gpu(wanted: Any, device: str, expected: bool) -> None:
    assert compiles(wanted, device) == expected
    assert compiles(TrainConfig().compile, device) == (device == "cuda")


@pytest.mark.parametrize(
    "error",
    [KeyError("getpwuid(): uid not found: 4321"), RuntimeError("Failed to find C compiler."), OSError("noexec")],
)
def test_a_gpu_on_which_compiled_code_fails_runs_without(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for a machine with a GPU: there is none on which the trial could fail by itself."""

    def compile_(*_: Any, **__: Any) -> Any:
        raise error

    def decide(**train: Any) -> bool:
        return is_compiled(build_config({"model": MODEL, "train": train}, "t"), World(0, 1, 0, CUDA))

    monkeypatch.setattr(torch, "compile", compile_)
    assert not decide()
    reason = f"a compiled function does not run here ({platform.node()}: {first_line(error)})"
    assert f"train.compile auto: off, and steps take longer: {reason}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^train\.compile true: a compiled .*set train\.compile=false$"):
        decide(compile=True)
    assert not decide(compile=False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: x.new_ones(()))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(2, 64))
    assert decide()
    assert decide(compile=True)


def deciding() -> tuple[bool, str]:
    """The decision on one of two ranks, of which the second one's compiler is broken."""
    lines: list[str] = []
    compilation._problem = lambda device: "no gcc" if world.rank else ""  # type: ignore[assignment]
    compilation.say = lines.append  # type: ignore[assignment]
    with join("cpu") as world:
        on_gpu = dataclasses.replace(world, device=CUDA)
        return is_compiled(build_config({"model": MODEL}, "t"), on_gpu), "".join(lines)


@pytest.mark.slow
def test_one_rank_without_a_compiler_decides_for_all() -> None:
    for decided, said in run_ranks(2, deciding):
        assert not decided
        assert f"({platform.node()}: no gcc)" in said


def graphs(engine: dict[str, Any], world: World, mode: Any, banded: bool = False) -> list[dict[str, int]]:
    """Dynamo's counts after three steps, after a validation batch, and after more of both."""
    torch._dynamo.reset()
    counters.clear()
    attention = {"attention": "banded", "window": 8} if banded else {}
    batch_tokens = 2 * world.size * MODEL["context"]
    train = {"precision": "bf16", "device": "cpu", "compile": True, "activation_checkpointing": mode, "micro_batch": 1}
    train |= {"tokens": batch_tokens, "batch_tokens": batch_tokens}
    built = build_engine(build_config({"model": MODEL | attention, "engine": engine, "train": train}, "t"), world)
    rows = torch.randint(100, (2, MODEL["context"] + 1), generator=torch.Generator().manual_seed(world.rank))
    pairs = [(row[None, :-1], row[None, 1:].contiguous()) for row in rows]
    batch = Batch(pairs, 2 * world.size, batch_tokens)
    found = []

    def count() -> None:
        breaks = sum(counters["graph_break"].values())
        found.append({"graphs": counters["stats"]["unique_graphs"], "breaks": breaks})

    def validate() -> None:
        with built.evaluation() as model:
            model(*pairs[0])

    for _ in range(3):
        built.train_step(batch, 1e-3)
    count()
    validate()
    count()
    built.train_step(batch, 1e-3)
    validate()
    with built.evaluation(any_shape=True) as model:
        model(pairs[0][0][:, :5])
    count()
    return found


def all_graphs(ways: list[tuple[str, Any]], banded: bool) -> dict[str, list[dict[str, int]]]:
    original = torch.compile
    torch.compile = lambda f, **options: original(f, backend="eager", **options)  # the graphs, without their C++
    try:
        with join("cpu") as world:
            found = {f"{name} {mode}": graphs(ENGINES[name], world, mode) for name, mode in ways}
            return found | ({"banded": graphs(ENGINES["ddp"], world, "none", banded=True)} if banded else {})
    finally:
        torch.compile = original


def assert_one_each(found: dict[str, list[dict[str, int]]]) -> None:
    for name, (trained, validated, later) in found.items():
        blocks = 2 if name == "banded" or "every" in name else 1  # dense and banded, checkpointed or not, in turn
        kinds = blocks + 2  # the final LayerNorm, the head's softmax
        assert trained == {"graphs": kinds, "breaks": 0}, name
        assert validated == {"graphs": 2 * kinds, "breaks": 0}, name  # the same without gradients
        assert later == validated, name


@pytest.mark.slow
def test_each_kind_of_block_is_one_graph() -> None:
    """Under each engine and activation checkpointing, without a break, and traced once: all pairs of them under FSDP,
    which wraps each block, and under DDP."""
    ways = [(name, mode) for name in ("ddp", "fsdp") for mode in MODES]
    ways += [("zero-1", "selective"), ("zero-2", {"every": 2}), ("zero-3", "none"), ("zero-3", "full")]
    (found,) = run_ranks(1, all_graphs, ways, True)
    assert len(found) == len(ways) + 1
    assert_one_each(found)


def ramp_graphs(engine: dict[str, Any]) -> list[dict[str, int]]:
    """Dynamo's counts after steps and validations of all sizes of micro-batches up to 3, and after as many more."""
    original = torch.compile
    torch.compile = lambda f, **options: original(f, backend="eager", **options)
    with join("cpu") as world:
        train = {"precision": "bf16", "device": "cpu", "compile": True, "micro_batch": 3}
        train |= {"tokens": 48, "batch_tokens": 48}
        model = MODEL | {"attention": "banded", "window": 8}
        built = build_engine(build_config({"model": model, "engine": engine, "train": train}, "t"), world)
        counters.clear()
        found = []
        for _ in range(2):
            for size in (1, 2, 3):
                rows = torch.randint(100, (size, MODEL["context"] + 1))
                pair = rows[:, :-1], rows[:, 1:].contiguous()
                built.train_step(Batch([pair], size, size * MODEL["context"]), 1e-3)
                with built.evaluation() as evaluated:
                    evaluated(*pair)
            breaks = sum(counters["graph_break"].values())
            found.append({"graphs": counters["stats"]["unique_graphs"], "breaks": breaks})
        return found


@pytest.mark.slow
def test_a_model_is_compiled_once_for_each_size_of_a_ramp() -> None:
    """Beyond PyTorch's own limit: a function of which there are 8 graphs would run uncompiled for all other shapes."""
    (found,) = run_ranks(1, ramp_graphs, ENGINES["fsdp"])
    graphs = 3 * 2 * (2 + 2)  # sizes; with and without gradients; both kinds of blocks, final LayerNorm, softmax
    assert found == [{"graphs": graphs, "breaks": 0}] * 2


@pytest.mark.slow
def test_buckets_of_two_ranks_cut_no_block() -> None:
    for found in run_ranks(2, all_graphs, [(name, "none") for name in ("ddp", "fsdp", "zero-3")], False):
        assert_one_each(found)
