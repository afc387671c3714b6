"""Options of `data prepare` that do not apply, and names that no source or folder can have, are refused in one line."""

import dataclasses
from pathlib import Path

import pytest

from megagpt.data.documents import Source
from megagpt.data.prepare import prepare
from megagpt.data.sources import open_source
from tests.conftest import Refusal, Tiny
from tests.data.preparation import error_of, write_corpus

LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["a.jsonl", "--revision", "abc"], "--revision: is for a data set on the hub as SOURCE; leave it out"),
        (["a.jsonl", "--subset", "big"], "--subset: is for a data set on the hub as SOURCE"),
        (["stdlib", "--split", "train"], "--split: is for a data set on the hub as SOURCE"),
        (["a.jsonl", "--val-split", "test"], "--val-split: is for a data set on the hub as --val"),
        (["a.jsonl", "--val", "v.jsonl", "--val-revision", "abc"], "--val-revision: is for a data set on the hub as"),
        (["stdlib", "--text-key", "body"], "--text-key: stdlib has no keys"),
        (["stdlib", "--val", "stdlib"], "--val stdlib: is the text to train on"),
        ([""], "SOURCE: is empty"),
        (["a.jsonl", "--val", ""], "--val: is empty"),
        (["a.jsonl", "--out", ""], "--out: is empty"),
        (["a/b", "--val", "a/b", "--val-split", ""], "--val-split: is empty"),
        (["~nobody-here/a.jsonl"], "~nobody-here/a.jsonl: ~nobody-here is no user's home folder"),
        (["a.jsonl", "--val", "~nobody-here"], "~nobody-here is no user's home folder"),
        (["a.jsonl", "--out", "~nobody-here"], "~nobody-here is no user's home folder"),
        ([LONG], "xxx...: the name is too long"),
        ([f"{LONG}*.jsonl"], "xxx...: the name is too long"),
        (["a.jsonl", "--val", LONG], "xxx...: the name is too long"),
        (["a.jsonl", "--out", LONG], "xxx...: the name is too long"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal, arguments: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "v.jsonl"):
        write_corpus(tmp_path / name, ["text"])
    refusal(["data", "prepare", "--out", "out", *arguments], part)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "part"), [("~nobody-here", "no user's home folder"), (LONG, "too long"), ("", "path is empty")]
)
def test_names_that_no_folder_has_are_refused(tiny: Tiny, refusal: Refusal, name: str, part: str) -> None:
    refusal(["data", "verify", name], part if name else "a name is empty")
    for command in ("config", "train"):
        refusal([command, str(tiny()), f"data.sources=[{{path: '{name}'}}]"], part)


@pytest.mark.parametrize(
    ("before", "now", "advice"),
    [
        (("a", "a"), ("b", "b"), "--revision a --val-revision a goes on"),
        (("a", "a"), ("b", "a"), "--revision a goes on"),
        (("a", "c"), ("a", "d"), "--val-revision c goes on"),
    ],
)
def test_the_commits_that_differ_are_named(
    tmp_path: Path, inline: None, before: tuple[str, str], now: tuple[str, str], advice: str
) -> None:
    source = open_source(str(write_corpus(tmp_path / "a.jsonl", ["some text"])))

    def at(commit: str, **settings: str) -> Source:
        return dataclasses.replace(source, identity={"hub": "a/b", "revision": commit} | settings)

    out = tmp_path / "out"
    prepare(at(before[0]), out, val=at(before[1]))
    message = error_of(lambda: prepare(at(now[0]), out, val=at(now[1])))
    assert f"has changed since; {advice}" in message
    other = at(before[1], hub="c/d", subset="big", text_key="body")
    message = error_of(lambda: prepare(at(before[0]), out, val=other))
    for part in ("--val was a/b, is c/d", "--subset was None, is big", "--text-key was None, is body"):
        assert part in message
