"""A small GPT-2 of `transformers`, and small hubs that have it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megagpt.exchange.tokenizer_files import tokenizer_files
from tests.data.hub import Hub
from tests.exchange.hub_runs import run

GPT2 = "openai-community/gpt2"
COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
WEIGHTS = "model.safetensors"
SAMPLE = ["--max-tokens", "4", "--temperature", "0"]


def make_folder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=8, n_layer=1, n_head=1, initializer_range=1.0))
    model.save_pretrained(folder)
    for name, text in tokenizer_files(32).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("theirs") / "gpt2", 1)


@pytest.fixture(scope="session")
def text(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sample of the local folder."""
    code, out, err = run({}, tmp_path_factory.mktemp("expected"), "sample", str(folder), *SAMPLE)
    assert (code, err) == (0, "")
    return out


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    """The small GPT-2 in the place of OpenAI's, with files that nobody needs."""
    others = {"pytorch_model.bin": b"a pickle", "flax_model.msgpack": b"flax", "onnx/model.onnx": b"onnx"}
    with Hub(contents(folder) | others, GPT2, "model", COMMIT).running() as server:
        yield server


@pytest.fixture
def other(folder: Path) -> Iterator[Hub]:
    """A model of somebody else."""
    with Hub(contents(folder), "someone/small-gpt2", "model").running() as server:
        yield server
