"""`megagpt plot` and `megagpt report` as a person types them."""

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megagpt.cli import main
from tests.conftest import Refusal
from tests.report.logged import Logged

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Logged:
    run = Logged(tmp_path, "first")
    run.steps(20)
    run.validation(20, 3.25)
    run.exam(20, "hellaswag", 0.29, 0.0045)
    run.exam(20, "lambada", 0.2)
    return run.save()


def test_plot_draws_several_runs_into_one_file(run: Logged, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Logged(tmp_path, "second")
    other.steps(10)
    target = tmp_path / "both.PNG"
    assert main(["plot", str(run.folder), str(other.save().folder), "--x", "hours", "--out", str(target)]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    assert Image.open(target).format == "PNG"


def test_plot_draws_chosen_exams(run: Logged, tmp_path: Path) -> None:
    target = tmp_path / "curves.svg"
    assert main(["plot", str(run.folder), "--exams", "lambada", "--dark", "--out", str(target)]) == 0
    text = target.read_text()
    assert ">lambada<" in text
    assert ">hellaswag<" not in text
    assert "#1b1d21" in text


@pytest.mark.slow
def test_report_writes_into_the_run_or_where_told(run: Logged, tmp_path: Path) -> None:
    assert main(["report", str(run.folder)]) == 0
    target = tmp_path / "page.html"
    assert main(["report", str(run.folder), "--out", str(target), "--dollars-per-gpu-hour", "2.5", "--x", "flops"]) == 0
    for path in (run.folder / "report.html", target):
        assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("command", ["plot", "report"])
def test_a_folder_that_is_no_run_is_refused(command: str, tmp_path: Path, refusal: Refusal) -> None:
    refusal([command, str(tmp_path)], f"{tmp_path}: not a run's folder (no config.yaml in it)")
    refusal([command, str(tmp_path / "missing")], "not a run's folder")


@pytest.mark.parametrize("command", ["plot", "report"])
def test_names_are_read_as_other_commands_read_them(
    command: str, run: Logged, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.folder)
    refusal([command, ""], "a name is empty")
    refusal([command, "x" * 300], "the name is too long")
    refusal([command, ".", "--out", ""], "a name is empty")
    assert not (run.folder / "report.html").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([command, "~/first"]) == 0


def test_a_folder_of_runs_names_one(run: Logged, tmp_path: Path, refusal: Refusal) -> None:
    line = refusal(["plot", str(tmp_path)], f"{tmp_path}: not a run's folder, but one that holds runs")
    assert line.endswith(f"such as {run.folder}\n")


def test_a_corrupt_config_is_refused(run: Logged, refusal: Refusal) -> None:
    (run.folder / "config.yaml").write_text("model: {layers: 1, widht: 2}")
    refusal(["report", str(run.folder)], "config.yaml", "widht")


def test_unknown_words_name_the_known_ones(run: Logged, refusal: Refusal) -> None:
    folder = str(run.folder)
    refusal(["plot", folder, "--exams", "helaswag"], "--exams helaswag", "did you mean hellaswag?")
    for nothing in (",", ""):
        refusal(["plot", folder, "--exams", nothing], f"--exams {nothing!r} names no exam")
    refusal(["plot", folder, "--references", "fineweb-edo"], "--references 'fineweb-edo'", "did you mean fineweb-edu")
    refusal(["report", folder, "--references", "books"], "valid: auto, none, fineweb-edu, fineweb")
    refusal(["plot", folder, "--out", "curves.pdf"], "--out curves.pdf", ".png or an .svg")


def test_exams_are_refused_if_no_run_has_taken_any(tmp_path: Path, refusal: Refusal) -> None:
    run = Logged(tmp_path, "run")
    run.steps(2)
    refusal(["plot", str(run.save().folder), "--exams", "hellaswag"], "none was taken; leave --exams out")


def test_a_run_without_steps_has_no_picture(tmp_path: Path, refusal: Refusal) -> None:
    refusal(["plot", str(Logged(tmp_path, "empty").folder)], "empty: nothing to draw", "no step is logged yet")


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_refused(run: Logged, tmp_path: Path, refusal: Refusal) -> None:
    for target in (tmp_path / "missing" / "a.png", tmp_path / "folder.png"):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        refusal(["plot", str(run.folder), "--out", str(target)], str(target), "cannot be written", "--out")
    refusal(["report", str(run.folder), "--out", str(tmp_path)], str(tmp_path), "it is a folder", "--out")
    (tmp_path / "a.html.tmp").mkdir()  # it cannot be written, as on a disk without space
    refusal(["report", str(run.folder), "--out", str(tmp_path / "a.html")], "a.html: cannot be written", "--out")


@pytest.mark.parametrize("price", ["free", "0", "-1", "nan", "inf"])
def test_a_price_is_a_number_above_zero(price: str, run: Logged, refusal: Refusal) -> None:
    refusal(["report", str(run.folder), f"--dollars-per-gpu-hour={price}"], f"{price!r} is not a price above 0")


def test_a_missing_library_is_named_with_its_extra(
    run: Logged, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing: list[str] = []

    def hidden(name: str, *more: Any) -> Any:
        return None if name in missing else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    for names in (["matplotlib"], ["matplotlib", "jinja2"]):
        missing[:] = names
        line = refusal(["plot", str(run.folder)], f"plot needs {' and '.join(names)}")
        extra = line.rpartition("[")[2].partition("]")[0]
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(any(entry.startswith(name) for entry in extras[extra]) for name in names)
