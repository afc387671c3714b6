"""A whole run on four ranks in groups of two tensor ranks: the run of one process, and what becomes of it later."""

import json
import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from tests.conftest import metrics, write_tiny
from tests.evaluation.conftest import hellaswag, write
from tests.processes import Process, start_ranks
from tests.runs import PATIENCE, assert_same_curve, logs

# One group: all of it is compared with one run.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tensor runs")]

TWO_BY_TWO = ["engine.name=fsdp", "engine.tensor_ranks=2"]
ONE_BY_FOUR = ["engine.name=fsdp", "engine.tensor_ranks=4"]
HALF = 1280


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run of one process under DDP, and the same on 2 x 2 ranks: 20 steps with everything that a run does."""
    folder = tmp_path_factory.mktemp("tensor")
    write(folder / "exams" / "hellaswag.jsonl", hellaswag(6, longest=4))
    write(folder / "exams" / "lambada.jsonl", [{"text": f"the cat saw {i} and a dog"} for i in range(5)])
    config = write_tiny(
        folder, corpus, model={"heads": 4}, train={"micro_batch": 2}, optimizer={"clip_norm": 0.5},
        validation={"every_tokens": HALF // 2, "tokens": 640},
        sampling={"every_tokens": HALF, "samples": 2, "max_tokens": 30},
        checkpoint={"every_tokens": HALF, "keep_last": 9},
        evaluation={"tasks": ["hellaswag", "lambada"], "every_tokens": HALF, "data": str(folder / "exams")},
    )  # fmt: skip
    assert main(["train", str(config), "run.name=one"]) == 0
    wait_for(start_ranks(4, [str(config), "run.name=tensor", "train.micro_batch=1", *TWO_BY_TWO], folder), folder)
    return folder / "runs" / "one", folder / "runs" / "tensor"


def wait_for(ranks: list[Process], folder: Path) -> None:
    assert [rank.wait(PATIENCE) for rank in ranks] == [0] * len(ranks), logs(folder)


def assert_same_run(run: Path, expected: Path) -> None:
    """Losses and norms within 5e-6 and 2e-5, validations within 1e-6, and the same scores and samples."""
    assert_same_curve(run, expected)
    found, whole = metrics(run, "validation"), metrics(expected, "validation")
    assert [line["validation_loss"] for line in found] == pytest.approx(
        [line["validation_loss"] for line in whole], abs=1e-6
    )
    for event, key in (("samples", "samples"), ("exam", "exams")):
        assert [line[key] for line in metrics(run, event)] == [line[key] for line in metrics(expected, event)], event
        assert len(metrics(run, event)) == 2


def test_two_by_two_ranks_train_the_run_of_one_process(runs: tuple[Path, Path]) -> None:
    """With validations, samples longer than the context, exams and saves."""
    assert_same_run(runs[1], runs[0])


def test_a_checkpoint_has_each_element_once(runs: tuple[Path, Path]) -> None:
    """Also what every tensor rank has: the files hold the state and nothing else."""
    for one, tensor in zip(*(list_checkpoints(run) for run in runs), strict=True):
        sizes = []
        for checkpoint in (one, tensor):
            index = FileSystemReader(checkpoint.path).read_metadata()
            files = sum(path.stat().st_size for path in checkpoint.path.glob("*.distcp"))
            assert sum(place.length for place in index.storage_data.values()) == files
            tensors = index.state_dict_metadata.values()
            sizes.append([sum(prod(chunk.sizes) for chunk in t.chunks) for t in tensors])  # type: ignore[union-attr]
            assert sizes[-1] == [prod(t.size) for t in tensors]  # type: ignore[union-attr]
        assert sorted(sizes[0]) == sorted(sizes[1])


def resumed(run: Path, name: str, ranks: int, *overrides: str) -> Path:
    """A copy of the run, resumed in its middle on that many ranks."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    arguments = ["--resume", str(copy), "--at", str(HALF), *overrides]
    if ranks == 1:
        assert main(["train", *arguments]) == 0
    else:
        folder = run.parent.parent
        wait_for(start_ranks(ranks, arguments, folder), folder)
    return copy


def test_a_run_goes_on_without_tensor_ranks_and_with_them(runs: tuple[Path, Path]) -> None:
    """2 x 2 ranks to one process, and one process to 1 x 4 ranks."""
    one, tensor = runs
    assert_same_run(resumed(tensor, "to-one", 1, "engine.name=ddp"), one)
    assert_same_run(resumed(one, "to-four", 4, *ONE_BY_FOUR), one)


def test_the_commands_take_its_checkpoint(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    one, tensor = runs
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(tensor)]) == 0
    assert capsys.readouterr().out.count("every byte as it was written") == 2
    checkpoint, folder = list_checkpoints(tensor)[-1].path, tensor.parent.parent
    out = folder / "scores.json"
    command = ["evaluate", str(checkpoint), "--tasks", "hellaswag,lambada", "--data", str(folder / "exams")]
    assert main([*command, "--json", str(out)]) == 0
    values = {result["task"]: result["values"][0]["value"] for result in json.loads(out.read_text())["results"]}
    logged = metrics(tensor, "exam")[-1]["exams"]
    assert values == {name: scores["value"] for name, scores in logged.items()}
    texts = []
    for run in (one, tensor):
        capsys.readouterr()
        assert main(["sample", str(run), "--prompt", "Document 7:", "--max-tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
        assert main(["export", str(run), "--to", str(folder / run.name)]) == 0
    assert texts[0] == texts[1] != ""
    first, second = (load_file(folder / run.name / "model.safetensors") for run in (one, tensor))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-5) for name in first)
