"""The page of a run, read as a browser reads it."""

import base64
import html.parser
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import main, make_parser
from megagpt.commands.options import parse
from megagpt.incarnations import list_incarnations
from megagpt.report.facts import visible
from megagpt.report.history import read_history
from megagpt.report.page import page
from megagpt.report.record import read_record
from megagpt.training.status import read_status
from tests.conftest import Tiny
from tests.processes import megagpt, start_train
from tests.report.logged import H100, STEP_TOKENS, Logged
from tests.report.test_record import OLD
from tests.runs import wait_for_steps

VOID = {"meta", "source", "img", "br"}


class Page(html.parser.HTMLParser):
    """Its texts by element, its attributes, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def of(self, tag: str) -> list[str]:
        return self.texts.get(tag, [])

    @property
    def text(self) -> str:
        return " ".join(self.of("body")[0].split())


def shown(folder: Path, wanted: str = "auto", price: float | None = None) -> Page:
    return Page(page(read_record(folder), "tokens", wanted, price))


@pytest.fixture
def run(tmp_path: Path) -> Logged:
    run = Logged(tmp_path, "first", "data.sources=[{path: data/fineweb_10bt}]", "train.tokens=524_288_000")
    run.steps(1000)
    run.validation(1000, 3.2531)
    run.exam(1000, "hellaswag", 0.2975, 0.0046, score="mean_token")
    run.exam(1000, "winogrande", 0.52, 0.014, 1267)
    texts = [{"folder": "data/fineweb_10bt", "text": "HuggingFaceFW/fineweb, sample-10BT", "tokens": 10_300_000_000}]
    run.incarnation(1, 0, 1, "stopped", "SIGTERM", texts=texts)
    run.incarnation(2, 2, 4, "finished", "the last token", texts=texts)
    return run.save()


def test_it_says_what_was_trained_on_what_where_and_at_what_cost(run: Logged) -> None:
    found = shown(run.folder, price=2.0)
    assert found.of("h1") == ["first"]
    model = "A GPT of 124,439,808 parameters (gpt2-124m, 12 layers, width 768, 12 heads, context 1,024)"
    assert f"{model}, trained on 524M tokens of HuggingFaceFW/fineweb, sample-10BT." in found.text
    assert f"It ran on 8 x {H100}." in found.text
    assert "finished on 2026-11-20" in found.text
    for fact in ("3.2531", "29.75%", "24.0", "$48.00", "3:00:00", "4.48e17"):
        assert fact in found.of("b") or f"0{fact}" in found.of("b"), fact
    assert f"8 x {H100} on n1" in found.text
    assert "stopped: SIGTERM" in found.text
    assert "The run was started 2 times" in found.text


def test_exams_are_beside_the_references(run: Logged) -> None:
    rows = [" ".join(text.split()) for text in shown(run.folder).of("tr")]
    how, beside = "hellaswag mean_token, 0-shot", "GPT-2 124M: 29.45% GPT-3 125M: 33.70% (other text)"
    assert f"{how} 29.75% ± 0.46% 10,042 524M {beside}" in rows
    assert "winogrande 0-shot 52.00% ± 1.40% 1,267 524M GPT-3 125M: 52.00% (unsure)" in rows
    assert any(row.startswith("loss GPT-2 124M 3.4250") and "llm.c, dev/vislog.ipynb" in row for row in rows)
    run.exam(1001, "hellaswag", 0.2975, 0.0046, score="mean_token", published=False)
    rows = [" ".join(text.split()) for text in shown(run.save().folder).of("tr")]
    beside = beside.replace("29.45%", "29.45% (other text)")
    assert f"{how}, not the published text 29.75% ± 0.46% 10,042 525M {beside}" in rows


@pytest.mark.slow
def test_the_plan_is_shown_against_the_outcome(run: Logged) -> None:
    """After 1,000 steps of 0.25 s; of an unknown card memory only; of a run that has not ended, the time so far."""
    assert "Plan against outcome" not in shown(run.folder).text
    speeds = {"predicted_tokens_per_second": 2e6, "predicted_tokens_per_second_low": 1.8e6}
    speeds |= {"predicted_tokens_per_second_high": 2.2e6, "measured_tokens_per_second": 2.1e6}
    memory = {"predicted_memory_bytes": 40e9, "measured_memory_bytes": 41e9}
    run.write("plan", 10, predicted_memory_bytes=1e9, measured_memory_bytes=1e9)
    run.write("plan", 1000, **memory, **speeds, predicted_run_seconds=300.0)
    rows = [" ".join(text.split()) for text in shown(run.save().folder).of("tr")]
    assert "peak memory of a rank (GB) 40.0 41.0 +2.5%" in rows
    assert "tokens per second 2,000,000 (1,800,000 to 2,200,000) 2,100,000 +5.0%" in rows
    assert "days of all steps 0.00347 0.00289 -16.7%" in rows
    run.write("plan", 1000, **memory, **dict.fromkeys(speeds), predicted_run_seconds=None)
    rows = [" ".join(text.split()) for text in shown(run.save().folder).of("tr")]
    assert "peak memory of a rank (GB) 40.0 41.0 +2.5%" in rows
    assert not [row for row in rows if row.startswith(("tokens per second 2", "days"))]
    half = "train.tokens=1_048_576_000"
    longer = Logged(run.folder.parent, "longer", half)
    longer.steps(1000)
    longer.write("plan", 1000, **memory, **speeds, predicted_run_seconds=86_400.0)
    assert "days of all steps 1 04:10 for the first 50.0% of the tokens" in shown(longer.save().folder).text


@pytest.mark.slow
def test_the_source_of_the_reference_curve_is_told_if_it_is_drawn(run: Logged, tmp_path: Path) -> None:
    assert "records/track_1_short/2024-10-13_llmc" in shown(run.folder).text
    larger = Logged(tmp_path, "larger", "model.preset=gpt2-355m", "data.sources=[{path: data/fineweb_10bt}]")
    larger.steps(10)
    text = shown(larger.save().folder).text
    assert "The grey curve" not in text
    assert "3.0831" in text


def test_it_needs_no_network_and_no_script(run: Logged) -> None:
    found = shown(run.folder)
    assert "script" not in found.texts
    links = [
        (tag, value) for tag, name, value in found.attributes if name in ("src", "srcset", "href", "action", "data")
    ]
    assert {tag for tag, _ in links} == {"img", "source"}
    for _, value in links:
        kind, _, data = value.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)
    assert not [value for _, name, value in found.attributes if name.startswith("on")]
    assert "url(" not in found.of("style")[0]
    pictures = [value for tag, name, value in found.attributes if (tag, name) == ("img", "alt")]
    assert pictures[0] == "Loss against tokens, with reference lines. The last validation loss is 3.2531."


def test_odd_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    prompt = "Hello, I'm a language model,"
    texts = [
        "<script>alert(1)</script></blockquote></body> &amp; {{ name }} {% raw %}", "Donau" * 200,
        "\x00\x1b[31m\u202eesrever\ud83d", "tab\t\n  indented 中文 👩‍🔬",
    ]  # fmt: skip
    run = Logged(tmp_path, "<b>x", f"sampling.prompt={prompt}")
    run.steps(2)
    run.write("samples", 2, samples=[prompt + text for text in texts])
    run.incarnation(1, 0, 1, "failed", "<i>rank 3</i>")
    found = shown(run.save().folder)
    assert found.of("blockquote") == [
        prompt + texts[0], prompt + texts[1], prompt + "\\x00\\x1b[31m\\u202eesrever\\ud83d", prompt + texts[3],
    ]  # fmt: skip
    assert found.of("h1") == ["<b>x"]
    assert "failed: <i>rank 3</i>" in found.text
    assert "script" not in found.texts
    assert "i" not in found.texts


def test_visible_text_keeps_what_can_be_seen() -> None:
    assert visible("tab\tline\r\nend é 中文 👩\u200d🔬\xa0") == "tab\tline\nend é 中文 👩\u200d🔬\xa0"
    assert visible("\x07\x7f\x85\u2066a\u2069\udc80") == "\\x07\\x7f\\x85\\u2066a\\u2069\\udc80"
    assert visible(7) == 7


def test_samples_over_time_are_spread_over_the_run(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run", "sampling.prompt=One")
    for step in range(1, 102):
        run.write("samples", step, samples=[f"One{step}"] * 9)
    headings = shown(run.save().folder).of("h3")
    assert headings == [f"after {text} tokens" for text in ("524k", "13.6M", "26.7M", "39.8M", "53M")]
    found = shown(run.folder)
    assert found.of("blockquote")[:8] == ["One1"] * 8
    assert "and 1 more" in found.text


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    found = shown(Logged(tmp_path, "empty").folder)
    for sentence in (
        "to be trained on data/fineweb_edu_10bt.", "The run has logged no step yet.", "no record of its starts",
        "No checkpoint is complete yet.", "not begun; 0.0% of 10B tokens",
    ):  # fmt: skip
        assert sentence in found.text
    assert "img" not in found.texts


def test_a_run_of_version_0_1_has_a_page(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    found = shown(tmp_path / "old")
    assert "stopped (SIGTERM); 50.0% of 2.56k tokens" in found.text
    assert "1 x cpu on vm" in found.text
    assert "The newest checkpoint is that of 1.28k tokens." in found.text
    assert "megagpt export" in found.text


def test_a_banded_model_is_sampled_but_not_exported(tmp_path: Path) -> None:
    """transformers has no such GPT-2."""
    shutil.copytree(OLD, tmp_path / "old")
    config = tmp_path / "old" / "config.yaml"
    config.write_text(config.read_text().replace("attention: dense", "attention: banded"))
    found = shown(tmp_path / "old")
    assert "megagpt sample" in found.of("pre")[-1]
    assert "megagpt export" not in found.text
    record = read_record(tmp_path / "old")
    list_incarnations(record.folder)[-1].correct_end("finished", "the last token", 2560)
    commands = read_status(record.folder, record.config).next
    assert "sample with" in commands
    assert "export with" not in commands


def test_an_imported_run_names_its_first_weights(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    (run.folder / "imported.json").write_text('{"folder": "/models/gpt2", "imported": "2026-11-20T10:00:00+00:00"}')
    assert "Its first weights were those of /models/gpt2." in shown(run.folder).text
    cached = '{"hub": {"repo": "openai/gpt2", "commit": "607a"}, "folder": "/home/me/.cache/607a", "imported": ""}'
    (run.folder / "imported.json").write_text(cached)
    text = shown(run.folder).text
    assert "Its first weights were those of openai/gpt2 at commit 607a." in text
    assert ".cache" not in text


@pytest.mark.slow
def test_data_that_was_changed_is_told(tmp_path: Path) -> None:
    """Two of three steps were of other data."""
    run = Logged(tmp_path, "run", "data.sources=[{path: data/fineweb}]")
    run.steps(3)
    run.save()
    fineweb, books = ({"folder": f"data/{name}", "text": name, "tokens": 10**6} for name in ("fineweb", "books"))
    facts = {"data": {"b": 1.0}, "texts": [fineweb], "from_tokens": 2 * STEP_TOKENS}
    for text, changed in ((books, True), ({**fineweb, "text": "fineweb, sample-10BT"}, True), (None, False)):
        first = {"data": {"a": 1.0}, "texts": [text]} if text else {"data": {"b": 1}, "texts": [fineweb]}
        run.incarnation(1, 0, 1, "stopped", "SIGTERM", **first)
        run.incarnation(2, 1, 2, "stopped", "SIGTERM", **facts)
        found = shown(run.folder)
        assert ("trained on 1.57M tokens, not all of them of its last data, fineweb." in found.text) is changed
        assert ("These are the last data" in found.text) is changed
        (row,) = [row.split() for row in found.of("tr") if row.split()[:2] == ["fineweb", "data/fineweb"]]
        assert row[2:] == ["100.0%", "1M", "unknown" if changed else "1.57"]
        assert ("The reference losses are of classic FineWeb, because" in found.text) is (text is not books)
    assert "as was asked for with --references" in shown(run.folder, "fineweb-edu").text


def test_a_long_event_at_the_end_hides_no_step(tmp_path: Path) -> None:
    """`megagpt status` reads the end of the log only."""
    run = Logged(tmp_path, "run")
    run.steps(1000)
    run.write("samples", 1000, samples=["x" * 300_000])
    text = shown(run.save().folder).text
    assert "step 1,000" in text
    assert "5.2% of 10B tokens" in text


def test_a_price_without_gpus_is_said_to_have_no_effect(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    run.steps(10)
    run.incarnation(1, 0, 1, "finished", "the last token", device="cpu", world_size=2)
    run.incarnation(2, 1, 2, "finished", "the last token", device="cpu", world_size=4)
    text = shown(run.save().folder, price=2.0).text
    assert "It ran on 2 x cpu, then on 4 x cpu." in text
    assert "no GPU is on record" in text
    assert "GPU-hours" not in text


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    run.steps(1907)
    run.incarnation(1, 0)
    found = shown(run.save().folder, price=1.0)
    assert "10.0% of 10B tokens" in found.text
    assert "running, or killed: its process cannot be seen from this machine" in found.text


def test_steps_that_went_wrong_are_listed(tmp_path: Path) -> None:
    run = Logged(tmp_path, "run")
    run.steps(20)
    for step in range(1, 9):
        run.write("skipped", step, reason="the loss is nan", loss="nan")
    run.write("straggler", 9, text="rank 3 on n7 takes 1.5 times the median")
    run.write("went_back", 2, abandoned=[], command=None)
    items = shown(run.save().folder).of("li")
    assert items[0] == "skipped at 524k tokens: the loss is nan"
    assert items[5] == "and 3 more of this kind"
    slow = "straggler at 4.72M tokens: rank 3 on n7 takes 1.5 times the median"
    assert items[6:] == [slow, "went back at 1.05M tokens"]


@pytest.mark.slow
def test_the_model_is_loaded_as_the_page_says(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tiny(run={"name": "it's"}))]) == 0
    run = tmp_path / "runs" / "it's"
    assert main(["report", str(run)]) == 0
    sample, load = Page((run / "report.html").read_text()).of("pre")[-2:]
    name, *arguments = shlex.split(sample)
    assert (name, parse(make_parser(), arguments).model) == ("megagpt", str(run))
    assert main([*arguments, "--max-tokens", "2"]) == 0
    export, _, program = load.partition("\n")
    assert main(shlex.split(export)[1:]) == 0
    capsys.readouterr()
    program = program.partition("\n")[2].removesuffix("END").replace("max_new_tokens=32", "max_new_tokens=2")
    exec(program, {})
    assert capsys.readouterr().out.startswith("The meaning of life is")


@pytest.mark.slow
def test_a_killed_and_resumed_run_tells_each_start(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(train={"tokens": 128_000}, checkpoint={"every_tokens": 256}, validation={"tokens": 0})
    run = tmp_path / "runs" / "tiny"
    first = start_train([str(config)], tmp_path, tmp_path / "first.log")
    wait_for_steps(run, 5, [first])
    first.kill()
    first.wait()
    last = (run / "metrics.jsonl").stat().st_mtime
    done = megagpt("train", "--resume", str(run), "train.time_limit=1e-3", cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    second: dict[str, Any] = json.loads((run / "incarnations" / "000002.json").read_text())
    assert second["hosts"] == {second["host"]: 1}
    assert second["texts"][0]["text"] == "text.jsonl"
    killed, stopped = read_history(run, read_record(run))
    assert killed.ended is not None
    assert killed.ended.timestamp() == pytest.approx(last, abs=2)
    assert (killed.outcome, stopped.outcome) == ("killed", "stopped")
    rows = [row for row in shown(run).of("tr") if re.match(r"\s*[12]\s*\d{4}-", row)]
    assert "killed: it left no record of its end" in rows[0]
    assert "stopped: train.time_limit" in rows[1]
