"""Passes, held-out text and sources given twice are said or refused before a run, by source."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.config import Config, DataConfig, SourceConfig
from megagpt.config_file import load_config
from megagpt.data.builtin import builtin_folder, prepare_builtin
from megagpt.data.loader import open_corpus, validation_corpus, validation_sequences
from megagpt.data.located import locate
from megagpt.data.mixture import describe
from megagpt.data.order import interleave
from megagpt.world import World
from tests.conftest import Refusal, Tiny, metrics, write_tiny
from tests.data.folders import write_bin

SHORT = {
    "train": {"tokens": 256}, "schedule": {"warmup_tokens": 0}, "sampling": {"samples": 0},
}  # fmt: skip


def write_source(folder: Path, train: int, val: int, first: int = 0) -> Path:
    folder.mkdir()
    write_bin(folder / "x_train_0.bin", np.arange(first, first + train))
    if val:
        write_bin(folder / "x_val_0.bin", np.arange(val))
    return folder


def lines_of(config: Config) -> list[str]:
    corpora = (open_corpus(config.data, split, config.model.context, 0) for split in ("train", "val"))
    return list(describe(config, *corpora))


def mixture_of(tmp_path: Path, *sources: tuple[Path, float], **sections: object) -> Config:
    data = {"sources": [{"path": str(path), "weight": weight} for path, weight in sources]}
    return load_config(str(write_tiny(tmp_path, sources[0][0], data=data, **sections)))


# --- passes ---


def test_passes_are_those_of_the_order(tmp_path: Path) -> None:
    """Counted sequence by sequence."""
    sizes, weights = (3000, 401, 97), (0.5, 0.3, 0.2)
    folders = [write_source(tmp_path / f"s{i}", size, 0, 9000 * i) for i, size in enumerate(sizes)]
    config = mixture_of(
        tmp_path, *zip(folders, weights, strict=True), train={"tokens": 32 * 1000, "batch_tokens": 128},
        validation={"tokens": 0}, schedule={"decay_end_tokens": 32 * 1000},
    )  # fmt: skip
    source, _ = interleave(np.arange(1000), [5, 3, 2])
    for line, folder, size, weight, taken in zip(
        lines_of(config), folders, sizes, weights, np.bincount(source), strict=True
    ):
        start, passes = line.split(" of the batches, ")
        assert start == f"{folder}: {weight:.1%}"
        assert passes.startswith(f"{taken / ((size - 1) // 32):,.2f} passes over {size:,} tokens; 0 more")


def test_config_and_train_say_the_passes(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_source(tmp_path / "s", 321, 100)
    config = str(tiny(data={"sources": [{"path": str(folder)}]}, **SHORT))
    expected = f"{folder}: 0.80 passes over 321 tokens; 100 more are held out"
    assert main(["config", config]) == 0
    assert f"# {expected}\n" in capsys.readouterr().out
    assert main(["train", config]) == 0
    assert f"{expected}\n" in capsys.readouterr().out
    assert main(["config", config, "data.sources=[{path: nowhere}, {path: stdlib}]", f"data.cache={tmp_path}"]) == 0
    assert "# not prepared here: nowhere, stdlib; " in capsys.readouterr().out


def test_a_path_to_a_file_is_refused_with_its_folder(tmp_path: Path, tiny: Tiny, refusal: Refusal) -> None:
    file = write_source(tmp_path / "s", 321, 100) / "x_train_0.bin"
    for command in ("config", "train"):
        refusal([command, str(tiny()), f"data.sources=[{{path: {file}}}]"], f"{file}: is a file", f": {file.parent}\n")
    assert main(["config", str(tiny()), f"data.sources=[{{path: {file.parent}}}]"]) == 0


def test_a_folder_in_preparation_is_not_here_yet(tmp_path: Path, tiny: Tiny, refusal: Refusal) -> None:
    (tmp_path / "journal.json").touch()
    refusal(["train", str(tiny()), f"data.sources=[{{path: {tmp_path}}}]"], "its preparation is not finished")
    assert main(["config", str(tiny()), f"data.sources=[{{path: {tmp_path}}}]"]) == 0


# --- held-out text ---


def test_a_source_without_held_out_text_leaves_validation_on(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The validation set is that of the other source alone."""
    none = write_source(tmp_path / "none", 200, 0)
    found = []
    for sources in ([corpus], [corpus, none]):
        data = {"sources": [{"path": str(p), "weight": w} for p, w in zip(sources, (999, 1), strict=False)]}
        config = write_tiny(tmp_path, corpus, data=data, **SHORT)
        loaded = load_config(str(config))
        held_out = validation_corpus(open_corpus(loaded.data, "val", 32, loaded.run.seed))
        found.append(held_out.rows(np.arange(validation_sequences(held_out, loaded.validation.tokens))))
    alone, mixture = found
    assert alone.shape == (20, 33)
    np.testing.assert_array_equal(mixture, alone)
    assert main(["train", str(config)]) == 0
    expected = f"validation leaves sources out: {none} holds out 0 tokens; at model.context 32, a source needs 65 "
    assert expected in capsys.readouterr().out
    assert len(metrics(tmp_path / "runs" / "tiny", "validation")) == 1


def test_no_validation_names_each_source_and_its_tokens(tmp_path: Path) -> None:
    none, short = write_source(tmp_path / "none", 200, 0), write_source(tmp_path / "short", 200, 32, 500)
    (line,) = lines_of(mixture_of(tmp_path, (none, 1), (short, 1)))[2:]
    found = f"{none} holds out 0 tokens, {short} holds out 32 tokens"
    assert line.startswith(f"no validation: {found}; at model.context 32, a source needs 65 ")
    (tmp_path / "short" / "x_val_0.bin").unlink()
    write_bin(tmp_path / "short" / "x_val_0.bin", np.arange(65))
    assert "no validation" not in str(lines_of(mixture_of(tmp_path, (none, 1), (short, 1))))


def test_a_source_that_limits_the_validation_set_is_named(tmp_path: Path) -> None:
    plenty, scarce = write_source(tmp_path / "plenty", 200, 9000), write_source(tmp_path / "scarce", 200, 321, 500)
    # 10 held-out sequences of one source, less one for rounding, are half of 18.
    lines = lines_of(mixture_of(tmp_path, (plenty, 1), (scarce, 1)))
    assert lines[2:] == [f"validation takes 576 tokens of validation.tokens 640: {scarce} holds out only 321"]
    assert len(lines_of(mixture_of(tmp_path, (plenty, 1), (scarce, 1), validation={"tokens": 576}))) == 2


@pytest.mark.parametrize("command", ["config", "train"])
def test_less_validation_than_a_sequence_is_refused(command: str, tiny: Tiny, refusal: Refusal) -> None:
    config = str(tiny(validation={"tokens": 31}))
    refusal([command, config], "validation.tokens 31", "model.context 32", "0 for no validation")
    assert main(["config", config, "validation.tokens=32"]) == 0
    assert main(["config", config, "validation.tokens=0"]) == 0


# --- given twice ---


def write_same_text(folder: Path, kind: str) -> str:
    """Another way to name the folder or its text."""
    other = folder.parent / "other"
    match kind:
        case "path":
            return str(folder)
        case "other path":
            return f"{folder.parent}/./nowhere/../{folder.name}/"
        case "link":
            other.symlink_to(folder)
        case "copy":
            shutil.copytree(folder, other)
        case "cut":
            other.mkdir()
            write_bin(other / "web_train_1.bin", np.arange(300))
            write_bin(other / "web_train_2.bin", np.arange(300, 1000))
        case "array":
            other.mkdir()
            np.save(other / "train.npy", np.arange(1000))
    return str(other)


@pytest.mark.parametrize("kind", ["path", "other path", "link", "copy", "cut", "array"])
def test_a_source_given_twice_is_refused(tmp_path: Path, kind: str, tiny: Tiny, refusal: Refusal) -> None:
    folder = write_source(tmp_path / "s", 1000, 100)
    third = write_source(tmp_path / "third", 1000, 100, 5000)
    other = write_same_text(folder, kind)
    sources = [{"path": str(folder), "weight": 0.5}, {"path": str(third)}, {"path": other}]
    for command in ("config", "train"):
        message = refusal([command, str(tiny(data={"sources": sources}))], str(folder), other, "sum of the weights")
        assert str(third) not in message
    sources = [{"path": str(folder), "weight": 1.5}, {"path": str(third)}]
    assert main(["train", str(tiny(data={"sources": sources}, **SHORT))]) == 0


def test_equal_names_and_sizes_are_not_the_same_text(tmp_path: Path) -> None:
    """All full shards of llm.c have the same size, and most names."""
    one, other = write_source(tmp_path / "one", 1000, 0), write_source(tmp_path / "other", 1000, 0, 1)
    assert len(lines_of(mixture_of(tmp_path, (one, 1), (other, 1), validation={"tokens": 0}))) == 2


def test_absent_sources_given_twice_are_refused(refusal: Refusal, tmp_path: Path, tiny: Tiny) -> None:
    config = str(tiny(data={"sources": [{"path": "no/where"}, {"path": "./no/where/"}]}))
    refusal(["config", config], "no/where and ./no/where/ are the same folder")
    folder = builtin_folder(DataConfig(cache=str(tmp_path)))
    both = [f"data.cache={tmp_path}", f"data.sources=[{{path: stdlib}}, {{path: {folder}}}]"]
    refusal(["config", config, *both], f"{folder} are the same folder")


# --- other folders ---


@pytest.mark.slow
@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
def test_a_resume_elsewhere_finds_relative_sources_and_exams(
    moved: bool, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if the run was moved together with its data."""
    start, here = tmp_path / "start", tmp_path / "here"
    for folder in (start, here):
        folder.mkdir()
    shutil.copytree(corpus, start / "text" / "shards")
    (start / "text" / "lambada.jsonl").write_text('{"text": "a cat ran"}')
    (start / "book.txt").write_text("A cat ran.")
    config = write_tiny(
        start, corpus, run={"folder": "runs"}, data={"sources": [{"path": "text/shards"}]},
        evaluation={"tasks": ["lambada", "text:book.txt"], "data": "text"}, **SHORT,
    )  # fmt: skip
    monkeypatch.chdir(start)
    assert main(["train", str(config)]) == 0
    if moved:
        start = start.rename(tmp_path / "moved")
    monkeypatch.chdir(here)
    run = start / "runs" / "tiny"
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "train.tokens=512"]) == 0
    assert f"text/shards: not in {here}; taken from {start}, where the run was started" in capsys.readouterr().out
    assert len(metrics(run)) == 4
    assert [set(line["exams"]) for line in metrics(run, "exam")] == [{"lambada", "text:book.txt"}] * 2
    assert load_config(str(run / "config.yaml")).data.sources[0].path == "text/shards"


@pytest.mark.slow
def test_relative_sources_that_are_nowhere_name_the_folders(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    start = tmp_path / "start"
    shutil.copytree(corpus, start / "shards")
    runs = {"folder": str(tmp_path / "elsewhere" / "runs")}
    other = write_source(tmp_path / "another one", 200, 100)
    sources = [{"path": "shards", "weight": 3.0}, {"path": str(other), "weight": 2.0}]
    config = write_tiny(start, corpus, run=runs, data={"sources": sources}, **SHORT)
    refusal(["train", str(config)], f"shards: no such folder in {Path.cwd()}", "megagpt data prepare")
    monkeypatch.chdir(start)
    assert main(["train", str(config)]) == 0
    (start / "shards").rename(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    resume = ["train", "--resume", f"{runs['folder']}/tiny", "train.tokens=512"]
    message = refusal(resume, f"shards: no such folder in {tmp_path}", str(start), "data.sources=")
    (way,) = shlex.split(message.partition("name its place: ")[2])
    assert main([*resume, way.replace("FOLDER", str(tmp_path / "gone"))]) == 0
    saved = load_config(str(tmp_path / "elsewhere" / "runs" / "tiny" / "config.yaml")).data.sources
    assert saved == (SourceConfig(str(tmp_path / "gone"), 3.0), SourceConfig(str(other), 2.0))


def test_the_built_in_corpus_is_found_where_the_run_was_started(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig((SourceConfig("stdlib"),))
    prepared = tmp_path / "start" / builtin_folder(data)
    shutil.copytree(corpus, prepared)
    monkeypatch.chdir(tmp_path)
    found = prepare_builtin(locate(data, [tmp_path / "no", tmp_path / "start"]), World.alone())
    assert json.dumps([s.path for s in found.sources]) == json.dumps([str(prepared)])
