"""Tokenizers of models on the Hugging Face hub: each is compared with GPT-2's, however the cache was filled."""

from pathlib import Path

import pytest

from megagpt.exchange.tokenizer_files import TOKENIZER_FILES
from tests.data.hub import Hub
from tests.exchange.conftest import COMMIT, GPT2, SAMPLE, WEIGHTS
from tests.exchange.hub_runs import run

pytestmark = pytest.mark.slow


def fetched(hub: Hub) -> list[str]:
    """The names of the files in the order in which they were fetched, each once."""
    return list(dict.fromkeys(line.rpartition("/")[2] for line in hub.requests if line.startswith("GET /")))


def test_a_cache_without_the_tokenizer_is_completed(hub: Hub, tmp_path: Path, text: str) -> None:
    """Such a cache is left by a program that needs the weights only. Without a network it is refused."""
    variables = hub.environment(tmp_path / "home")
    assert run(variables, tmp_path, "sample", "gpt2", *SAMPLE)[0] == 0
    order = fetched(hub)
    assert max(order.index(name) for name in TOKENIZER_FILES) < order.index(WEIGHTS), "a killed fetch lacks weights"
    folder = tmp_path / "home" / "hub" / f"models--{GPT2.replace('/', '--')}" / "snapshots" / COMMIT
    for name in TOKENIZER_FILES:
        (folder / name).unlink()
    code, _, err = run(variables | {"HF_HUB_OFFLINE": "1"}, tmp_path, "sample", "gpt2", *SAMPLE)
    assert (code, err.count("\n")) == (2, 1)
    assert f"hf download {GPT2} --revision {COMMIT}" in err
    assert f"its weights are in the cache, but no tokenizer; if it has none, name the folder {folder}" in err
    assert run({}, tmp_path, "sample", str(folder), *SAMPLE)[:2] == (0, text)
    assert run(variables, tmp_path, "sample", "gpt2", *SAMPLE)[:2] == (0, text)
    assert (folder / "vocab.json").is_file()


def test_another_kind_of_tokenizer_is_refused_unfetched(other: Hub, tmp_path: Path) -> None:
    """By the names of its files, or by a vocabulary that differs."""
    whole = other.files
    others = {name: data for name, data in whole.items() if name not in TOKENIZER_FILES}
    for files, part in (
        (others | {"spiece.model": b"pieces"}, f"{other.repository}: another tokenizer than GPT-2's"),
        (whole | {"vocab.json": b'{"a": 0}'}, "vocab.json: another tokenizer than GPT-2's"),
    ):
        other.files = files
        code, _, err = run(other.environment(tmp_path / "home"), tmp_path, "sample", other.repository)
        assert code == 2
        assert part in err.splitlines()[-1]
        assert WEIGHTS not in fetched(other)
