"""Batches of prompts of different lengths in `transformers`, with an exported folder's own settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from megagpt.cli import main
from megagpt.models.gpt import GPT
from tests.conftest import write_tiny
from tests.runs import save_run

PROMPTS = ["Document 7:", "1", "Document 1: 0 1 2 3 4", "8 16 24"]


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported run with weights so large that its greedy texts differ."""
    place = tmp_path_factory.mktemp("batches")

    def enlarge(model: GPT) -> None:
        for parameter in model.parameters():
            parameter.mul_(10.0)

    run = save_run(str(write_tiny(place, corpus)), enlarge)
    assert main(["export", str(run), "--to", str(place / "out")]) == 0
    return place / "out"


@pytest.mark.slow
def test_a_padded_batch_generates_what_single_prompts_do(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>", "left")
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert batch.attention_mask[1].tolist() == [0] * (batch.input_ids.shape[1] - 1) + [1]
    together = model.generate(**batch, **settings)[:, batch.input_ids.shape[1] :]
    for prompt, row in zip(PROMPTS, together, strict=True):
        single = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**single, **settings)[0, single.input_ids.shape[1] :]
        assert torch.equal(row[: len(expected)], expected)
    assert len({tuple(row.tolist()) for row in together}) > 1


def test_a_pipeline_takes_batches(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    alone = [generator(prompt, **settings)[0]["generated_text"] for prompt in PROMPTS]
    capfd.readouterr()
    together = [rows[0]["generated_text"] for rows in generator(PROMPTS, batch_size=3, **settings)]
    assert together == alone
    assert "pad_token" not in capfd.readouterr().err
