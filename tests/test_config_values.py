"""Config values are what was typed: read as meant, or refused by key; and what was written can be read."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import Config
from megagpt.config_file import build_config, load_config, override, to_yaml
from megagpt.config_yaml import dump, parse, parse_value, plain_value, value_text
from megagpt.errors import UserError
from tests.conftest import Refusal

MODEL = {"layers": 1, "width": 8, "heads": 1, "context": 8}
TINY = {"model": MODEL, "train": {"tokens": 10**6, "batch_tokens": 512}, "schedule": {"shape": "constant"}}


# Without lone surrogates, which UTF-8 cannot hold.
texts = st.text(st.characters(exclude_categories=["Cs"]))
paths = texts.filter(lambda text: "\0" not in text)
names = st.text(st.characters(categories=["L", "N", "P"], exclude_characters="/\\"), min_size=3, max_size=40)
places = paths.filter(bool)
sources = st.lists(st.fixed_dictionaries({"path": places, "weight": st.floats(1e-6, 1e15)}), min_size=1, max_size=3)
numbers = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config that a test may add lines to, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(json.dumps(TINY))
    Path("own.yaml").write_text("base: tiny.yaml\n")
    return "own.yaml"


def read(key: str, text: str) -> Any:
    """The value of a key after an override."""
    section, name = key.split(".")
    return getattr(getattr(load_config("gpt3_xl", [f"{key}={text}"]), section), name)


def read_file(lines: str) -> Config:
    Path("own.yaml").write_text(f"base: tiny.yaml\n{lines}")
    return load_config("own.yaml")


# --- overrides ---


@pytest.mark.parametrize(
    "text",
    [
        "Chapter 1 # The end", "# The end", "2024-05-01", "010", "0x10", "1_000", "1:30", "1e3", "1e400", ".inf", "nan",
        "yes", "no", "on", "off", "true", "~", "null", "", " ", " a ", "a: b", "[a, b]", "{a: b}", "- a", "*a", "&a",
        "!!int 1", "| a", "> a", "%TAG", "@", "`",
        "it's", "'tis", '"', 'say "hi"', "a=b", "C:\\new", "tab\there", "two\nlines",
        "Zürich 🤗", "\u2028", "\x85", "\ufeff",
    ],
)  # fmt: skip
def test_a_text_key_takes_the_text_as_typed(text: str) -> None:
    assert read("sampling.prompt", text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'a # b'", "a # b"),
        ('"a\\tb"', "a\tb"),
        ("'it''s'", "it's"),
        (' "010" ', "010"),
        ("''", ""),
        ("'a' b", "'a' b"),
    ],
)
def test_quotes_around_a_whole_text_are_not_part_of_it(text: str, value: str) -> None:
    assert read("sampling.prompt", text) == value


@given(texts)
def test_any_text_can_be_an_override(text: str) -> None:
    assert parse_value(value_text(text), str, "here") == text
    assert text.lstrip()[:1] in ("'", '"') or parse_value(text, str, "here") == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("1_000", 1000), ("1e3", 1000), ("1.5e3", 1500), ("+8", 8), (" 8 ", 8),
        ("9007199254740993e0", 2**53 + 1), ("1e0000000000000000000000", 1), ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_whole_numbers_are_decimal(text: str, value: int) -> None:
    assert read("train.micro_batch", text) == value


@pytest.mark.parametrize(
    "text",
    [
        "0x10", "0o10", "0b10", "1:30", "1e400", "1e30", "9223372036854775808", "1e-1", "8.0", ".inf", "nan", "yes",
        "~", "", "'8'", "8 # eight", "8 8", "8,", "[8]", "{a: 8}", "2024-05-01", "1,000", "-8", "\u0668x",
    ],
)  # fmt: skip
def test_what_is_no_whole_number_is_refused_by_key(text: str, refusal: Refusal) -> None:
    refusal(["config", "gpt3_xl", f"train.micro_batch={text}"], ": train.micro_batch")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E+1", 10.0),
        ("010", 10.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_0.5", 10.5),
        ("1e300", 1e300),
        ("7e-1", 0.7),
    ],
)
def test_numbers_are_decimal(text: str, value: float) -> None:
    assert read("optimizer.lr", text) == value


@pytest.mark.parametrize(
    "text", ["1e400", "-1e400", "1e-400", ".inf", "inf", "-.inf", ".nan", "nan", "0x1p3", "~", "1:30"]
)
def test_what_no_float_holds_is_refused_by_key(text: str, refusal: Refusal) -> None:
    refusal(["config", "gpt3_xl", f"optimizer.lr={text}"], ": optimizer.lr")


@pytest.mark.parametrize("text", [".inf", ".Inf", "inf", "+.inf"])
@pytest.mark.parametrize("key", ["clip_norm", "clip"])
def test_an_infinite_clip_norm_is_no_clipping(key: str, text: str, tmp_path: Path) -> None:
    config = load_config("gpt3_xl", [f"optimizer.{key}={text}"])
    assert config.optimizer.clip_norm == math.inf
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "written.yaml")) == config
    assert build_config(json.loads(json.dumps(yaml.safe_load(to_yaml(config)))), "a checkpoint") == config


@pytest.mark.parametrize("text", [".nan", "nan", "1e400", "-.inf", "0"])
def test_no_other_special_number_is_a_clip_norm(text: str, refusal: Refusal) -> None:
    refusal(["config", "gpt3_xl", f"optimizer.clip_norm={text}"], ": optimizer.clip_norm")


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("On", True), ("TRUE", True), ("no", False), ("off", False)]
)
def test_yaml_words_for_true_and_false_are_read(text: str, value: bool) -> None:
    assert read("train.compile", text) is value


@pytest.mark.parametrize("text", [".inf", "nan", "1e10", "-1", "1:2:3:4", "1d"])
@pytest.mark.parametrize("key", ["train.time_limit", "train.hang_timeout"])
def test_a_time_that_no_timer_takes_is_refused(key: str, text: str, refusal: Refusal) -> None:
    refusal(["config", "gpt3_xl", f"{key}={text}"], f": {key}: ", "HH:MM:SS")


@pytest.mark.parametrize(
    "name", ["../out", "/etc/x", "a/b", "a\\b", ".", "..", "a ", " a", "\t", "a\nb", "a\x7f", "x" * 256]
)
def test_a_name_that_is_no_name_is_refused(name: str, refusal: Refusal) -> None:
    refusal(["config", "gpt3_xl", f"run.name={name}"], ": run.name: ", "choose another run.name")


def test_bytes_that_are_not_utf8_are_refused(refusal: Refusal) -> None:
    refusal(["config", "gpt3_xl", "run.folder=\udcff"], "run.folder", "UTF-8")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=1e-3", "did you mean optimizer.lr?"),
        ("tokens=1e9", "did you mean train.tokens or validation.tokens?"),
        ("optimzer.lr=1", "did you mean optimizer?"),
    ],
)
def test_a_key_without_its_section_is_completed(override: str, hint: str, refusal: Refusal) -> None:
    refusal(["config", "gpt3_xl", override], hint)


@given(st.text())
def test_a_plain_value_is_a_number_only_if_it_looks_like_one(text: str) -> None:
    value = plain_value(text)
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert math.isinf(value) or value == float(text.replace("_", ""))


# --- files ---


def test_an_empty_section_changes_nothing(own: str) -> None:
    expected = load_config(own)
    for lines in (
        "optimizer:\n#  lr: 1e-3\n",
        "optimizer: ~\n",
        "model:\ntrain:\n",
        "engine:\n  deepspeed:\n",
        "optimizer: {}\n",
    ):
        assert read_file(lines) == expected, lines
    assert load_config(own, ["optimizer=", "engine.deepspeed="]) == expected


def test_a_text_in_a_file_needs_no_quotes(own: str) -> None:
    config = read_file("run: {name: 2024-05-01, folder: 010}\nsampling:\n  prompt: no\n")
    assert (config.run.name, config.run.folder, config.sampling.prompt) == ("2024-05-01", "010", "no")
    assert read_file(f"data: {json.dumps({'cache': 'a 🤗'})}\n").data.cache == "a 🤗"


def test_numbers_in_a_file_are_decimal(own: str) -> None:
    config = read_file("train: {micro_batch: 010, time_limit: 1:30}\noptimizer: {clip_norm: .inf, lr: 1e-3}\n")
    assert (config.train.micro_batch, config.train.time_limit) == (10, 90)
    assert (config.optimizer.clip_norm, config.optimizer.lr) == (math.inf, 1e-3)


def test_merge_keys_take_what_another_section_holds(own: str) -> None:
    adam = read_file(
        "x-a: &a {lr: 1e-3, beta1: 0.5}\nx-b: &b {lr: 2, eps: 3}\noptimizer:\n  <<: [*a, *b]\n  beta1: 0.7\n"
    ).optimizer
    assert (adam.lr, adam.beta1, adam.eps) == (1e-3, 0.7, 3)
    config = read_file("validation: &often {every_tokens: 100}\nlog:\n  <<: *often\n")
    assert (config.validation.every_tokens, config.log.every_tokens) == (100, 100)


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ("optimizer:\n  lr: 1\n  beta1: 0.5\n  lr: 2\n", ["line 5", "duplicate key 'lr'"]),
        ("optimizer:\n\tlr: 1\n", ["line 3", "indent with blanks"]),
        ("optimizer: [1]\n", ["optimizer: [1]", "not a section"]),
        ("optimizer: fast\n", ["optimizer: 'fast'", "not a section"]),
        ("optimizer: {lr: }\n", ["optimizer.lr: it has no value"]),
        ("optimzer:\n", ["unknown key optimzer", "optimizer"]),
        ("data: {sources: web}\n", ["data.sources: 'web'"]),
        ("data: {sources: [web]}\n", ["data.sources.0: 'web'", "not a section"]),
        ("optimizer: &a {<<: *a}\n", ["line 2"]),
        ("optimizer: &a [*a]\n", ["line 2"]),
        ("optimizer: {<<: 5}\n", ["line 2", "<<"]),
        ("optimizer: !!python/object:os.system x\n", ["line 2", "unknown tag"]),
        ("sampling: {prompt: !!binary aGk=}\n", ["line 2", "unknown tag"]),
        ("? [a]\n: b\n", ["line 2"]),
        ("---\na: 1\n", ["line 2", "single document"]),
        ("run: {folder: \"\\0\"}\n", ["run.folder"]),
        ("sampling: {prompt: \"\\ud83e\"}\n", ["line 2", "UTF-8"]),
        ("sampling: {prompt: \x07}\n", ["line 2", "\\x07"]),
        ('sampling: {prompt: "\\UFFFFFFFF"}\n', ["own.yaml"]),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold_is_refused_with_its_place(
    lines: str, parts: list[str], own: str, refusal: Refusal
) -> None:
    Path(own).write_text(f"base: tiny.yaml\n{lines}")
    refusal(["config", own], own, *parts)


def test_numbers_of_any_length_are_read_at_once() -> None:
    assert [plain_value(text) for text in ("0e999999999", "-0e9999999999999999999", "0.0e-99999999")] == [0, 0, 0]
    for text in ("1e999999999999", "1e-999999999999", "9" * 10_000, f"1e{'9' * 10_000}"):
        assert plain_value(text) == text


@pytest.mark.slow
def test_deep_nesting_is_refused() -> None:
    assert parse_value('"a": ' + "[" * 1_000, str, "here") == '"a": ' + "[" * 1_000
    for text in ("[" * 1_000, "[" * 1_000 + "]" * 1_000):
        with pytest.raises(UserError, match="here"):
            parse(text, Any, "here")


# --- written and read ---


@given(plain)
def test_plain_values_are_read_as_they_were_written(value: Any) -> None:
    for flow in (False, True):
        assert parse(dump(value, flow), Any, "here") == value


@given(texts)
def test_other_readers_of_yaml_read_the_same_texts(text: str) -> None:
    assert yaml.safe_load(dump({"key": text})) == {"key": text}


trees = st.fixed_dictionaries(
    {
        "model": st.just(MODEL),
        "schedule": st.just({"shape": "constant"}),
        "run": st.fixed_dictionaries({"name": names, "folder": paths}),
        "data": st.fixed_dictionaries({"sources": sources, "cache": paths}),
        "train": st.fixed_dictionaries(
            {
                "tokens": st.integers(512, 2**63 - 1), "batch_tokens": st.just(512), "compile": st.booleans(),
                "time_limit": st.floats(0, 1e9) | st.integers(0, 10**9),
                "activation_checkpointing": st.sampled_from(["none", "full", {"every": 3}]),
            }
        ),
        "optimizer": st.fixed_dictionaries(
            {"clip_norm": st.floats(1e-300, allow_nan=False), "lr": st.floats(1e-300, 1e300)}
        ),
        "sampling": st.fixed_dictionaries({"prompt": texts}),
        "engine": st.fixed_dictionaries(
            {"name": st.just("zero"), "deepspeed": st.dictionaries(texts, plain, max_size=3)}
        ),
    }
)  # fmt: skip


@settings(max_examples=30)
@given(trees)
def test_a_config_that_was_written_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    config = build_config(tree, "here")
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(file)) == config


@given(sources)
def test_a_list_survives_an_override_and_a_shell(given_sources: list[dict[str, Any]]) -> None:
    (word,) = shlex.split(shlex.quote(f"data.sources={value_text(given_sources)}"))
    assert override({}, word) == {"data": {"sources": given_sources}}
