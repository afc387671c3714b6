"""Configs by name: files, folders, and what stands for neither."""

import json
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.config_file import load_config, load_run
from megagpt.training.run_folder import run_folder
from tests.conftest import Refusal

MODEL = {"layers": 1, "width": 8, "heads": 1, "context": 8}
TINY = json.dumps({"model": MODEL, "train": {"tokens": 10**6, "batch_tokens": 512}, "schedule": {"shape": "constant"}})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder holds tiny.yaml only."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)


@pytest.mark.parametrize("file", ["a b .yaml", "..yaml", "a .yaml"])
def test_a_file_whose_name_is_no_runs_name_needs_one(file: str, refusal: Refusal) -> None:
    Path(file).write_text(TINY)
    refusal(["config", file], "run.name")
    assert load_config(file, ["run.name=good"]).run.name == "good"


def test_a_file_may_have_an_equals_sign_in_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lr=1e-3.yaml").write_text(TINY)
    Path("train.lr=2").write_text(TINY)
    Path("optimizer.lr=1e-3.yaml").write_text(TINY)
    Path("sweep").mkdir()
    Path("sweep/lr=5.yaml").write_text(TINY)
    for name in ("lr=1e-3.yaml", "optimizer.lr=1e-3.yaml", "./lr=1e-3.yaml", "sweep/lr=5.yaml", "./train.lr=2"):
        assert main(["config", name, "optimizer.lr=0.25"]) == 0
        assert f"name: {Path(name).stem if name.endswith('.yaml') else 'train'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lr=1e-4.yaml", "'lr=1e-4.yaml' not found: did you mean lr=1e-3.yaml?"),
        ("sub/lr=1e-4.yaml", "not found: did you mean sub/lr=1e-3.yaml"),
        ("sub/tinny.yaml", "not found: did you mean sub/tiny.yaml"),
        ("tinny.yaml", "not found: did you mean tiny.yaml"),
        ("gpt3_lx", "not found: did you mean gpt3_xl"),
        ("missing/tiny.yaml", "no folder 'missing'"),
        ("sub", "is a folder; name a file in it"),
        ("x" * 300, "not found: File name too long"),
    ],
)
def test_a_config_that_is_not_there_is_called_so(name: str, hint: str, refusal: Refusal) -> None:
    Path("sub").mkdir()
    for file in ("lr=1e-3.yaml", "sub/lr=1e-3.yaml", "sub/tiny.yaml"):
        Path(file).write_text(TINY)
    refusal(["config", name], f"config {name!r}", hint)
    refusal(["config", "--config", name], f"config {name!r}", hint)


def test_the_place_of_a_run_decides_its_name() -> None:
    """Also of runs whose stored name 0.1.0 took as a path."""
    run = Path("elsewhere/moved run")
    run.mkdir(parents=True)
    run.joinpath("config.yaml").write_text(json.dumps({**json.loads(TINY), "run": {"name": "../out", "seed": 3}}))
    config = load_run(run, ["optimizer.lr=0.25"])
    assert (config.run.name, config.run.folder, config.run.seed) == ("moved run", "elsewhere", 3)
    assert config.optimizer.lr == 0.25


def test_a_folder_that_is_no_runs_name_must_be_renamed(refusal: Refusal) -> None:
    run = Path("runs/a ")
    run.mkdir(parents=True)
    run.joinpath("config.yaml").write_text(TINY)
    refusal(["status", str(run)], "'runs/a '", "ends with a blank; rename the folder")


def test_a_run_folder_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_folder(load_config("tiny.yaml", ["run.folder=~/runs"])) == tmp_path / "runs" / "tiny"
