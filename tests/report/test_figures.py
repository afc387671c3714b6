"""The curves of a picture, by the numbers that matplotlib was given, and the files that it wrote."""

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from megagpt.report import figures
from megagpt.report.amounts import amount, power, score
from megagpt.report.figures import DARK, LIGHT, all_panels, image, in_dark, themed
from megagpt.report.record import Axis, Record, read_record
from tests.report.logged import STEP_TOKENS, Logged


def panels(records: list[Record], axis: Axis = "tokens", wanted: str = "auto") -> list[Axes]:
    with themed(LIGHT):
        return all_panels(records, axis, wanted, LIGHT).axes


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    return [text.get_text() for text in found.get_texts()] if found else []


def line(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


@pytest.fixture
def run(tmp_path: Path) -> Logged:
    """GPT-2 124M on classic FineWeb: 1,000 steps of 19,073, with validations and exams every 250."""
    run = Logged(tmp_path, "first", "data.sources=[{path: data/fineweb_10bt}]")
    run.steps(1000, seconds=3.6)
    for step in (250, 500, 750, 1000):
        run.validation(step, 3 + 8 / step**0.5)
        run.exam(step, "hellaswag", 0.25 + step / 40_000, 0.0045)
    return run.save()


def test_losses_are_drawn_against_each_axis(run: Logged) -> None:
    record = read_record(run.folder)
    losses = [3 + 8 / step**0.5 for step in (250, 500, 750, 1000)]
    per_step = {"tokens": STEP_TOKENS, "hours": 0.001, "flops": STEP_TOKENS * record.config.model.flops_per_token}
    for axis in ("tokens", "flops", "hours"):
        places, values = line(panels([record], axis)[0], "validation: 3.2530 at 524M tokens")  # type: ignore[arg-type]
        assert places == pytest.approx(np.array([250, 500, 750, 1000]) * per_step[axis])
        assert values == pytest.approx(losses)


def test_the_reference_lines_are_those_of_the_corpus_and_the_size(run: Logged) -> None:
    axes, exam = panels([read_record(run.folder)])
    assert "OpenAI's GPT-2 124M on classic FineWeb: 3.4250" in legend(axes)
    assert set(line(axes, "OpenAI's GPT-2 124M")[1]) == {3.4250}
    places, values = line(axes, "llm.c, 124M, on classic FineWeb: 3.2722 at the end")
    # As far as three times the run so far.
    assert places.tolist() == [step * STEP_TOKENS for step in range(0, 3001, 250)]
    assert (values[0], values[8]) == (11.0092, 3.8585)
    shown = [
        "this run: 27.50%",
        "OpenAI's GPT-2 124M: 29.45%",
        "OpenAI's GPT-3 125M (other text): 33.70%",
        "a guess: 25%",
    ]
    assert legend(exam) == shown
    low, high = exam.get_ylim()
    assert low < 0.25
    assert high > 0.337


def test_scores_of_other_rows_have_no_reference_lines(run: Logged, tmp_path: Path) -> None:
    """Nor do those of an early log with rows from a folder, which may be cleaned ones."""
    cleaned = Logged(tmp_path, "cleaned", "evaluation.data=rows")
    cleaned.exam(1000, "hellaswag", 0.28, published=False)
    early = Logged(tmp_path, "early", "evaluation.data=rows")
    early.exam_of_before(1000, "hellaswag", 0.28, 0.01, 500)
    early.exam_of_before(1000, "lambada", 0.28, 0.01, 500)
    records = [read_record(each.save().folder) for each in (cleaned, early)]
    for record in records:
        assert legend(panels([record])[1]) == ["this run: 28.00% (not the published text)", "a guess: 25%"]
    assert "OpenAI's GPT-2 124M: 32.56%" in legend(panels(records)[2])
    both = legend(panels([records[0], read_record(run.folder)])[1])
    assert both[:2] == ["cleaned: 28.00% (not the published text)", "first: 27.50%"]
    assert "OpenAI's GPT-2 124M: 29.45%" in both


def test_the_log_tells_score_and_shots_of_an_exam(tmp_path: Path) -> None:
    """The config may have been changed since."""
    run = Logged(tmp_path, "run", "model.preset=gpt3-125m", "evaluation.shots=0")
    run.exam(1000, "hellaswag", 0.28, shots=20)
    run.exam(1000, "arc_easy", 0.28, score="sum")
    hellaswag, arc = panels([read_record(run.save().folder)])[1:]
    found = legend(hellaswag)
    assert found[0] == "this run: 28.00% (20-shot)"
    assert "OpenAI's GPT-3 125M, 20-shot (other text): 33.50%" in found
    assert legend(arc) == ["this run: 28.00%"], "the references are by other scores"


def test_llm_cs_curve_is_drawn_in_flops_and_hours(run: Logged) -> None:
    record = read_record(run.folder)
    places, _ = line(panels([record], "flops")[0], "llm.c")
    assert places[1] == 250 * STEP_TOKENS * record.config.model.flops_per_token
    places, _ = line(panels([record], "hours")[0], "llm.c, 124M, on classic FineWeb on 8 H100")
    assert places[1] == pytest.approx(250 * 0.140 / 3600)


def test_another_text_has_no_reference_losses(tmp_path: Path) -> None:
    run = Logged(tmp_path, "books", "data.sources=[{path: data/books}]")
    run.steps(10)
    record = read_record(run.save().folder)
    assert not [text for text in legend(panels([record])[0]) if "OpenAI" in text]
    assert "OpenAI's GPT-2 124M on FineWeb-Edu: 3.2924" in legend(panels([record], wanted="fineweb-edu")[0])


def test_the_noted_text_decides_before_the_folders_name(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run", "data.sources=[{path: data/mine}]")
    run.incarnation(
        1, 0, texts=[{"folder": "data/mine", "text": "HuggingFaceFW/fineweb-edu, sample-10BT", "tokens": 9}]
    )
    run.steps(10)
    record = read_record(run.save().folder)
    assert "OpenAI's GPT-2 124M on FineWeb-Edu: 3.2924" in legend(panels([record])[0])
    assert not [text for text in legend(panels([record], wanted="none")[0]) if "OpenAI" in text]


def test_several_runs_share_a_picture(run: Logged, tmp_path: Path) -> None:
    other = Logged(tmp_path, "_second $x^2$", "model.preset=gpt2-355m", "data.sources=[{path: data/fineweb_10bt}]")
    other.steps(500, loss=4.0)
    other.exam(500, "lambada", 0.2)
    empty = Logged(tmp_path, "third")
    losses, hellaswag, lambada = panels([read_record(r.folder) for r in (run, other.save(), empty.save())])
    assert [losses.get_title(loc="left"), hellaswag.get_title(loc="left"), lambada.get_title(loc="left")] == [
        "Validation loss (pale: training loss)", "hellaswag", "lambada",
    ]  # fmt: skip
    names = legend(losses)
    assert names[:3] == [
        "first: 3.2530 at 524M tokens", "_second $x^2$: no validation yet", "third: no step yet",
    ]  # fmt: skip
    # Lines for the sizes of both.
    assert {"OpenAI's GPT-2 124M on classic FineWeb: 3.4250", "OpenAI's GPT-2 355M on classic FineWeb: 3.0831"} < set(
        names
    )
    assert legend(lambada)[0] == "_second $x^2$: 20.00%"


def test_runs_of_the_same_name_are_told_apart(run: Logged, tmp_path: Path) -> None:
    twin = Logged(tmp_path / "elsewhere", "first")
    twin.steps(500)
    found = legend(panels([read_record(run.folder), read_record(twin.save().folder)])[0])
    assert found[:2] == [f"{run.folder}: 3.2530 at 524M tokens", f"{twin.folder}: no validation yet"]


def test_restarts_are_marked(run: Logged) -> None:
    record = read_record(run.folder)
    with themed(LIGHT):
        _, axes = figures.one_panel()
        figures.draw_losses(axes, LIGHT, [record], "hours", "auto", restarts=[250 * STEP_TOKENS, 500 * STEP_TOKENS])
    assert line(axes, "a restart")[0] == pytest.approx([0.25, 0.5])


def test_the_steep_beginning_is_out_of_view(run: Logged) -> None:
    axes = panels([read_record(run.folder)], wanted="none")[0]
    low, high = axes.get_ylim()
    assert low < 3.01  # the last losses are in view
    assert high < 4  # that of the first step, 11, is not


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    run.steps(3)
    for step, loss in ((1, 4.0), (2, "inf"), (3, "nan")):
        run.validation(step, loss)
    _, values = line(panels([read_record(run.save().folder)])[0], "validation: nan at")
    assert values == pytest.approx([4.0, math.nan, math.nan], nan_ok=True)


def test_a_picture_is_a_png_or_an_svg(run: Logged) -> None:
    record = read_record(run.folder)
    with themed(LIGHT):
        png, svg, again = (image(all_panels([record], "tokens", "auto", LIGHT), kind) for kind in ("png", "svg", "svg"))
    assert svg == again
    assert Image.open(io.BytesIO(png)).size == (2 * 5.6 * 150, 4.0 * 150)
    texts = [text for text in ElementTree.fromstring(svg).itertext() if text.strip()]
    assert "OpenAI's GPT-2 124M: 29.45%" in texts


def test_the_dark_picture_is_the_light_one_in_other_colours(run: Logged) -> None:
    record, svgs = read_record(run.folder), {}
    for theme in (LIGHT, DARK):
        with themed(theme):
            figure, axes = figures.one_panel()
            figures.draw_losses(axes, theme, [record], "tokens", "auto")
            svgs[theme] = image(figure, "svg")
    colours = [set(re.findall(rb"#[0-9a-f]{6}\b", svg)) for svg in (in_dark(svgs[LIGHT]), svgs[DARK])]
    assert colours[0] == colours[1]
    assert LIGHT.paper.encode() not in colours[0]


def test_numbers_are_written_as_people_write_them() -> None:
    assert [amount(x) for x in (0, 640, 1280, 999_999, 20e6, 9_999_745_024, 3e11, 2.5e12)] == [
        "0", "640", "1.28k", "1M", "20M", "10B", "300B", "2.5T",
    ]  # fmt: skip
    assert [power(x) for x in (0, 8.552e18, 1e23)] == ["0", "8.55e18", "1e23"]
    assert [score(x) for x in (0.2945, 1.0, 35.13, math.nan)] == ["29.45%", "100.00%", "35.13", "unknown"]
