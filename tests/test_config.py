"""Configs: the shipped files, errors, marks, and the explanation of keys."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.cli import main
from megagpt.config import Config, OptimizerConfig, ScheduleConfig
from megagpt.config_file import build_config, find_config, load_config, to_yaml
from megagpt.config_keys import Key, all_keys, keys_marked
from megagpt.config_marks import Change, For, mark_of
from megagpt.errors import UserError
from megagpt.models.presets import PRESETS, ModelConfig, near_divisors
from tests.processes import REPOSITORY

FILES = sorted((REPOSITORY / "configs").glob("*.yaml"))
LONGER = [f for f in FILES if f.stem in ("gpt2_124m_40b", "gpt2_124m_fineweb")]
PRESET_FILES = [f for f in FILES if f.stem != "quickstart" and f not in LONGER]

# GPT-3, Table 2.1: batch in tokens as printed, peak learning rate.
TABLE = {
    "gpt3-125m": (0.5e6, 6.0e-4),
    "gpt3-350m": (0.5e6, 3.0e-4),
    "gpt3-760m": (0.5e6, 2.5e-4),
    "gpt3-xl": (1e6, 2.0e-4),
    "gpt3-2.7b": (1e6, 1.6e-4),
    "gpt3-6.7b": (2e6, 1.2e-4),
    "gpt3-13b": (2e6, 1.0e-4),
    "gpt3-175b": (3.2e6, 0.6e-4),
}


def test_every_preset_has_a_file_of_its_own() -> None:
    assert sorted(load_config(str(f)).model.preset for f in PRESET_FILES) == sorted(PRESETS)
    texts = [f.read_text() for f in FILES]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("file", PRESET_FILES, ids=lambda f: f.stem)
def test_preset_files_hold_the_papers_recipe(file: Path) -> None:
    config = load_config(str(file))
    assert config.model == PRESETS[config.model.preset].model
    assert config.train.batch_tokens == PRESETS[config.model.preset].batch_tokens
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, config.schedule.floor_ratio) == (0.1, 1.0, 0.1)
    if config.model.preset in TABLE:
        batch, lr = TABLE[config.model.preset]
        assert config.train.batch_tokens == pytest.approx(batch, rel=0.05)
        assert config.optimizer.lr == lr
        assert config.train.tokens == 300e9
        assert (config.schedule.warmup_tokens, config.schedule.decay_end_tokens) == (375e6, 260e9)
        assert config.train.batch_ramp_start == 32768
        assert 4e9 <= config.train.batch_ramp_tokens <= 12e9
    else:
        assert config.train.tokens == 19073 * 524288
        assert config.schedule.warmup_tokens == 715 * 524288


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_file_divides_over_the_usual_worlds(file: Path) -> None:
    """As it is, or with the micro-batch that the refusal names."""
    config = load_config(str(file))
    config.check_ranks(config.engine.tensor_ranks)
    for ranks in (8, 16, 32, 64, 128, 256) if config.model.preset else ():
        refusal = ""
        try:
            config.check_ranks(ranks)
        except UserError as error:
            refusal = str(error)
        advice = re.search(r"train\.micro_batch (\d+)(?: or \d+)?(?:, or engine|$)", refusal)
        assert advice or not refusal, refusal
        micro_batch = int(advice[1]) if advice else config.train.micro_batch
        load_config(str(file), [f"train.micro_batch={micro_batch}"]).check_ranks(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_file_trains_three_steps_when_shrunk(file: Path, corpus: Path, tmp_path: Path) -> None:
    shrunk = [
        "model.layers=2", "model.width=32", "model.heads=2", "model.context=16", "train.tokens=192",
        "train.batch_tokens=64", "train.micro_batch=4", "train.batch_ramp_start=0", "train.batch_ramp_tokens=0",
        f"data.sources=[{{path: {corpus}}}]", f"run.folder={tmp_path}", "validation.tokens=64",
        "sampling.samples=1", "sampling.max_tokens=2", "train.device=cpu", "evaluation.tasks=[]",
        "engine.tensor_ranks=1",
    ]  # fmt: skip
    assert main(["train", str(file), *shrunk]) == 0
    lines = [json.loads(line) for line in (tmp_path / file.stem / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3]
    assert all(line["loss"] < 12 for line in lines if line["event"] == "step")


def test_bare_names_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("gpt3_xl.yaml") == find_config("gpt3_xl")
    assert load_config("gpt3_xl").run.name == "gpt3_xl"


def test_resolved_config_reads_back_to_itself(tmp_path: Path) -> None:
    config = load_config("gpt3_13b", ["train.tokens=5e8", "data.sources=[{path: a, weight: 0.6}, {path: b}]"])
    assert config.train.tokens == 500_000_000
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "resolved.yaml")) == config


@pytest.mark.parametrize(
    ("text", "value"), [("5e8", 500_000_000), ("1_000_000_000", 10**9), ("3E11", 3 * 10**11), ("1.5e9", 1_500_000_000)]
)
def test_numbers_are_numbers(text: str, value: int) -> None:
    assert load_config("gpt3_xl", [f"train.tokens={text}"]).train.tokens == value


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trian.tokens=1e9", ["trian", "did you mean train"]),
        ("train.tokns=1e9", ["train.tokns", "did you mean tokens"]),
        ("train.tokens=lots", ["train.tokens", "'lots'", "integer"]),
        ("train.tokens=true", ["train.tokens", "integer"]),
        ("train.tokens=1.5", ["train.tokens", "1.5"]),
        ("train.tokens=-5", ["train.tokens", "-5", "greater than 0"]),
        ("train.compile=maybe", ["train.compile", "maybe"]),
        ("train=3", ["train", "3"]),
        ("train.precision=fp8", ["train.precision", "fp8", "bf16"]),
        ("model.heads=7", ["heads 7", "4", "8"]),
        ("model.preset=gpt3-xll", ["gpt3-xll", "gpt3-xl"]),
        ("model.dropout=1.0", ["model.dropout"]),
        ("train.batch_tokens=1000000", ["999424", "1001472"]),
        ("train.batch_ramp_tokens=0", ["batch_ramp_start", "together"]),
        ("train.tokens=1e5", ["train.tokens 100000", "less than one batch"]),
        ("schedule.decay_end_tokens=1e6", ["decay_end_tokens", "1000000"]),
        ("schedule.decay_start_tokens=1e9", ["decay_start_tokens", "wsd"]),
        ("data.sources=[]", ["data.sources", "at least 1"]),
        ("data.sources=[{path: a, wieght: 2}]", ["wieght", "did you mean weight"]),
        ("data.sources=[{path: a, weight: 0}]", ["data.sources.0.weight"]),
        ("no-equals", ["no-equals", "section.key=value"]),
        ("train.tokens=[1", ["train.tokens=[1"]),
    ],
)
def test_bad_overrides_are_refused_in_one_line(
    override: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config("gpt3_xl", [override])
    for part in parts:
        assert part in str(caught.value)
    assert main(["config", "gpt3_xl", override]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: {preset: gpt2-124m}\nmodel: {preset: gpt3-xl}\n", ["line 2", "duplicate key 'model'"]),
        ("model: {preset: gpt2-124m, preset: gpt3-xl}\n", ["duplicate key 'preset'"]),
        ("model: [1, 2\n", ["line"]),
        ("- a\n- b\n", ["list"]),
        ("base: nowhere.yaml\n", ["nowhere.yaml"]),
        ("base: own.yaml\n", ["own.yaml", "itself"]),
        ("train: {tokens: 1e9}\n", ["model is missing"]),
        ("\x00\x01", ["own.yaml"]),
    ],
)
def test_bad_files_name_file_and_place(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    for part in [*parts, "own.yaml"]:
        assert part in str(caught.value)


def test_an_unknown_config_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "gpt3_lx.yaml"]) == 2
    assert "gpt3_xl.yaml" in capsys.readouterr().err


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 4096))
def test_a_batch_divides_or_the_error_names_those_that_do(ranks: int, micro_batch: int, sequences: int) -> None:
    def config(sequences: int) -> Config:
        train = {"tokens": 10**9, "batch_tokens": 64 * sequences, "micro_batch": micro_batch}
        model = {"layers": 1, "width": 8, "heads": 1, "context": 64}
        return build_config({"model": model, "train": train}, "here")

    try:
        accumulation = config(sequences).accumulation(ranks)
    except UserError as error:
        assert sequences % (ranks * micro_batch) != 0
        named = str(error).split("use train.batch_tokens ")[1].split(",")[0].split(" or ")
        for tokens in map(int, named):
            assert abs(tokens // 64 - sequences) < ranks * micro_batch
            config(tokens // 64).accumulation(ranks)
    else:
        assert accumulation * ranks * micro_batch == sequences


@given(st.integers(1, 3000), st.integers(1, 4000))
def test_the_nearest_divisors_are_found(number: int, near: int) -> None:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    assert near_divisors(number, near) == sorted(sorted(divisors, key=lambda divisor: abs(divisor - near))[:2])


@pytest.mark.parametrize("override", ["model.layers=1e15", "model.width=1e15", "train.batch_tokens=1024e15"])
def test_enormous_numbers_are_answered_without_counting_to_them(override: str) -> None:
    assert main(["config", "gpt2_124m", override, "train.tokens=4096e15", "train.micro_batch=7"]) in (0, 2)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_quickstart_divides_over_up_to_four_ranks(ranks: int) -> None:
    load_config("quickstart.yaml").check_ranks(ranks)


def test_config_command_shows_what_is_derived(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "gpt3_xl.yaml", "--ranks", "16"]) == 0
    output = capsys.readouterr().out
    assert "1,315,723,264" in output  # GPT-3 XL by the closed form
    assert "8 micro-batch(es) of 4" in output  # 512 sequences / (16 x 4)
    assert "lr: 0.0002" in output


# --- marks ---


@pytest.mark.parametrize("key", all_keys(), ids=lambda key: key.name)
def test_every_key_has_a_mark_a_text_and_values(key: Key) -> None:
    assert mark_of(key.field, Change) is not None, f"{key.name}: mark it as Free, Recipe, Data or Shape (config_marks)"
    assert key.text.endswith("."), f"{key.name}: describe it in a docstring"
    assert key.values


def test_the_recipe_is_optimizer_schedule_batch_seed_and_dropout() -> None:
    sections = [
        f"{section}.{field.name}"
        for section, kind in (("optimizer", OptimizerConfig), ("schedule", ScheduleConfig))
        for field in dataclasses.fields(kind)
    ]
    others = [
        "run.seed",
        "train.batch_tokens",
        "train.batch_ramp_start",
        "train.batch_ramp_tokens",
        "train.residual",
        "train.spike",
        "train.float8",
        "model.dropout",
    ]
    assert sorted(key.name for key in keys_marked(Change.RECIPE)) == sorted(sections + others)


def test_the_shape_is_the_model_without_dropout_and_preset() -> None:
    names = {f"model.{field.name}" for field in dataclasses.fields(ModelConfig)}
    assert {key.name for key in keys_marked(Change.SHAPE)} == names - {"model.dropout", "model.preset"}


def test_every_key_of_one_engine_is_refused_by_the_others() -> None:
    values = {
        "stage": "1",
        "tensor_ranks": "2",
        "shard_ranks": "2",
        "reshard_after_forward": "false",
        "nvme_path": "/x",
        "deepspeed": "{a: 1}",
    }
    engines = {key.name.removeprefix("engine."): mark_of(key.field, For) for key in all_keys()}
    owners = {name: only.engines for name, only in engines.items() if only}
    assert owners.keys() == values.keys()
    for name, able in owners.items():
        for engine in {"ddp", "fsdp", "zero"} - {*able}:
            owner = " or ".join(able)
            with pytest.raises(
                UserError, match=f"engine.{name} is for engine.name {owner}, and engine.name is {engine}"
            ):
                load_config("gpt3_xl", [f"engine.name={engine}", f"engine.{name}={values[name]}"])


def test_check_ranks_refuses_batches_and_copies_that_do_not_fit() -> None:
    config = load_config("gpt3_xl", ["engine.name=fsdp", "engine.shard_ranks=3"])
    with pytest.raises(UserError, match=r"engine\.shard_ranks 3 does not divide 8 ranks"):
        config.check_ranks(8)
    with pytest.raises(UserError, match=r"24 rank\(s\)"):
        config.check_ranks(24)
    load_config("gpt3_xl", ["engine.name=fsdp", "engine.shard_ranks=4"]).check_ranks(8)


# --- megagpt config --keys ---


def explained(capsys: pytest.CaptureFixture[str], *word: str) -> list[str]:
    """The lines that explain keys, without their indentation."""
    assert main(["config", "--keys", *word]) == 0
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_a_key_is_explained_with_default_bounds_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert explained(capsys, "clip_norm") == [
        "optimizer.clip_norm = 1.0",
        "number > 0; a resume needs --allow-recipe-change to change it",
        "Largest global gradient norm; .inf: gradients are not clipped.",
    ]


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("train.precision", ["train.precision = bf16", "fp32 | bf16 | fp16; a resume may change it"]),
        ("model.layers", ["model.layers = required", "whole number > 0; no resume may change it"]),
        (
            "engine.stage",
            ["engine.stage = 2", "whole number >= 1 and <= 3; engine.name zero only; a resume may change it"],
        ),
        ("train.time_limit", ["seconds, MM:SS, HH:MM:SS or D-HH:MM:SS; a resume may change it"]),
        (
            "data.sources",
            ["data.sources = [{path: data/fineweb_edu_10bt, weight: 1.0}]", "data.sources[].weight = 1.0"],
        ),
        ("NVME", ["engine.nvme_path = ''"]),
        ("activation_checkpointing", ["none | full | selective | {every: k}; a resume may change it"]),
    ],
)
def test_values_of_each_kind_are_explained(word: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert set(parts) <= set(explained(capsys, word))


def test_without_a_word_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of `megagpt config`, and those of the items of lists."""
    config = dataclasses.asdict(load_config("gpt3_xl"))
    names = [f"{section}.{key}" for section, keys in config.items() for key in keys]
    lines = explained(capsys)
    shown = [line.split(" = ")[0] for line in lines if re.match(r"[a-z]+\.\S+ = ", line)]
    assert sorted(shown) == sorted(
        [*names, *(f"data.{key}" for key in ("sources[].path", "sources[].weight", "skip[].at", "skip[].tokens"))]
    )


def test_a_word_in_the_text_of_a_key_finds_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "log.straggler_factor = 1.2" in explained(capsys, "TensorBoard")


def test_a_word_of_no_key_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--keys", "warmpu_tokens"]) == 2
    error = capsys.readouterr().err
    assert "'warmpu_tokens'" in error
    assert "did you mean warmup_tokens" in error
