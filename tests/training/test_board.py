"""TensorBoard shows each point of a run once, the losses in one chart, and texts as they are."""

import errno
import json
import math
import os
import shutil
import signal
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.summary.writer.record_writer import RecordWriter

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from megagpt.engines.clock import StepTimes
from megagpt.engines.engine import Engine
from megagpt.errors import ExitCode, UserError
from megagpt.position import Position
from megagpt.run_log import Event, RunLog
from megagpt.training import loop, reporter
from megagpt.training.markdown import samples_as_markdown, table, verbatim
from megagpt.training.reporter import Reporter
from megagpt.training.stragglers import Comparison
from tests.conftest import Refusal, Tiny, metrics
from tests.runs import charts

FOLDERS = ["", "train", "validation"]


def board_folders(run: Path) -> list[str]:
    """The folders that TensorBoard lists as runs."""
    return sorted({str(path.parent.relative_to(run)).removeprefix(".") for path in run.rglob("*tfevents*")})


@pytest.mark.slow
def test_a_kill_and_a_stop_leave_each_point_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = {"every_tokens": 640}
    config = str(tiny(validation=every, sampling=every, checkpoint={"every_tokens": 640, "keep_last": 9}))
    run, step, calls = tmp_path / "runs" / "tiny", Engine.train_step, [0]

    def stopped(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] in (12, 20):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(Engine, "train_step", stopped)
    assert main(["train", config]) == ExitCode.STOPPED
    # As a kill leaves it, with events far beyond the last checkpoint.
    for checkpoint in list_checkpoints(run):
        if checkpoint.tokens > 640:
            shutil.rmtree(checkpoint.path)
    assert main(["train", "--resume", str(run)]) == ExitCode.STOPPED
    assert main(["train", "--resume", str(run)]) == 0

    assert board_folders(run) == FOLDERS
    for folder in FOLDERS:
        for tag, points in charts(run / folder).items():
            at = [step for step, _ in points]
            assert at == sorted(set(at)), f"{folder}: {tag}"
    steps, validations = metrics(run), metrics(run, "validation")
    expected = {
        ("", "loss/loss"): [(line["step"], line["loss"]) for line in steps],
        ("", "loss/validation_loss"): [(line["step"], line["validation_loss"]) for line in validations],
        ("train", "loss/by_tokens"): [(line["tokens_seen"], line["loss"]) for line in steps],
        ("validation", "loss/by_tokens"): [(line["tokens_seen"], line["validation_loss"]) for line in validations],
    }
    assert [len(points) for points in expected.values()] == [20, 4, 20, 4]
    for (folder, tag), points in expected.items():
        assert dict(charts(run / folder)[tag]) == pytest.approx(dict(points)), f"{folder}: {tag}"
    found = charts(run)
    assert found["totals/tokens_seen"] == [(line["step"], line["tokens_seen"]) for line in steps]
    assert [step for step, _ in found["system/save_seconds"]] == [line["step"] for line in metrics(run, "checkpoint")]
    assert found["totals/incarnation"] == [(6, 2), (14, 3)]
    panels = list(dict.fromkeys(tag.partition("/")[0] for tag in sorted(found)))
    assert panels == ["loss", "mfu_and_speed", "optimizer", "system", "totals"]


def test_a_run_without_validation_has_no_folder_for_it(tiny: Tiny, tmp_path: Path) -> None:
    assert main(["train", str(tiny(validation={"tokens": 0}, train={"tokens": 256}))]) == 0
    assert board_folders(tmp_path / "runs" / "tiny") == ["", "train"]


def test_a_kill_behind_a_validation_leaves_its_point(tmp_path: Path) -> None:
    """The run log has it, so a resume does not validate again at these tokens."""
    reporter = Reporter(tmp_path, Position(0, 0, 32, 80), 2560, resumed=False, is_main=True)
    reporter.event(Event.VALIDATION, Position(20, 5, 32, 80), {"validation_loss": 3.5})
    assert charts(tmp_path) == {"loss/validation_loss": [(5, 3.5)]}
    assert charts(tmp_path / "validation") == {"loss/by_tokens": [(640, 3.5)]}
    reporter.close()


def test_a_score_is_charted_as_an_exam_and_its_parts_are_not(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, Position(0, 0, 32, 80), 2560, resumed=False, is_main=True)
    scores = {"text:my": {"value": 3.5, "items": 7}, "text:my_items": {"value": math.inf, "standard_error": math.nan}}
    reporter.event(Event.EXAM, Position(20, 5, 32, 80), {"exams": scores})
    reporter.close()
    assert charts(tmp_path) == {"exams/text:my": [(5, 3.5)], "exams/text:my_items": [(5, math.inf)]}
    (line,) = metrics(tmp_path, "exam")
    assert line["exams"] == {"text:my": scores["text:my"], "text:my_items": {"value": "inf", "standard_error": "nan"}}


NUMBERS = {"loss": 3.0, "lr": 1e-3, "gradient_norm": 0.5, "tokens_per_second": 10.0, "mfu": None}


@pytest.mark.parametrize("writes", ["write_step", "event", "text", "flush", "close"])
def test_a_steps_line_is_written_by_whatever_comes_next(writes: str, tmp_path: Path) -> None:
    """Before what comes next: the log is in the order of the run."""
    reporter, at = (
        Reporter(tmp_path, Position(0, 0, 32, 80), 2560, resumed=False, is_main=True),
        Position(20, 5, 32, 80),
    )
    reporter.step(at, NUMBERS)
    assert not metrics(tmp_path)
    calls: dict[str, tuple[Any, ...]] = {"event": (Event.STOPPED, at, {"reason": "test"}), "text": (at, "samples", "x")}
    getattr(reporter, writes)(*calls.get(writes, ()))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["step", *(["stopped"] if writes == "event" else [])]
    if writes != "close":
        reporter.close()
    assert len(metrics(tmp_path)) == 1


def test_a_displaced_run_leaves_its_last_line_out(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, Position(0, 0, 32, 80), 2560, resumed=False, is_main=True)
    reporter.step(Position(20, 5, 32, 80), NUMBERS)
    reporter.forget_step()
    reporter.close()
    assert not metrics(tmp_path)


def test_a_disk_that_is_full_at_the_end_closes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = threading.excepthook
    reporter = Reporter(tmp_path, Position(0, 0, 32, 80), 2560, resumed=False, is_main=True)
    reporter.step(Position(20, 5, 32, 80), NUMBERS)
    monkeypatch.setattr(RunLog, "append", MagicMock(side_effect=UserError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        reporter.close()
    assert threading.excepthook == hook


def test_a_full_disk_ends_the_run_with_one_line(tiny: Tiny, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = RecordWriter.write, [0]

    def fills_up(self: RecordWriter, data: bytes) -> None:
        written[0] += 1
        if written[0] > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fills_up)
    refusal(["train", str(tiny())], "metrics cannot be written: disk full")


def test_a_log_that_cannot_be_begun_is_an_expected_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook, start = threading.excepthook, Position(0, 0, 32, 80)
    with monkeypatch.context() as patch:
        patch.setattr(reporter, "Board", MagicMock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError, match="metrics cannot be written: disk full"):
            Reporter(tmp_path, start, 2560, resumed=False, is_main=True)
    assert threading.excepthook == hook
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics cannot be written: IsADirectoryError"):
        Reporter(tmp_path, start, 2560, resumed=True, is_main=True)


def test_stragglers_of_one_comparison_are_one_text() -> None:
    """Of several texts with one name at one step, TensorBoard keeps the last."""
    run, at = MagicMock(), Position(20, 5, 32, 80)
    run.stragglers.add.return_value = Comparison(1, 2, 3, 0, 0, ["rank 1 is slow", "rank 3 is slow"])
    loop._compare_ranks(run, at, 1, 0, StepTimes(1, 0))
    assert run.reporter.text.call_args_list == [call(at, "stragglers", "<p>rank 1 is slow&#10;rank 3 is slow</p>")]
    assert run.reporter.event.call_count == 3


# --- texts ---


class Shown(HTMLParser):
    """The texts of a page's elements, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts, self._open = list[tuple[str, str]](), list[str]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self._open.append(tag)
        self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            tag, text = self.texts[-1]
            self.texts[-1] = (tag, text + data)


def shown(markdown: str, *elements: str) -> list[str]:
    """The texts of these elements, on the page that TensorBoard makes of it."""
    return [text for element, text in Shown(markdown_to_safe_html(markdown)).texts if element in elements]


# Control characters are shown as question marks.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t")
TEXT = st.text(CHARACTERS | st.sampled_from("`~*_#<>&|\\ \n"))


@given(prompt=TEXT, texts=st.lists(TEXT, min_size=1, max_size=3))
@example(prompt="Once", texts=[" upon\n\n```\na\n```\n# time\n\n* <b>a</b> &amp; _b_"])
@example(prompt="    code", texts=["\n---\n| a | b |\n|---|---|\n| 1 | 2 |"])
@example(prompt="<p>", texts=["</p>\n\n</div><!-- <script>alert(1)</script>", "[a](b)\n\n[b]: c\n~~~\n&#10;"])
def test_samples_are_shown_as_they_are(prompt: str, texts: list[str]) -> None:
    assert shown(samples_as_markdown(prompt, texts), "p")[1::2] == [prompt, *texts]


@given(st.dictionaries(TEXT, TEXT, min_size=1, max_size=3), TEXT)
def test_tables_and_configs_are_shown_as_they_are(rows: dict[str, str], text: str) -> None:
    markdown = verbatim(text, "pre") + "\n\n" + table(rows)
    assert shown(markdown, "pre", "td") == [text, *(cell for row in rows.items() for cell in row)]
