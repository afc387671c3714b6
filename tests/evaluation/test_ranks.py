"""The same bits on 1, 2 and 4 ranks of one thread each, whole or sharded; and the launchers."""

import json
import random
import sys
from pathlib import Path

import pytest

from tests.evaluation.conftest import hellaswag, sentence, write
from tests.evaluation.exam_ranks import TASKS, evaluate, of_a_rank
from tests.processes import free_port, run_launcher, run_ranks, torchrun_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of five exams: 9, 2, 2, 3 and 2 batches, which do not share evenly, and not at all with each of 4 ranks."""
    folder, g = tmp_path_factory.mktemp("rows"), random.Random(1)
    write(folder / "hellaswag.jsonl", hellaswag(19))
    write(folder / "winogrande.jsonl", [
        {"sentence": f"{sentence(g, 1, 9)} _ {sentence(g, 1, 9)}", "option1": "cat", "option2": "a dog", "answer": "1"}
        for _ in range(7)
    ])  # fmt: skip
    write(folder / "arc_easy.jsonl", [
        {"query": f"Question: {sentence(g, 1, 9)}", "choices": [sentence(g, 1, 3) for _ in range(4)], "gold": 1}
        for _ in range(7)
    ])  # fmt: skip
    write(folder / "lambada.jsonl", [{"text": sentence(g, 3, 70)} for _ in range(11)])
    copa = [
        {"premise": sentence(g, 1, 9), "choice1": "Cats", "choice2": sentence(g, 1, 9), "question": "cause", "label": 0}
        for _ in range(5)
    ]
    write(folder / "copa.jsonl", copa)
    write(folder / "copa_train.jsonl", copa)
    return folder


def test_any_number_of_ranks_and_any_engine_have_the_same_bits(folder: Path, data: Path) -> None:
    (alone,) = run_ranks(1, of_a_rank, str(folder), str(data), [("ddp", "fp32"), ("ddp", "bf16")])
    expected = dict(zip(("fp32", "bf16"), alone, strict=True))
    assert expected["fp32"]["digest"] != expected["bf16"]["digest"]
    two = [("ddp", "fp32"), ("fsdp", "fp32"), ("fsdp", "bf16"), ("zero", "bf16")]
    for ranks, cases in ((2, two), (4, [("ddp", "fp32"), ("zero", "fp32")])):
        found = run_ranks(ranks, of_a_rank, str(folder), str(data), cases)
        for i, (engine, precision) in enumerate(cases):
            one = expected[precision]
            assert {results[i]["digest"] for results in found} == {one["digest"]}, (ranks, engine, precision)
            assert all(results[i]["values"] == one["values"] for results in found)
            calls = {results[i]["calls"] for results in found}
            assert len(calls) == 1, "ranks take equally many forward passes"
            assert one["calls"] / ranks <= calls.pop() <= one["calls"] / ranks + len(TASKS)


def test_hosts_with_rows_of_other_exams_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for host, names in (("near", ["copa", "hellaswag"]), ("far", ["copa"])):
        for name in names:
            write(tmp_path / host / "rows" / f"{name}.jsonl", hellaswag(2))
    assert run_ranks(2, evaluate, str(folder), ["near", "far"], tmp_path) == [2, 2]
    assert capsys.readouterr().out.count("--data rows: has rows of copa on far, but hellaswag, copa on near; copy") == 1


def test_launchers_print_the_table_once(folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["evaluate", str(folder), "--tasks", "copa", "--data", str(data), "--json", str(out)]
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--module"]
    deepspeed += ["--master_port", str(free_port())]
    for launcher in ([*torchrun_command(2), "-m"], deepspeed):
        out.unlink(missing_ok=True)
        done = run_launcher([*launcher, "megagpt", *arguments], tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("mean_token  ") == 1, done.stdout
        assert json.loads(out.read_text())["ranks"] == 2
