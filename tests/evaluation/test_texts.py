"""Perplexity of texts, against a plain computation window by window."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from megagpt.data.tokenizer import END_OF_TEXT, gpt2
from megagpt.evaluation.detokenizers import ptb, wikitext
from tests.evaluation.conftest import POSITIONS, write
from tests.evaluation.test_evaluate import evaluate

LINES = [
    " = Cat = \n",
    "",
    ' It \'s a 3 @.@ 5 @-@ foot cat , he said ; " so " ( they ) ran . \n',
    " The cat sat . \n",
] * 3


def plain(folder: Path, text: str, stride: int) -> float:
    """Log-likelihood of all tokens: the token at i sees the tokens of its window's context before it."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = gpt2().encode_ordinary(text)
    total, done = 0.0, 0
    while done < len(ids):
        end = min(len(ids), POSITIONS if done == 0 else done + stride)
        seen = ([END_OF_TEXT, *ids])[max(0, end - POSITIONS) : end]  # shifted by one: the inputs
        with torch.no_grad():
            found = model(torch.tensor([seen])).logits[0].double().log_softmax(-1)
        for i in range(done, end):
            total += float(found[len(seen) - (end - i), ids[i]])
        done = end
    return total


@pytest.mark.parametrize("stride", [0, 7])
def test_a_text_is_scored_in_windows(stride: int, folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "wikitext2.jsonl", [{"text": line} for line in LINES])
    options = ["--stride", str(stride)] if stride else []
    (result,), _ = evaluate(folder, tmp_path, "wikitext2", *options)
    published = "".join(LINES)
    total = plain(folder, wikitext(published), stride or POSITIONS)
    per_token, per_word, bits = (value["value"] for value in result["values"])
    assert math.log(per_word) * len(published.split()) == pytest.approx(-total, rel=1e-6)
    assert math.log(per_token) * len(gpt2().encode_ordinary(wikitext(published))) == pytest.approx(-total, rel=1e-6)
    assert bits * len(published.encode()) * math.log(2) == pytest.approx(-total, rel=1e-6)
    assert f"stride {stride or POSITIONS}, detokenizer WikiText's" in result["values"][0]["convention"]


def test_documents_are_texts_of_their_own(folder: Path, tmp_path: Path) -> None:
    pages = ["A cat sat . \n" * 9, "It ran . \n"]
    write(tmp_path / "wikitext_document_level.jsonl", [{"page": page} for page in pages])
    (result,), _ = evaluate(folder, tmp_path, "wikitext:harness")
    total = sum(plain(folder, wikitext(page), POSITIONS) for page in pages)
    words = sum(len(page.split()) for page in pages)
    assert math.log(result["values"][1]["value"]) * words == pytest.approx(-total, rel=1e-6)


def test_rows_of_a_users_file_are_texts_of_their_own(folder: Path, tmp_path: Path) -> None:
    texts = ["A cat sat. " * 3 + "It ends.", "Another cat ran."]
    path = write(tmp_path / "docs.parquet", [{"text": text} for text in texts])
    (result,), rows = evaluate(folder, tmp_path, f"text:{path}")
    totals = [plain(folder, text, POSITIONS) for text in texts]
    assert [row["log_likelihood"] for row in rows] == pytest.approx(totals, rel=1e-6)
    assert result["text"].startswith("each document")


def test_any_text_file_is_scored_as_it_is(folder: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("One cat , two cats .\n" * 12)
    (result,), _ = evaluate(folder, tmp_path, f"text:{book}")
    whole = [value["name"] for value in result["values"]]
    assert math.log(result["values"][0]["value"]) * len(gpt2().encode_ordinary(book.read_text())) == pytest.approx(
        -plain(folder, book.read_text(), POSITIONS), rel=1e-6
    )
    (result,), _ = evaluate(folder, tmp_path, f"text:{book}", "--limit", "1")
    assert [value["name"] for value in result["values"]] == whole[:1] == ["per_token_perplexity"]
    assert (result["items"], result["values"][0]["standard_error"]) == (1, None)


def test_a_stride_beyond_the_model_is_refused(folder: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    write(tmp_path / "ptb.jsonl", [{"sentence": "a cat N"}])
    command = ["evaluate", str(folder), "--tasks", "ptb", "--data", str(tmp_path)]
    refusal([*command, "--stride", "49"], "--stride 49 is more than the model's 48 positions")
    refusal([*command, "--shots", "2"], "ptb is a text, which takes no shots")


def test_texts_are_detokenized_as_published_numbers_are() -> None:
    line = ' It \'s a 3 @.@ 5 @-@ foot cat , he said ; " so " ( they ) ran . \n = = Cats = = \n'
    assert wikitext(line) == ' It\'s a 3.5-foot cat, he said; "so" (they) ran.\n== Cats ==\n'
    assert ptb(" no it was n't N or $ N <unk> \n the cats ' N N \n") == " no it wasn't 1 or $1 ?\nthe cats' 1 1 \n"
