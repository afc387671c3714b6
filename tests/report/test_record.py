"""A run's log as columns of numbers."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.report.page import page
from megagpt.report.record import binned, number, read_record, some
from megagpt.training.status import read_status, status_lines
from tests.report.logged import STEP_TOKENS, Logged

OLD = Path(__file__).parent.parent / "data" / "old_run"


def test_every_quantity_is_read_from_its_event(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    run.steps(4)
    run.validation(2, 3.5)
    run.validation(4, "nan")
    run.exam(4, "hellaswag", 0.29, 0.0045)
    run.exam(4, "hellaswag:harness", 0.31)
    run.write("samples", 4, samples=["Hello, world", 5, None])
    run.write("straggler", 4, text="rank 3 is slow")
    record = read_record(run.save().folder)
    assert record.tokens.tolist() == [n * STEP_TOKENS for n in (1, 2, 3, 4)]
    assert record.steps["loss"].tolist() == [3 + 8 / n for n in (1, 2, 3, 4)]
    assert record.validation.tokens == [2 * STEP_TOKENS, 4 * STEP_TOKENS]
    assert record.validation.values == pytest.approx([3.5, math.nan], nan_ok=True)
    assert list(record.exams) == ["hellaswag", "hellaswag:harness"]
    scores = record.exams["hellaswag"]
    assert (scores.values, scores.errors, scores.items) == ([0.29], [0.0045], [10_042])
    assert math.isnan(record.exams["hellaswag:harness"].errors[0])
    assert record.samples == [(4 * STEP_TOKENS, ["Hello, world"])]
    assert [line["event"] for line in record.notable] == ["straggler"]
    assert not record.is_empty


def test_a_tasks_name_may_end_like_a_part_of_a_score(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    for task in ("text:my_items", "text:my_stderr"):
        run.exam_of_before(1, task, 3.5, 0.25, 7)
    both = {"text:my": {"value": 2.0, "items": 5}, "text:my_items": {"value": 3.0, "odd": 1}, "x": 3}
    run.write("exam", 2, exams=both)
    exams = read_record(run.save().folder).exams
    assert list(exams) == ["text:my_items", "text:my_stderr", "text:my"]
    assert (exams["text:my_stderr"].values, exams["text:my_stderr"].errors) == ([3.5], [0.25])
    assert (exams["text:my_items"].values, exams["text:my_items"].items) == ([3.5, 3.0], [7, None])
    assert (exams["text:my"].values, exams["text:my"].items) == ([2.0], [5])


def test_lines_with_odd_values_are_read_around(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    run.steps(2)
    run.write("step", 3, loss="inf", tokens_per_second=None, mfu=[1], peak_memory_bytes=True)
    run.lines.append({"event": "step", "step": 4, "tokens_seen": "many"})
    run.lines.append({"event": [], "step": 4, "tokens_seen": 0})
    run.write("validation", 3)
    run.write("samples", 3, samples="no list")
    run.incarnation(1, 0)
    run.save()
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "tok')  # cut off by a crash
    record = read_record(run.folder)
    assert len(record.tokens) == 3
    assert record.steps["loss"][2] == math.inf
    assert all(math.isnan(record.steps[name][2]) for name in ("tokens_per_second", "mfu", "peak_memory_bytes"))
    assert record.samples == [(3 * STEP_TOKENS, [])]
    assert "trained on 1.57M tokens" in page(record, "tokens", "auto", 1.0)
    status = read_status(run.folder, run.config)
    assert (status.tokens_seen, status.loss, status.validation_loss) == (3 * STEP_TOKENS, "inf", None)
    assert status.tokens_per_second == STEP_TOKENS / 0.25
    assert "step 3, loss inf" in "\n".join(status_lines(status))


def test_a_run_of_version_0_1_is_read(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    record = read_record(tmp_path / "old")
    assert len(record.tokens) == 10
    assert record.validation.tokens == [640]
    assert record.training_seconds[-1] == pytest.approx(np.sum(record.steps["step_seconds"]), rel=1e-6)


def test_the_axes_are_tokens_flops_and_hours(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    run.steps(100, seconds=36.0)  # 0.01 h
    run.steps(200, seconds=72.0, first=101)
    record = read_record(run.save().folder)
    places = np.array([0, 50, 100, 150, 200]) * STEP_TOKENS
    assert record.along("tokens", places).tolist() == places.tolist()
    assert record.along("hours", places) == pytest.approx([0, 0.5, 1, 2, 3])
    per_token = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert record.along("flops", places) == pytest.approx(places * float(per_token))


def test_hours_count_steps_that_were_not_logged(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run", f"log.every_tokens={10 * STEP_TOKENS}")
    for step in range(10, 101, 10):
        run.steps(step, seconds=36.0, first=step)
    record = read_record(run.save().folder)
    assert record.training_seconds[-1] == pytest.approx(3600)


values = st.floats(-10, 10) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.lists(values, max_size=300), st.integers(1, 50))
def test_bins_keep_the_mean_the_range_and_the_end(numbers: list[float], most: int) -> None:
    found = binned(np.arange(len(numbers), dtype=np.float64), np.array(numbers, dtype=np.float64), most)
    assert len(found.mean) == min(most, len(numbers))
    begin = 0
    for i, last in enumerate(found.tokens):
        part = [x for x in numbers[begin : int(last) + 1] if math.isfinite(x)]
        expected = [sum(part) / len(part), min(part), max(part)] if part else [math.nan] * 3
        assert [found.mean[i], found.low[i], found.high[i]] == pytest.approx(expected, nan_ok=True, abs=1e-9)
        begin = int(last) + 1
    assert begin == len(numbers)


@given(st.integers(0, 1000), st.integers(2, 50))
def test_some_are_spread_from_the_first_to_the_last(count: int, most: int) -> None:
    found = some(range(count), most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found))
    if count:
        assert (found[0], found[-1]) == (0, count - 1)


@pytest.mark.parametrize("value", [None, True, [], {}, "text", ""])
def test_values_that_are_no_numbers_are_nan(value: object) -> None:
    assert math.isnan(number(value))


def test_a_long_log_is_read_in_columns(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run", "train.tokens=1e12")
    line = '{"event": "step", "step": 1, "tokens_seen": %d, "loss": %d, "tokens_per_second": 1e6}\n'
    count = 50_000
    text = "".join(line % (i * STEP_TOKENS, i % 7) for i in range(1, count + 1))
    (run.folder / "metrics.jsonl").write_text(text)
    record = read_record(run.folder)
    assert len(record.tokens) == count
    found = binned(record.tokens, record.steps["loss"])
    assert len(found.mean) == 400
    assert found.mean == pytest.approx(3, abs=0.1)
    assert (found.low.min(), found.high.max()) == (0, 6)
    assert found.tokens[-1] == count * STEP_TOKENS
