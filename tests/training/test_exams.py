"""Exams while a run trains: they change nothing of it, and their scores are those of `megagpt evaluate`."""

import hashlib
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from megagpt.config_file import build_config
from megagpt.engines.engine import build_engine
from megagpt.errors import ExitCode, NonFiniteError
from megagpt.evaluation import exam
from megagpt.evaluation.examinee import examined
from megagpt.evaluation.scoring import score
from megagpt.evaluation.sequences import Group, Tokens
from megagpt.measure.cases import ENGINE_CASES, LR, Case, rows, share
from megagpt.world import World, join
from tests.conftest import Refusal, Tiny, metrics
from tests.evaluation.conftest import hellaswag, write
from tests.processes import run_ranks
from tests.runs import charts, losses

Groups = list[Group]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "exams" / "hellaswag.jsonl", hellaswag(12, longest=4))
    write(tmp_path / "exams" / "lambada.jsonl", [{"text": f"the cat saw {i} and a dog"} for i in range(5)])
    return tmp_path / "exams"


def with_exams(data: Path, every: int = 640, **more: Any) -> dict[str, Any]:
    return {"tasks": ["hellaswag", "lambada"], "every_tokens": every, "data": str(data), **more}


@pytest.mark.slow
def test_scores_go_everywhere_and_are_those_of_the_command(
    tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny(evaluation=with_exams(data, limit=7), checkpoint={"every_tokens": 640, "keep_last": 9}))
    assert main(["train", config]) == 0
    run = tmp_path / "runs" / "tiny"
    lines = metrics(run, "exam")
    assert [line["tokens_seen"] for line in lines] == [640, 1280, 1920, 2560]
    assert [list(line["exams"]) for line in lines] == [["hellaswag", "lambada"]] * 4
    scores = [line["exams"]["hellaswag"] for line in lines]
    assert all((s["items"], s["score"], s["shots"]) == (7, "mean_token", 0) for s in scores)
    assert all(s["published"] is False for s in scores), "the rows have no ctx_a"
    assert all(s["sha256"] == hashlib.sha256((data / "hellaswag.jsonl").read_bytes()).hexdigest() for s in scores)
    printed = capsys.readouterr().out
    assert f"exams: hellaswag {scores[0]['value']:.4f} ± " in printed
    assert "(mean_token, 7 items); lambada 0.0000" in printed
    points = charts(run)["exams/hellaswag"]
    expected = zip((line["step"] for line in lines), (logged["value"] for logged in scores), strict=True)
    assert [(step, pytest.approx(value)) for step, value in points] == list(expected)
    for checkpoint, logged in zip(list_checkpoints(run), scores, strict=True):
        out = tmp_path / "out.json"
        command = ["evaluate", str(checkpoint.path), "--tasks", "hellaswag", "--data", str(data), "--limit", "7"]
        assert main([*command, "--json", str(out)]) == 0
        value = json.loads(out.read_text())["results"][0]["values"][0]
        assert (value["value"], value["standard_error"]) == (logged["value"], logged["standard_error"])
    assert main(["status", str(run)]) == 0
    assert f"exams        hellaswag {scores[-1]['value']:.4f} ± " in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_exams_is_the_run_without_them(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """With dropout, whose draws exams must not disturb."""
    sections = {"model": {"dropout": 0.1}, "train": {"tokens": 640}}
    assert main(["train", str(tiny(**sections)), "run.name=without"]) == 0
    assert main(["train", str(tiny(**sections, evaluation=with_exams(data, every=128))), "run.name=with"]) == 0
    runs = [tmp_path / "runs" / name for name in ("without", "with")]
    assert losses(runs[0]) == losses(runs[1])
    assert len(metrics(runs[1], "exam")) == 5
    files = [sorted(list_checkpoints(run)[-1].path.glob("*.distcp")) for run in runs]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_missing_rows_and_unknown_tasks_end_a_run_at_its_start(tiny: Tiny, tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "exams").mkdir()
    config = str(tiny(evaluation=with_exams(tmp_path / "exams")))
    refusal(["train", config], "evaluation.tasks: ", str(tmp_path / "exams"), "hellaswag_val.jsonl")
    refusal(["train", config, "evaluation.tasks=helaswag"], "evaluation.tasks: task 'helaswag'", "did you mean hella")
    refusal(["train", config, "evaluation.tasks=3"], "evaluation.tasks")
    write(tmp_path / "exams" / "piqa.jsonl", [{"query": "q", "choices": ["a", "cat " * 40], "gold": 0}])
    refusal(["train", config, "evaluation.tasks=piqa"], "evaluation.tasks: ", "piqa.jsonl line 1", "no room")
    refusal(["train", config, "evaluation.tasks=piqa", "evaluation.shots=2"], "evaluation.tasks: piqa", "training rows")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_resume_says_if_the_rows_of_an_exam_have_changed(
    tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny(evaluation=with_exams(data, every=0), train={"tokens": 256}))]) == 0
    write(data / "hellaswag.jsonl", hellaswag(11, longest=4))
    resume = ["train", "--resume", str(tmp_path / "runs" / "tiny")]
    for tokens, says in (("384", True), ("512", False)):
        capsys.readouterr()
        assert main([*resume, f"train.tokens={tokens}"]) == 0
        said = "exam hellaswag: rows and limit changed since the last incarnation" in capsys.readouterr().err
        assert said is says


@pytest.mark.slow
def test_a_stop_in_an_exam_is_obeyed_and_the_exam_held_after_the_resume(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"train": {"tokens": 768}, "checkpoint": {"every_tokens": 256}}
    config = str(tiny(**sections, evaluation=with_exams(data, every=256)))
    assert main(["train", config, "run.name=whole"]) == 0
    usual, calls = exam.score, 0

    def signalled(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the second exam of the second time
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(exam, "score", signalled)
        assert main(["train", config, "run.name=cut"]) == ExitCode.STOPPED
    cut = tmp_path / "runs" / "cut"
    assert [line["tokens_seen"] for line in metrics(cut, "exam")] == [256]
    assert main(["train", "--resume", str(cut)]) == 0
    found, expected = metrics(cut, "exam"), metrics(tmp_path / "runs" / "whole", "exam")
    assert [{**line, "time": 0} for line in found] == [{**line, "time": 0} for line in expected]


def test_scores_that_are_not_finite_do_not_end_the_run(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise NonFiniteError("a log-likelihood is NaN")

    monkeypatch.setattr(exam, "score", refuse)
    assert main(["train", str(tiny(evaluation=with_exams(data, every=0), train={"tokens": 256}))]) == 0
    assert "no score of hellaswag: a log-likelihood is NaN; no score of lambada" in capsys.readouterr().out
    (line,) = metrics(tmp_path / "runs" / "tiny", "exam")
    assert line["exams"] == {}


def test_exams_are_signs_of_life(tiny: Tiny, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = []
    monkeypatch.setattr("megagpt.training.watchdog.Watchdog.phase", lambda self, text: phases.append(text))
    assert main(["train", str(tiny(evaluation=with_exams(data, every=0), train={"tokens": 256}))]) == 0
    assert "exam hellaswag" in phases
    assert "exam lambada" in phases


# --- under each engine ---


def groups() -> Groups:
    """Of the cases' small vocabulary."""
    found = rows(99)[:6].tolist()
    return [[Tokens(row[: 9 + i], 4), Tokens([*row[:4], 7, 8, i], 4)] for i, row in enumerate(found)]


def on_engines(ways: list[tuple[str, str]]) -> list[tuple[str, list[Any]]]:
    """For each engine and precision: the digest of the state after three steps with exams before them, or without; and
    the scores."""
    with join("cpu") as world:
        return [of_engine(Case(ENGINE_CASES[name].engine, world.size, precision=p), world) for name, p in ways]


def of_engine(case: Case, world: World) -> tuple[str, list[Any]]:
    digests, scores = [], []
    for examines in (False, True):
        engine = build_engine(case.config(), world)
        for step in range(3):
            if examines:
                before = torch.get_rng_state()
                with examined(engine) as model:
                    scores.append(score(model, groups(), world, batch_tokens=64))
                assert torch.equal(torch.get_rng_state(), before)
            result = engine.train_step(share(step, world.rank, case), LR)
        flats = [shard.flat.numpy().tobytes() for shard in engine.state().values()]
        digests.append(hashlib.sha256(b"".join(flats)).hexdigest() + str(result))
    assert digests[0] == digests[1], "exams change the training"
    return digests[0], scores


@pytest.mark.slow
def test_every_engine_trains_and_scores_the_same() -> None:
    """In bf16, too, exams are fp32: before the first step all engines have the same bits; later, the scores of two
    engines differ by what their training differs."""
    ways = [(name, "bf16") for name in ("ddp", "fsdp", "zero-1", "zero-2", "zero-3")]
    ways += [(name, "fp32") for name in ("ddp", "fsdp", "zero-3")]  # the weights' layouts
    ways += [("fsdp 1 x 2 tensor", precision) for precision in ("bf16", "fp32")]
    first, second = run_ranks(2, on_engines, ways)
    references = {way[1]: one[1] for way, one in zip(ways, first, strict=True) if way[0] == "ddp"}
    for way, one, other in zip(ways, first, second, strict=True):
        assert one[1] == other[1], f"{way}: ranks have other scores"
        start, *later = one[1]
        reference_start, *reference_later = references[way[1]]
        assert start == reference_start == references["fp32"][0], way
        assert start != later[0] != later[1], "nothing was learned"
        for ours, reference in zip(later, reference_later, strict=True):
            pairs = zip(itertools.chain(*ours), itertools.chain(*reference), strict=True)
            tolerance = 1e-4 if way[1] == "fp32" else 0.2
            assert all(abs(a.log_likelihood - b.log_likelihood) < tolerance for a, b in pairs), way


def test_exams_of_a_bf16_run_are_fp32() -> None:
    """The scores are those of the fp32 weights, by a model that never saw bf16."""
    config = build_config(
        {"model": {"layers": 2, "width": 32, "heads": 2, "context": 32, "vocab_size": 500},
         "train": {"precision": "bf16", "residual": "bf16", "device": "cpu"}}, "test",
    )  # fmt: skip
    engine, world = build_engine(config, World.alone()), World.alone()
    with examined(engine) as model:
        found = score(model, groups(), world)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        from megagpt.models.gpt import GPT

        plain = GPT(config.model).eval()
        plain.load_state_dict(engine.model.state_dict())
        assert score(plain, groups(), world) == found
    with engine.evaluation() as rounded:
        assert score(rounded, groups(), world) != found
