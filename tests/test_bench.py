"""`megagpt bench`: its steps' results, its numbers, and what it refuses; what `parity` refuses."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from megagpt.cli import main
from megagpt.errors import UserError
from megagpt.measure import bench, matrix_rate, steps
from megagpt.measure.cases import ENGINE_CASES, Case
from megagpt.measure.plain import PlainGPT, plain_loss, plain_optimizer, plain_step
from megagpt.measure.tables import on_gpus
from megagpt.models.presets import ModelConfig
from tests.conftest import Refusal
from tests.processes import REPOSITORY

MODEL = ["model.layers=1", "model.width=32", "model.heads=2", "model.vocab_size=500"]
BENCH = ["bench", "gpt2-124m", *MODEL, "--batch", "2", "--context", "16", "--precision", "fp32", "--device", "cpu"]


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulated_micro_batches_are_one_step_of_the_whole_batch(micro_batches: int) -> None:
    config = ModelConfig(layers=1, width=32, heads=2, context=16, vocab_size=500)
    rows = torch.randint(500, (4, 17), generator=torch.Generator().manual_seed(1))
    found = []
    for count in (1, micro_batches):
        torch.manual_seed(0)
        model = PlainGPT(config)
        optimizer = plain_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
        curve = [plain_step(model, optimizer, rows[:, :-1], rows[:, 1:], 0.2, micro_batches=count) for _ in range(3)]
        found.append([value.item() for step in curve for value in step])
    assert found[1] == pytest.approx(found[0], rel=2e-5)


@pytest.mark.parametrize("clip_norm", [0.2, 100.0])
def test_fp16_scales_the_loss_and_clips_what_is_unscaled(clip_norm: float) -> None:
    """Without its scale, the small gradient of this loss would vanish in fp16."""
    config = ModelConfig(layers=1, width=32, heads=2, context=16, vocab_size=500)
    rows = torch.randint(500, (4, 17), generator=torch.Generator().manual_seed(1))
    found = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = PlainGPT(config)
        optimizer = plain_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        step = partial(plain_step, model, optimizer, rows[:, :-1], rows[:, 1:], clip_norm, dtype, scaler=scaler)
        found.append([value.item() for _ in range(3) for value in step(loss_of=tiny_loss)])
    assert found[1] == pytest.approx(found[0], rel=2e-2)


def tiny_loss(model: torch.nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return plain_loss(model, tokens, targets) / 1e5


def here(ranks: int, function: Any, *arguments: Any, method: str) -> Iterator[Any]:
    """A rank in this process."""
    return function(*arguments)


def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run here, once each, and take given times; so do the matrix products."""
    monkeypatch.setattr(bench, "run_ranks", here)
    monkeypatch.setattr(steps, "time_steps", lambda step, device, count: [[step(), 0.5][1], 0.25, 1.0])
    monkeypatch.setattr(matrix_rate, "time_call", lambda call, device: [call(), 0.001][1])


def found(seconds: list[float], matrix_seconds: float | None = 0.5, compiled: bool = False) -> steps.Measured:
    return steps.Measured(seconds, 2**30, compiled, matrix_seconds, 1e9, "some device", 1, torch.__version__)


def test_rows_are_shown_as_they_come(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The second row fails: the first one's numbers were shown."""

    def second_fails(ranks: int, function: Any, row: steps.Row, method: str) -> Iterator[Any]:
        if row.implementation == "plain":
            raise UserError("broken on purpose")
        yield found([1.0, 2.0, 4.0])

    monkeypatch.setattr(bench, "run_ranks", second_fails)
    assert main([*BENCH, "--against", "plain", "--steps", "1", "--rounds", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "round 1 of 1: megagpt fp32 ..."
    assert lines[1].startswith("  best s 1.0000, median s 2.0000, tok/s 32, ")
    assert lines[2:4] == ["round 1 of 1: plain fp32 ...", "  broken on purpose"]
    assert lines[4] == "megagpt: error: plain fp32: broken on purpose"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_numbers_follow_from_the_step_that_counts(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two rounds, by hand; and each number of the table was shown as it came."""
    times = {
        "megagpt": iter([([1.0, 2.0, 4.0], 0.5), ([3.0, 3.0], 0.25)]),  # best 1, median 3
        "plain": iter([([6.0, 6.0, 3.0], 0.5), ([6.0], 0.5)]),  # best 3, median 6
        "transformers": iter([([9.0, 9.0], 0.5), ([2.0, 9.0], 0.5)]),  # best 2, median 9
    }

    def measured(ranks: int, function: Any, row: steps.Row, method: str) -> Iterator[Any]:
        yield found(*next(times[row.implementation]))

    monkeypatch.setattr(bench, "run_ranks", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command = [*BENCH[:-1], device, "--against", "plain,transformers"]
    assert main([*command, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    own, plain, transformers = report["rows"]
    step, matrix = (1.0, 0.25) if device == "cpu" else (3.0, 0.375)
    tokens = 2 * 16
    per_token = 6 * (12 * 32 * 32 + 13 * 32 + 2 * 32 + 500 * 32) + 12 * 32 * 16
    assert own["seconds"] == [[1.0, 2.0, 4.0], [3.0, 3.0]]
    assert (own["best_seconds"], own["median_seconds"]) == (1.0, 3.0)
    assert own["tokens_per_second"] == tokens / step
    assert own["flops_per_second"] == tokens * per_token / step
    assert own["mfu"] == own["flops_per_second"] / 1e9
    matrix_rate = tokens * 6 * (12 * 32 * 32 + 512 * 32) / matrix
    assert own["matrix_flops_per_second"] == matrix_rate
    assert own["of_matrix_rate"] == pytest.approx(tokens * per_token / step / matrix_rate)
    assert own["products_share"] == matrix / step
    assert own["against"] == (
        {"plain": 3.0, "transformers": 2.0} if device == "cpu" else {"plain": 2, "transformers": 3}
    )
    assert own["vs_best_other"] == 2.0
    assert plain["against"] is None
    assert own["compile"] == plain["compile"] == transformers["compile"]
    counts = report["statistic"]
    assert counts == ("best" if device == "cpu" else "median")

    *lines, title, says, head, own_line, _, _ = err.splitlines()
    assert "some device, 1 threads" in title
    assert f"are those of the {counts} step" in says
    assert "products' share" in head
    assert f"{matrix / step:.1%}" in own_line
    shown = [lines[i + 1] for i in range(0, len(lines), 2)][-3:]
    for line, table_line in zip(shown, err.splitlines()[-3:], strict=True):
        for cell in table_line.split()[2:]:
            assert cell.rstrip(",") in line or cell == "2.00x"
    assert "megagpt is 2.00x as fast" in shown[1 if device == "cuda" else 2]


@pytest.mark.parametrize(
    ("override", "argument"),
    [("train.tokens=9e9", "--batch and --accumulation"), ("train.batch_tokens=64", "--batch and --accumulation"),
     ("train.micro_batch=1", "--batch"), ("train.precision=bf16", "--precision"), ("train.device=cpu", "--device"),
     ("train={compile: true}", "--compile"), ("model.context=8", "--context"), ("engine.name=zero", "--engine"),
     ("model.preset=gpt3-xl", "PRESET")],
)  # fmt: skip
def test_keys_that_an_argument_decides_are_refused(override: str, argument: str, refusal: Refusal) -> None:
    refusal([*BENCH, override], f"from {argument}", f"leave out the override {override}")


def test_bench_has_no_peers_for_tensor_ranks(refusal: Refusal) -> None:
    command = [*BENCH, "--engine", "fsdp", "engine.tensor_ranks=2"]
    refusal(command, "engine.tensor_ranks 2: bench measures one rank; leave it out")


def test_parity_refuses_tables_that_it_cannot_measure(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    for tables in (",", ""):
        refusal(["parity", "--tables", tables], f"--tables {tables!r} names no table; valid: fp32, bf16, residual")
    refusal(["parity", "--tables", "fp32,speed"], "--tables 'speed': valid: fp32, bf16, residual, memory, crossings")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("memory", "crossings"):
        command = ["parity", "--device", "cuda", "--tables", f"fp32,{name}"]
        refusal(command, f"--tables {name}: is measured on the CPU only", "--device cpu")


def test_parity_compares_the_layouts_for_which_there_are_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {}
    for gpus in (1, 2, 3, 4, 8):
        cases = on_gpus(gpus)
        assert all(Case(c.engine, c.ranks).config().sharing_ranks(c.ranks) for c in cases), "a layout that cannot be"
        counts[gpus] = [case.name for case in cases]
        said = capsys.readouterr().err
        assert all(name in said for name in ENGINE_CASES.keys() - set(counts[gpus]))
    assert counts[1] == ["ddp", "fsdp", "zero-1", "zero-2", "zero-3"]
    assert counts[2] == counts[3] == [name for name, case in ENGINE_CASES.items() if case.ranks == 2]
    assert counts[4] == counts[8] == list(ENGINE_CASES)


def test_a_step_is_all_its_micro_batches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    untimed(monkeypatch)
    assert main([*BENCH, "--accumulation", "3", "--against", "plain", "--rounds", "1"]) == 0
    title, _, head, *rows = capsys.readouterr().out.splitlines()
    assert "3 x 2 x 16 tokens a step" in title
    assert head.split()[:7] == ["implementation", "precision", "best", "s", "median", "s", "tok/s"]
    assert [row.split()[:5] for row in rows] == [
        [name, "fp32", "0.2500", "0.5000", "384"] for name in ("megagpt", "plain")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "graphs"), [("--compile", 2), ("--no-compile", 0)])
def test_the_others_are_compiled_as_a_whole(
    compiled: str, graphs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One graph of each for model, head and loss."""
    untimed(monkeypatch)

    def others_only(ranks: int, function: Any, row: steps.Row, method: str) -> Iterator[Any]:
        own = found([1.0], compiled=row.config.train.compile is True)
        return iter([own]) if row.implementation == "megagpt" else function(row)

    monkeypatch.setattr(bench, "run_ranks", others_only)
    counter = CompileCounter()
    monkeypatch.setattr(steps.torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    command = [word if word != "fp32" else "fp16" for word in BENCH]
    command += [compiled, "--accumulation", "2", "--rounds", "1"]
    assert main([*command, "--against", "plain,transformers", "--json", str(tmp_path / "found")]) == 0
    rows = json.loads((tmp_path / "found").read_text())["rows"]
    assert [row["compile"] for row in rows] == [compiled == "--compile"] * 3
    assert counter.frame_count == graphs


def test_bench_refuses_several_ranks(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    refusal(BENCH, "bench measures one rank, and the launcher has started 2: start it without torchrun or srun")


def test_bench_says_if_no_row_could_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "run_ranks", lambda *arguments, method: iter(["out of memory"]))
    assert main(BENCH) == 2
    error = "no row could be measured: megagpt fp32: out of memory; use a smaller --batch than 2"
    assert capsys.readouterr().err.splitlines()[-1] == f"megagpt: error: {error}"


def test_bench_refuses_a_place_for_its_json_at_once(refusal: Refusal, tmp_path: Path) -> None:
    refusal([*BENCH, "--json", str(tmp_path / "none" / "file")], "--json ", "there is no folder", "make it, or name")
    refusal([*BENCH, "--json", str(tmp_path)], "--json ", "is not a file; name a file, or - for stdout")


def test_bench_refuses_to_compare_unequal_work(refusal: Refusal) -> None:
    for override in ("model.dropout=0.1", "model.attention=banded"):
        refusal([*BENCH, "--against", "plain", override], "--against plain", "leave out")
    refusal([*BENCH, "--against", "transformers", "model.attention=banded"], "--against transformers", "leave out")
    for override in ("train.residual=bf16", "train.float8=rowwise"):
        command = [word if word not in ("fp32", "cpu") else {"fp32": "bf16", "cpu": "auto"}[word] for word in BENCH]
        advice = "unequal numerics; leave out this override, or --against"
        refusal([*command, "--against", "transformers", override], override.partition("=")[0], advice)


def test_the_json_has_the_documented_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a row that was measured and in one that was not."""

    def measured(ranks: int, function: Any, row: steps.Row, method: str) -> Iterator[Any]:
        yield found([1.0]) if row.implementation == "plain" else "out of memory"

    monkeypatch.setattr(bench, "run_ranks", measured)
    assert main([*BENCH, "--against", "plain", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    text = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    _, _, documented = text.partition("At the top: ")
    top, _, table = documented.partition("\n| key | meaning |\n|---|---|\n")
    table = table.partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()]
    keys = re.findall(r"`(\w+)`", "".join(first_cells))
    for row in report["rows"]:
        assert sorted(row) == sorted(keys)
    assert report.keys() <= set(re.findall(r"`(\w+)`", top))
    assert report["rows"][0]["failure"] == "out of memory"
    assert {report["rows"][0][key] for key in ("best_seconds", "mfu", "products_share", "compile")} == {None}
