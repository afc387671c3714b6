"""The configs of public runs of GPT-2 124M beside gpt2_124m, against what those runs have published."""

import dataclasses

import pytest

from megagpt.config_file import load_config
from megagpt.references.losses import corpus_named
from megagpt.schedule import learning_rate, step_count


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "floor"), [("gpt2_124m_40b", 76_292, 715, 0.1), ("gpt2_124m_fineweb", 19_560, 700, 0.0)]
)
def test_public_runs_of_124m_have_files(name: str, steps: int, warmup: int, floor: float) -> None:
    """build-nanogpt's of four passes, and the one whose log is llm.c's curve; all else is that of gpt2_124m."""
    config, usual = load_config(name), load_config("gpt2_124m")
    assert config.train.tokens == config.schedule.decay_end_tokens == steps * 524_288
    assert step_count(config) == steps
    assert (config.schedule.warmup_tokens, config.schedule.floor_ratio) == (warmup * 524_288, floor)
    schedule = dataclasses.replace(usual.schedule, **{
        key: getattr(config.schedule, key) for key in ("warmup_tokens", "decay_end_tokens", "floor_ratio")
    })  # fmt: skip
    train = dataclasses.replace(usual.train, tokens=config.train.tokens)
    rest = dataclasses.replace(usual, run=config.run, data=config.data, train=train, schedule=schedule)
    assert config == rest
    assert (config.data == usual.data) == (name == "gpt2_124m_40b")


def test_the_curve_of_llm_c_is_as_long_as_its_config() -> None:
    config = load_config("gpt2_124m_fineweb")
    corpus = corpus_named(source.path for source in config.data.sources)
    assert corpus is not None
    assert corpus.curve is not None
    assert corpus.curve.tokens[-1] == config.train.tokens
    assert corpus.curve.tokens[1] == config.validation.every_tokens


def test_the_fineweb_run_has_the_rates_of_llm_cs_log() -> None:
    """Lines such as `s:699 trl:4.8484 lr:0.000600`: the rate of a step, from 0, to six decimals."""
    config = load_config("gpt2_124m_fineweb")
    logged = {0: 0.000001, 1: 0.000002, 698: 0.000599, 699: 0.000600, 10_000: 0.000306, 15_000: 0.000082, 19_559: 0.0}
    for step, rate in logged.items():
        assert learning_rate(config, (step + 1) * 524288) == pytest.approx(rate, abs=5.1e-7), step
